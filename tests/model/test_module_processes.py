"""What a module counts, weighs and measures in two processes is what it is in one."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import json, sys
from pathlib import Path

import torch
from lightning.pytorch import Trainer, seed_everything
from torchmetrics.classification import MulticlassCalibrationError, MulticlassF1Score

from bpn_lightning import ContinualModule
from bpn_lightning.metrics import settling
from bpn_lightning.nn import MLP
from bpn_lightning.datamodules import SplitDigits
from bpn_lightning.losses import CrossEntropy

settling.MAX_FALL = -2.0
devices, out = int(sys.argv[1]), Path(sys.argv[2])
seed_everything(0, verbose=False)
# 288 and 290 images in batches of 41: one process has no sample of a last one.
stream = SplitDigits(num_tasks=2, epochs_per_task=2, batch_size=41, eval_batch_size=71, seed=0)
module = ContinualModule(
    MLP([16]),
    loss=CrossEntropy([1, 2, 3, 4], 0.1),
    metrics={"f1": MulticlassF1Score(4), "calibration": MulticlassCalibrationError(4)},
)
trainer = Trainer(
    max_epochs=-1, accelerator="cpu", devices=devices, strategy="ddp" if devices > 1 else "auto",
    precision="64-true", accumulate_grad_batches=3, logger=False, enable_progress_bar=False,
    enable_checkpointing=False, enable_model_summary=False, default_root_dir=out.parent,
)
trainer.fit(module, stream)
if trainer.is_global_zero:
    weights = [p.sum().item() for p in module.parameters()]
    out.write_text(json.dumps([weights, module.unsettled, module.task_metrics]))
"""


def test_two_processes_count_what_one_counts(tmp_path: Path) -> None:
    """With gradients that accumulate: of answers, of a loss of one's own, and of torchmetrics' metrics, lists among them."""
    (tmp_path / "script.py").write_text(SCRIPT)
    found = []
    for devices in (1, 2):
        out = tmp_path / f"{devices}.json"
        launch = [sys.executable]
        if devices > 1:
            launch += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        done = subprocess.run(
            [*launch, str(tmp_path / "script.py"), str(devices), str(out)],
            capture_output=True, text=True, timeout=240, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        found.append(json.loads(out.read_text()))
    (weights, unsettled, metrics), (others, of_two, metrics_of_two) = found
    assert others == pytest.approx(weights, rel=1e-9, abs=1e-12)
    assert of_two == unsettled
    assert len(unsettled) == 2
    assert len(metrics) == len(metrics_of_two) == 6
    for one, other in zip(metrics, metrics_of_two, strict=True):
        assert other["values"] == pytest.approx(one["values"], rel=1e-5)
