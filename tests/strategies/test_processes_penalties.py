"""Penalties of two processes are those of one; stopped and resumed, those of never stopped."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fits import trainer_of
from lightning.pytorch import Callback, seed_everything
from torch import nn

from bpn_lightning.datamodules.digits import SplitDigits
from bpn_lightning.model.module import ContinualModule
from bpn_lightning.nn.backbones import MLP
from bpn_lightning.strategies.ewc import EWC
from bpn_lightning.strategies.mas import MemoryAwareSynapses
from bpn_lightning.strategies.si import SynapticIntelligence

LEARNED: dict[str, tuple[Callable[[], Any], str]] = {
    "online": (lambda: EWC(20.0, gamma=0.7, fisher="exact"), "all"),
    "sampled": (lambda: EWC(20.0, fisher="sampled"), "all"),
    "si": (lambda: SynapticIntelligence(2.0), "all"),
    "si_task": (lambda: SynapticIntelligence(2.0, update="proximal", include_head=True), "task"),
    "mas": (lambda: MemoryAwareSynapses(0.1), "task"),
}


def learn(name: str, devices: int) -> list[dict[str, Any]]:
    """The network's weights, and the strategy's state."""
    seed_everything(0, verbose=False)
    make, mask = LEARNED[name]
    strategy = make()
    # 287 samples in batches of 33: shards of 17 and 16, and a last batch of 23.
    stream = SplitDigits(
        num_tasks=2, epochs_per_task=2, batch_size=33, eval_batch_size=101, augment=True
    )
    module = ContinualModule(
        MLP([16, 16]), mask=mask, optimizer=lambda p: torch.optim.SGD(p, lr=0.05)
    )
    trainer = trainer_of(devices, [strategy])
    trainer.fit(module, stream)
    weights = {n: v for n, v in module.network.state_dict().items() if not n.startswith("accuracy")}
    return [weights, strategy.state_dict()]


@pytest.mark.parametrize("name", LEARNED)
def test_two_processes_learn_and_remember_what_one_does(ranks: Any, name: str, same: Any) -> None:
    one, (two, other) = learn(name, 1), ranks(learn, name, 2)
    same(two, other)
    assert one[1]["importance"]["backbone.1.weight"].any()
    # An importance of SI is a quotient of small numbers.
    torch.testing.assert_close(two, one, rtol=2e-3, atol=2e-5)


class SaveEverywhere(Callback):
    """A checkpoint after every batch and every epoch."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.paths = folder, list[Path]()

    def save(self, trainer: Any) -> None:
        self.paths.append(self.folder / f"{len(self.paths)}.ckpt")
        trainer.save_checkpoint(self.paths[-1])

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        self.save(trainer)

    def on_train_epoch_end(self, trainer: Any, *_: Any) -> None:
        self.save(trainer)


MADE = {
    "online": lambda: EWC(20.0, gamma=0.7, update="gradient", fisher="sampled"),
    "si": lambda: SynapticIntelligence(2.0),
    "mas": lambda: MemoryAwareSynapses(0.01),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MADE)
def test_resuming_anywhere_changes_nothing(fit: Any, tmp_path: Path, same: Any, name: str) -> None:
    def run(*more: Callback, **options: Any) -> list[Any]:
        strategy = MADE[name]()
        module, _ = fit(
            [strategy, *more],
            stream=SplitDigits(num_tasks=3, epochs_per_task=1, batch_size=128, seed=0),
            optimizer=lambda parameters: torch.optim.Adam(parameters, lr=0.01),
            backbone=nn.Sequential(
                nn.Flatten(), nn.Linear(64, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Dropout(0.2)
            ),
            **options,
        )
        return [module.network.state_dict(), strategy.state_dict()]

    saves = SaveEverywhere(tmp_path)
    reference = run(saves)
    assert len(saves.paths) == 12
    for path in saves.paths:
        same(run(seed=9, ckpt_path=path), reference)
