"""Gates of modes' logits: the mode that was made to know answers, and nothing is stored."""

from collections.abc import Callable

import pytest
import torch

from bpn_lightning.costs import measured_bytes
from bpn_lightning.strategies.gates.base import TaskGate
from bpn_lightning.strategies.gates.logits import Confidence, Energy, Entropy
from bpn_lightning.strategies.gates.supsup import SupSup

every_gate = pytest.mark.parametrize("make", [Confidence, Entropy, Energy, SupSup])


@every_gate
def test_the_mode_that_is_sure_is_named(make: Callable[[], TaskGate]) -> None:
    logits = torch.randn(4, 30, 5) / 10
    sure = torch.arange(30) % 4
    logits[sure, torch.arange(30), torch.randint(5, (30,))] += 6
    assert torch.equal(make().tasks(logits), sure)


@every_gate
def test_probabilities_of_tasks_add_up(make: Callable[[], TaskGate]) -> None:
    logs = make().task_log_probabilities(torch.randn(3, 7, 5))
    torch.testing.assert_close(logs.exp().sum(1), torch.ones(7))


@every_gate
def test_a_sample_does_not_depend_on_its_batch(make: Callable[[], TaskGate]) -> None:
    logits = torch.randn(3, 7, 5)
    whole, alone = make().task_scores(logits), make().task_scores(logits[:, 2:3])
    torch.testing.assert_close(whole[2:3], alone)


@every_gate
def test_nothing_is_stored(make: Callable[[], TaskGate]) -> None:
    gate = make()
    assert gate.declared_bytes(None).held == measured_bytes(gate, None) == (0, 0)  # type: ignore[arg-type]
