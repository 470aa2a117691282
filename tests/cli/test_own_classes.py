"""Modules of the current folder: found where a user types their names, as a console script finds none."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from commands import run_script

from bpn_lightning.cli.trust import find_here

pytestmark = pytest.mark.slow

NET = "from torch import nn\n\n\nclass Net(nn.Sequential):\n    def __init__(self) -> None:\n"
NET += "        super().__init__(nn.Flatten(), nn.LazyLinear(3))\n"
TRAP = "from pathlib import Path\nPath('trapped').touch()\n"
FIT = Path(sys.executable).with_name("bpn-fit")
LINE = (
    "--config digits_inc.yaml --method finetune --data.num_tasks 1 --data.epochs_per_task 1 --quiet"
)


def test_a_process_finds_what_is_typed_and_nothing_else_of_the_folder(tmp_path: Path) -> None:
    """Without the tests' PYTHONSAFEPATH; the folder holds files named like modules that a run imports."""
    (tmp_path / "nets.py").write_text("from parts import Net\n")
    (tmp_path / "parts.py").write_text(NET)
    for name in ("yaml", "json", "torch", "lightning", "bpn_lightning", "random", "tensorboardX"):
        (tmp_path / f"{name}.py").write_text(TRAP)
    (tmp_path / "x.yaml").write_text("model: {backbone: nets.Net}")
    inherited = {key: value for key, value in os.environ.items() if key != "PYTHONSAFEPATH"}

    line = [str(FIT), *LINE.split(), "--trainer.accelerator", "cpu"]
    named_by_file = run_script([*line, "--config", "x.yaml"], cwd=tmp_path, env=inherited)
    assert named_by_file.returncode == 2
    assert "needs no trust, but got 'nets.Net'" in named_by_file.stderr
    typed = subprocess.run(  # whose imports of torch and Lightning pass the folder, too
        [*line, "--model.backbone", "nets.Net"],
        cwd=tmp_path,
        env=inherited,
        check=False,
        capture_output=True,
        text=True,
    )
    assert typed.returncode == 0, typed.stderr
    assert (tmp_path / "runs/digits_inc/finetune/seed_0/results.json").is_file()
    assert not (tmp_path / "trapped").exists()


@pytest.mark.parametrize(
    ("tops", "added"),
    [
        (["mine"], True),
        (["a_package"], True),
        (["nowhere"], False),
        (["json"], False),
        (["colorsys"], False),
        ([], False),
    ],
)
def test_the_folder_comes_last_and_only_for_what_is_nowhere_else(
    tops: list[str], added: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in ("mine", "json", "colorsys"):  # the last one is nothing that tests have imported
        Path(f"{name}.py").touch()
    Path("a_package").mkdir()
    before = list(sys.path)
    find_here(tops)
    assert sys.path == before + [str(tmp_path)] * added
