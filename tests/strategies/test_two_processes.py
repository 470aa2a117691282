"""Two processes learn what one learns, whatever is averaged, exchanged or learned together."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

SCRIPT = """
import sys
import numpy as np
import torch
from lightning.pytorch import Trainer, seed_everything
from torch import nn
from bpn_lightning import ContinualModule
from bpn_lightning.nn import MLP
from bpn_lightning.datamodules import SplitArrays, SplitDigits
from bpn_lightning.strategies.finetune import FineTuning
from bpn_lightning.strategies.gem import GradientEpisodicMemory
from bpn_lightning.strategies.imm import IncrementalMomentMatching
from bpn_lightning.strategies.stl import IndependentNetworks
from bpn_lightning.strategies.joint import JointTraining
from bpn_lightning.strategies.lwf import LearningWithoutForgetting

devices, folder = int(sys.argv[1]), sys.argv[2]

def normalising():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.BatchNorm1d(16), nn.ReLU())

def plain():
    return MLP([16, 16])

def embedding():
    # Drawn when the head is: Lightning seeds again where it has several processes.
    vectors = torch.eye(10)[:, :4] + torch.arange(40).view(10, 4) / 40
    return nn.Sequential(nn.Embedding.from_pretrained(vectors, freeze=False), MLP([16]))

def arrays(kind):
    # 61 samples of each task in batches of 12: shares of 6, and a last batch of 13.
    generator = np.random.default_rng(0)
    made = {}
    for part, count in (("train", 122), ("test", 40)):
        made[f"{part}_labels"] = labels = np.arange(count) % 4
        tokens = (2 * labels[:, None] + generator.integers(3, size=(count, 6))) % 10
        made[f"{part}_{kind}"] = tokens if kind == "tokens" else tokens + generator.random((count, 6))
    return SplitArrays(made, epochs_per_task=2, batch_size=12, eval_batch_size=11)

def run(name, strategy, mask="all", backbone=plain, augment=True, stream=None):
    seed_everything(0)
    # 287 samples in batches of 33: shares of 17 and 16, and a last batch of 23.
    stream = stream or SplitDigits(
        num_tasks=2, epochs_per_task=2, batch_size=33, eval_batch_size=101, augment=augment
    )
    module = ContinualModule(backbone(), mask=mask, optimizer=lambda p: torch.optim.SGD(p, lr=0.05))
    trainer = Trainer(
        max_epochs=-1, accelerator="cpu", devices=devices,
        strategy="ddp" if devices > 1 else "auto", callbacks=[strategy], logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=folder,
    )
    trainer.fit(module, stream)
    (tested,) = trainer.test(module, stream, verbose=False)
    state = [module.state_dict(), strategy.state_dict(), dict(module.training_weights), tested]
    torch.save(state, f"{folder}/{name}_{devices}_{trainer.global_rank}.pt")

run("joint_all", JointTraining())
run("joint_task", JointTraining(), mask="task")
run("lwf", LearningWithoutForgetting(), augment=False)  # what the teacher says is recorded
run("stl", IndependentNetworks())
run("mean", IncrementalMomentMatching("mean", 0.1))
run("mode", IncrementalMomentMatching("mode", 0.1, fisher="empirical"), mask="task")
run("tokens", GradientEpisodicMemory(16), backbone=embedding, stream=arrays("tokens"))
run("features", GradientEpisodicMemory(16), stream=arrays("features"))
# Not what one process learns: each normalises its own share of a batch.
run("norm_tuned", FineTuning(), backbone=normalising)
run("norm_stl", IndependentNetworks(), backbone=normalising)
run("norm_mean", IncrementalMomentMatching("mean"), backbone=normalising)
run("norm_sampled", IncrementalMomentMatching("mode", fisher="sampled"), backbone=normalising)
"""
EQUAL = ("joint_all", "joint_task", "lwf", "stl", "mean", "mode", "tokens", "features")
OTHERS = ("norm_tuned", "norm_stl", "norm_mean", "norm_sampled")


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


def state(folder: Path, name: str) -> Any:
    return torch.load(folder / f"{name}.pt", weights_only=True)


@pytest.mark.parametrize("name", EQUAL)
def test_two_processes_learn_what_one_learns(folder: Path, name: str) -> None:
    torch.testing.assert_close(
        state(folder, f"{name}_2_0"), state(folder, f"{name}_1_0"),
        rtol=1e-5, atol=1e-6, equal_nan=True,
    )  # fmt: skip


@pytest.mark.parametrize("name", EQUAL + OTHERS)
def test_processes_agree_bit_for_bit(folder: Path, name: str) -> None:
    """Running statistics too, which every process gathers from its own share."""
    torch.testing.assert_close(
        state(folder, f"{name}_2_1"), state(folder, f"{name}_2_0"), rtol=0, atol=0, equal_nan=True
    )


@pytest.mark.parametrize("name", EQUAL + OTHERS)
def test_the_last_row_is_what_testing_gives(folder: Path, name: str) -> None:
    parts, _, _, tested = state(folder, f"{name}_2_0")
    found = [tested[f"test/accuracy/task_{task}"] for task in (1, 2)]
    assert found == pytest.approx(parts["accuracy_matrix.accuracy"][-1].tolist(), abs=1e-7)
