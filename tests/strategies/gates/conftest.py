"""Digits as tasks of two classes, and gates that are fitted on them without a network."""

from collections.abc import Callable, Sequence

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor

from bpn_lightning.functional.moments import draw_held_out
from bpn_lightning.strategies.gates.features import FeatureGate
from bpn_lightning.tasks import Task

Samples = tuple[Tensor, Tensor]


def make_task(task_id: int, columns: tuple[int, int]) -> Task:
    return Task(task_id, columns, tuple(map(str, range(*columns))), 1)


@pytest.fixture
def task() -> Callable[..., Task]:
    return make_task


@pytest.fixture(scope="session")
def digits() -> tuple[Samples, Samples]:
    """Train and test part: features ``(n, 64)`` from 0 to 1 and columns ``(n,)``."""
    images, labels = load_digits(return_X_y=True)
    x, y = torch.from_numpy(images).float() / 16, torch.from_numpy(labels)
    return (x[::2], y[::2]), (x[1::2], y[1::2])


@pytest.fixture
def learn() -> Callable[..., FeatureGate]:
    """Fit a gate on a task for each two columns: ``learn(gate, features, columns)``."""

    def fit(
        gate: FeatureGate, x: Tensor, y: Tensor, tasks: Sequence[int] | None = None, size: int = 2
    ) -> FeatureGate:
        for number in range((int(y.max()) + 1) // size) if tasks is None else tasks:
            own = make_task(number, (size * number, size * number + size))
            mine = (y >= own.columns[0]) & (y < own.columns[1])
            features, columns = x[mine], y[mine]
            held = draw_held_out(torch.arange(len(columns)), gate.held_out)
            gate.add(own, features, columns, held)
            trial = gate.trial_rows() if gate.held_out else None
            gate.finish(None if trial is None else gate.calibrate(trial, features[held]))
        return gate

    return fit
