"""Two processes learn what one learns, whatever is averaged, exchanged or learned together."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from fits import trainer_of
from lightning.pytorch import seed_everything
from torch import nn

from bpn_lightning.datamodules.base import ContinualDataModule
from bpn_lightning.datamodules.digits import SplitDigits
from bpn_lightning.datamodules.own_data import SplitArrays
from bpn_lightning.model.module import ContinualModule
from bpn_lightning.nn.backbones import MLP
from bpn_lightning.strategies.base import ContinualStrategy
from bpn_lightning.strategies.finetune import FineTuning
from bpn_lightning.strategies.gem import GradientEpisodicMemory
from bpn_lightning.strategies.imm import IncrementalMomentMatching
from bpn_lightning.strategies.joint import JointTraining
from bpn_lightning.strategies.lwf import LearningWithoutForgetting
from bpn_lightning.strategies.stl import IndependentNetworks


def batch_norm_net() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.BatchNorm1d(16), nn.ReLU())


def embedding() -> nn.Module:
    # Drawn when the head is: Lightning seeds again where it has several processes.
    vectors = torch.eye(10)[:, :4] + torch.arange(40).view(10, 4) / 40
    return nn.Sequential(nn.Embedding.from_pretrained(vectors, freeze=False), MLP([16]))


def arrays(kind: str) -> SplitArrays:
    # 61 samples of each task in batches of 12: shards of 6, and a last batch of 13.
    generator = np.random.default_rng(0)
    made = {}
    for part, count in (("train", 122), ("test", 40)):
        made[f"{part}_labels"] = labels = np.arange(count) % 4
        tokens = (2 * labels[:, None] + generator.integers(3, size=(count, 6))) % 10
        given = tokens if kind == "tokens" else tokens + generator.random((count, 6))
        made[f"{part}_{kind}"] = given
    return SplitArrays(made, epochs_per_task=2, batch_size=12, eval_batch_size=11)


def digits(augment: bool = True) -> SplitDigits:
    # 287 samples in batches of 33: shards of 17 and 16, and a last batch of 23.
    return SplitDigits(
        num_tasks=2, epochs_per_task=2, batch_size=33, eval_batch_size=101, augment=augment
    )


@dataclass(frozen=True)
class Case:
    strategy: Callable[[], ContinualStrategy]
    mask: str = "all"
    backbone: Callable[[], nn.Module] = lambda: MLP([16, 16])
    stream: Callable[[], ContinualDataModule] = digits


CASES = {
    "joint_all": Case(JointTraining),
    "joint_task": Case(JointTraining, mask="task"),
    # The teacher logits are recorded.
    "lwf": Case(LearningWithoutForgetting, stream=lambda: digits(augment=False)),
    "stl": Case(IndependentNetworks),
    "mean": Case(lambda: IncrementalMomentMatching("mean", 0.1)),
    "mode": Case(lambda: IncrementalMomentMatching("mode", 0.1, fisher="empirical"), mask="task"),
    "tokens": Case(
        lambda: GradientEpisodicMemory(16), backbone=embedding, stream=lambda: arrays("tokens")
    ),
    "features": Case(lambda: GradientEpisodicMemory(16), stream=lambda: arrays("features")),
    # Not what one process learns: each normalizes its own shard of a batch.
    "norm_tuned": Case(FineTuning, backbone=batch_norm_net),
    "norm_stl": Case(IndependentNetworks, backbone=batch_norm_net),
    "norm_mean": Case(lambda: IncrementalMomentMatching("mean"), backbone=batch_norm_net),
    "norm_sampled": Case(
        lambda: IncrementalMomentMatching("mode", fisher="sampled"), backbone=batch_norm_net
    ),
}
EQUAL = [name for name in CASES if not name.startswith("norm")]


def learn(name: str, devices: int) -> list[dict[str, Any]]:
    """The states of the module and of the strategy, the weights of tasks, and what a test measures."""
    case = CASES[name]
    seed_everything(0, verbose=False)
    strategy, stream = case.strategy(), case.stream()
    module = ContinualModule(
        case.backbone(), mask=case.mask, optimizer=lambda p: torch.optim.SGD(p, lr=0.05)
    )
    trainer = trainer_of(devices, [strategy])
    trainer.fit(module, stream)
    (tested,) = trainer.test(module, stream, verbose=False)
    weights = dict(module.host.training_weights)
    return [dict(module.network.state_dict()), strategy.state_dict(), weights, dict(tested)]


@pytest.fixture(scope="module")
def learned(ranks: Any) -> Callable[[str], list[Any]]:
    """What each of two ranks has learned."""
    return cache(lambda name: ranks(learn, name, 2))


@pytest.mark.parametrize("name", EQUAL)
def test_two_processes_learn_what_one_learns(learned: Any, name: str) -> None:
    torch.testing.assert_close(
        learned(name)[0], learn(name, 1), rtol=1e-5, atol=1e-6, equal_nan=True
    )


@pytest.mark.parametrize("name", CASES)
def test_processes_agree_bit_for_bit(learned: Any, same: Any, name: str) -> None:
    """Running statistics too, which every process gathers from its own shard."""
    first, second = learned(name)
    same(second, first)


@pytest.mark.parametrize("name", CASES)
def test_the_last_row_is_what_testing_gives(learned: Any, name: str) -> None:
    parts, _, _, tested = learned(name)[0]
    found = [tested[f"test/accuracy/task_{task}"] for task in (1, 2)]
    assert found == pytest.approx(parts["accuracy_matrix.accuracy"][-1].tolist(), abs=1e-7)
