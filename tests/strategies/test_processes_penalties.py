"""Penalties of two processes are those of one; stopped and resumed, those of never stopped."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from torch import nn

from bpn_lightning.datamodules.digits import SplitDigits
from bpn_lightning.strategies.ewc import EWC
from bpn_lightning.strategies.mas import MemoryAwareSynapses
from bpn_lightning.strategies.si import SynapticIntelligence

SCRIPT = """
import sys
import torch
from lightning.pytorch import Trainer, seed_everything
from bpn_lightning import ContinualModule
from bpn_lightning.nn import MLP
from bpn_lightning.datamodules import SplitDigits
from bpn_lightning.strategies.ewc import EWC
from bpn_lightning.strategies.mas import MemoryAwareSynapses
from bpn_lightning.strategies.si import SynapticIntelligence

devices, folder = int(sys.argv[1]), sys.argv[2]

def run(name, strategy, mask="all"):
    seed_everything(0)
    # 287 samples in batches of 33: shares of 17 and 16, and a last batch of 23.
    stream = SplitDigits(
        num_tasks=2, epochs_per_task=2, batch_size=33, eval_batch_size=101, augment=True
    )
    module = ContinualModule(
        MLP([16, 16]), mask=mask, optimizer=lambda p: torch.optim.SGD(p, lr=0.05)
    )
    trainer = Trainer(
        max_epochs=-1, accelerator="cpu", devices=devices,
        strategy="ddp" if devices > 1 else "auto", callbacks=[strategy], logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=folder,
    )
    trainer.fit(module, stream)
    weights = {n: v for n, v in module.state_dict().items() if not n.startswith("accuracy")}
    torch.save([weights, strategy.state_dict()], f"{folder}/{name}_{devices}_{trainer.global_rank}.pt")

run("online", EWC(20.0, gamma=0.7, fisher="exact"))
run("sampled", EWC(20.0, fisher="sampled"))
run("si", SynapticIntelligence(2.0))
run("si_task", SynapticIntelligence(2.0, update="proximal", include_head=True), mask="task")
run("mas", MemoryAwareSynapses(0.1), mask="task")
"""
RUNS = ("online", "sampled", "si", "si_task", "mas")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("processes")
    script = folder / "script.py"
    script.write_text(SCRIPT)
    for devices in ("1", "2"):
        command = [sys.executable, str(script), devices, str(folder)]
        run = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
        assert run.returncode == 0, run.stderr
    return folder


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_learn_and_remember_what_one_does(folder: Path, name: str, same: Any) -> None:
    one, two, other = (
        torch.load(folder / f"{name}_{which}.pt", weights_only=True)
        for which in ("1_0", "2_0", "2_1")
    )
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
        return [module.state_dict(), strategy.state_dict()]

    saves = SaveEverywhere(tmp_path)
    reference = run(saves)
    assert len(saves.paths) == 12
    for path in saves.paths:
        same(run(seed=9, ckpt_path=path), reference)
