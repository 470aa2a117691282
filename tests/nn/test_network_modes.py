"""Modes of a network that can serve one task at a time: batches of several tasks, group by group."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning.pytorch import seed_everything
from torch import Tensor, nn

from bpn_lightning.datamodules.digits import SplitDigits
from bpn_lightning.errors import ConfigurationError
from bpn_lightning.model.module import ContinualModule
from bpn_lightning.nn import MLP
from bpn_lightning.nn.structure import Attachment
from bpn_lightning.nn.weight_bank import WeightBank

TASKS = 3


@pytest.fixture
def banked() -> Callable[..., ContinualModule]:
    """A module with a different network for each task; no trainer, no strategy."""

    def make(mask: Any = "all") -> ContinualModule:
        stream = SplitDigits(num_tasks=TASKS)
        stream.setup()
        module = ContinualModule(MLP([8]), mask=mask)
        module.attach(stream)
        bank = module.network.attach_weight_bank()
        bank.begin()
        for task in range(TASKS):
            module.network.opened = task
            module.network.switch(task)
            bank.start(task)
            with torch.no_grad():
                for parameter in module.parameters():
                    parameter.add_(torch.randn_like(parameter))
            bank.freeze()
        return module.eval()

    return make


def one_by_one(module: ContinualModule, inputs: Tensor, tasks: list[int]) -> Tensor:
    rows = [module(x[None], task=task) for x, task in zip(inputs, tasks, strict=True)]
    return torch.cat(rows)


@pytest.mark.parametrize("mask", ["all", "seen", "task"])
@pytest.mark.parametrize(
    "tasks",
    [
        [2, 0, 1, 1, 0, 2, 2, 0],  # all, mixed
        [0, 0, 1, 2],
        [2, 1, 0],
        [1, 1, 1],  # only one
        [2, 0],  # not all
        [1],
    ],
    ids=str,
)
def test_samples_are_answered_in_their_places(banked: Any, tasks: list[int], mask: str) -> None:
    module = banked(mask)
    inputs = torch.randn(len(tasks), 1, 8, 8)
    with torch.no_grad():
        found = module(inputs, task=torch.tensor(tasks))
        torch.testing.assert_close(found, one_by_one(module, inputs, tasks), rtol=1e-5, atol=1e-6)
    assert found.isfinite().sum(1).tolist() == [2 if mask == "task" else 2 * TASKS] * len(tasks)


def test_random_batches_are_answered_in_their_places(banked: Any) -> None:
    module = banked()
    for size in (2, 17, 64):
        tasks, inputs = torch.randint(TASKS, (size,)), torch.randn(size, 1, 8, 8)
        with torch.no_grad():
            wanted = one_by_one(module, inputs, tasks.tolist())
            torch.testing.assert_close(module(inputs, task=tasks), wanted, rtol=1e-4, atol=1e-4)


def test_an_empty_batch_has_no_answers(banked: Any) -> None:
    """A process may have no share of a batch."""
    module = banked()
    empty = torch.zeros(0, dtype=torch.long)
    assert module(torch.zeros(0, 1, 8, 8), task=empty).shape == (0, 2 * TASKS)


@pytest.mark.parametrize(
    ("task", "message"),
    [
        (torch.tensor([0, 3]), "Expected task to be an id from 0 to 2, but got 3."),
        (torch.tensor([-1, 0]), "Expected task to be an id from 0 to 2, but got -1."),
        (3, "Expected task to be an id from 0 to 2, but got 3."),
        (
            torch.tensor(1),
            "Expected task to be a number or (batch,) numbers, but got 0 dimensions.",
        ),
        (
            torch.tensor([[0], [1]]),
            "Expected task to be a number or (batch,) numbers, but got 2 dimensions.",
        ),
    ],
    ids=str,
)
def test_tasks_that_do_not_exist_are_refused(banked: Any, task: Any, message: str) -> None:
    module, inputs = banked(), torch.randn(2, 1, 8, 8)
    before = module(inputs)
    with pytest.raises(ConfigurationError) as error:
        module(inputs, task=task)
    assert str(error.value) == message
    assert torch.equal(module(inputs), before)


def test_the_mode_of_before_returns_where_a_part_cannot_switch(banked: Any) -> None:
    module, inputs = banked(), torch.randn(2, 1, 8, 8)
    with torch.no_grad(), module.task_mode(1):
        before = module(inputs)
        with pytest.raises(TypeError), module.task_mode(torch.tensor([0, 1])):
            pass
        assert torch.equal(module(inputs), before)
        assert torch.equal(module(inputs, task=torch.tensor([1, 1])), before)
        with pytest.raises(ZeroDivisionError), module.task_mode(2):
            raise ZeroDivisionError
        assert torch.equal(module(inputs), before)


def test_modes_nest(banked: Any) -> None:
    module, inputs = banked(), torch.randn(2, 1, 8, 8)
    with torch.no_grad():
        wanted = [module(inputs, task=task) for task in range(TASKS)]
        assert not torch.equal(wanted[0], wanted[1])
        with module.task_mode(0):
            with module.task_mode(2):
                assert torch.equal(module(inputs, task=1), wanted[1])
                assert torch.equal(module(inputs), wanted[2])
            assert torch.equal(module(inputs), wanted[0])
        assert torch.equal(module(inputs), wanted[2])


def test_gradients_through_exchanged_weights_are_refused_and_not_wrong(banked: Any) -> None:
    """Autograd would use the weights of the last group for all of them."""
    module = banked()
    inputs = torch.randn(4, 1, 8, 8, requires_grad=True)
    logits = module(inputs, task=torch.tensor([0, 1, 2, 0]))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        logits.sum().backward()


def test_there_is_one_bank(banked: Any) -> None:
    module = banked()
    bank = module.network.attach_weight_bank()
    assert isinstance(bank, WeightBank)
    assert module.network.attach_weight_bank() is module.network.weight_bank is bank
    assert module.network.structure.attached == [Attachment("weight_bank", {})]
    assert module.network.has_modes
    assert module.network.shared_parameters(include_head=True).keys() == {
        "backbone.1.weight", "backbone.1.bias", "head.weight", "head.bias",
    }  # fmt: skip


def test_a_module_without_a_bank_holds_nothing_of_it() -> None:
    seed_everything(0, verbose=False)
    stream = SplitDigits(num_tasks=TASKS)
    stream.setup()
    module = ContinualModule(nn.Flatten())
    module.attach(stream)
    assert module.network.weight_bank is None
    assert not any("weight_bank" in name for name in module.state_dict())
    assert not module.host.training_weights
