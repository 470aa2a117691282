"""Bundles to serve."""

import shutil
from pathlib import Path

import pytest
import torch

NAMES = ["low", "middle", "high"]


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of three tasks of digits."""
    from fits import trainer_of

    from bpn_lightning import ContinualModule
    from bpn_lightning.datamodules import SplitDigits
    from bpn_lightning.export.exporting import export_module
    from bpn_lightning.nn import MLP
    from bpn_lightning.strategies import BeneficialPerturbation

    folder = tmp_path_factory.mktemp("trained")
    torch.manual_seed(0)
    module = ContinualModule(MLP([16, 16]), mask="task")
    trainer = trainer_of(1, [BeneficialPerturbation(4)], default_root_dir=folder)
    trainer.fit(module, SplitDigits(num_tasks=3, epochs_per_task=1, batch_size=64, seed=0))
    return export_module(module.eval(), folder / "out", names=NAMES)


@pytest.fixture
def bundle(trained: Path, tmp_path: Path) -> Path:
    """A copy, to be changed."""
    return Path(shutil.copytree(trained, tmp_path / "bundle"))
