"""Two processes learn what one learns, on batches that do not divide evenly."""

import json
import subprocess
import sys

import pytest

SCRIPT = """
import json, sys
import torch
from lightning.pytorch import Trainer, seed_everything
from bpn_lightning import ContinualModule
from bpn_lightning.backbones import MLP
from bpn_lightning.datamodules import SplitDigits
from bpn_lightning.strategies import EWC, BeneficialPerturbation

devices, mask, folder = int(sys.argv[1]), sys.argv[2], sys.argv[3]
seed_everything(0)
# 287 samples in batches of 33: shares of 17 and 16, and a last batch of 23.
stream = SplitDigits(num_tasks=2, epochs_per_task=2, batch_size=33, eval_batch_size=101, augment=True)
module = ContinualModule(
    MLP([16, 16]), mask=mask, optimizer=lambda p: torch.optim.SGD(p, lr=0.05)
)
ewc = EWC(100.0)
trainer = Trainer(
    max_epochs=-1, accelerator="cpu", devices=devices, strategy="ddp" if devices > 1 else "auto",
    callbacks=[BeneficialPerturbation(8), ewc], logger=False, enable_checkpointing=False,
    enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder,
)
trainer.fit(module, stream)
mine = {name: value.double().flatten().tolist() for name, value in module.state_dict().items()
        if isinstance(value, torch.Tensor)}
mine |= {"importance " + k: v.double().flatten().tolist() for k, v in ewc.penalty.importance.items()}
with open(f"{folder}/{devices}_{trainer.global_rank}.json", "w") as file:
    json.dump(mine, file)
"""


@pytest.mark.parametrize("mask", ["all", "task"])
def test_two_processes_equal_one(tmp_path, mask):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    for devices in ("1", "2"):
        command = [sys.executable, str(script), devices, mask, str(tmp_path)]
        run = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
        assert run.returncode == 0, run.stderr
    one, two, other = (
        json.loads((tmp_path / f"{name}.json").read_text()) for name in ("1_0", "2_0", "2_1")
    )
    as_text = [json.dumps(values, sort_keys=True) for values in (two, other)]
    assert as_text[0] == as_text[1], "ranks must agree bit for bit"
    assert one.keys() == two.keys()
    for name, values in one.items():
        assert two[name] == pytest.approx(values, rel=1e-5, abs=1e-6, nan_ok=True), name
