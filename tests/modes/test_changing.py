"""One process changes a bundle at a time, and one that is killed leaves no lock and no half of a task."""

import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from waiting import PATIENCE

from bpn_lightning.cli.bundle import main
from bpn_lightning.datamodules import SplitDigits
from bpn_lightning.errors import CheckpointError, ResultsError
from bpn_lightning.export.exporting import export_module
from bpn_lightning.modes import load
from bpn_lightning.modes.bundle import read_bundle
from bpn_lightning.modes.changing import changing, replace_files
from bpn_lightning.strategies import BeneficialPerturbation

# Begins to change the bundle in another process, and never ends.
WRITE = """
import sys
from pathlib import Path
from bpn_lightning.modes.changing import changing
folder = Path(sys.argv[1])
with changing(folder):
    (folder / "tasks" / ".1.tmp").mkdir()
    (folder / "tasks" / ".1.tmp" / "adapter_config.json").write_text("{")
    print("writing", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def bundle(fit: Callable[..., Any], tmp_path: Path) -> Path:
    stream = SplitDigits(num_tasks=2, epochs_per_task=1, batch_size=64, seed=0)
    module, _ = fit([BeneficialPerturbation(4)], stream=stream, mask="seen")
    return export_module(module.eval(), tmp_path / "out", names=["a", "b"])


@pytest.mark.slow
def test_a_writer_is_killed(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", WRITE, str(bundle)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "writing\n"
        with pytest.raises(ResultsError, match=f"but process {other.pid} on "), changing(bundle, 0):
            pass
        assert load(bundle).tasks == ["a", "b"]  # reading needs no lock
        monkeypatch.setattr("bpn_lightning.modes.changing.WAIT", 0.0)
        other.kill()
        other.wait(PATIENCE)
    assert main(["remove", str(bundle), "a"]) == 0
    assert [path.name for path in (bundle / "tasks").iterdir()] == ["b"]
    assert not (bundle / ".lock").exists()


def test_a_second_writer_waits(bundle: Path) -> None:
    begun, done = threading.Event(), []

    def write() -> None:
        with changing(bundle):
            begun.set()
            time.sleep(0.3)
            done.append("first")

    thread = threading.Thread(target=write)
    thread.start()
    assert begun.wait(PATIENCE)
    with changing(bundle):
        done.append("second")
    thread.join()
    assert done == ["first", "second"]


def test_there_has_to_be_a_bundle(tmp_path: Path) -> None:
    with (
        pytest.raises(CheckpointError, match="nowhere to be a bundle"),
        changing(tmp_path / "nowhere"),
    ):
        pass
    assert not (tmp_path / "nowhere").exists()


def test_files_are_replaced_at_once(bundle: Path) -> None:
    """Who has read config.json finds the files that it names, also after the next one is there."""
    first = read_bundle(bundle)
    old = first.files["accuracy.safetensors"]
    for number in (1.0, 2.0):
        with changing(bundle):
            new = {name: torch.full_like(value, number) for name, value in old.items()}
            replace_files(bundle, read_bundle(bundle), {"accuracy.safetensors": new}, seed=4)
        found = read_bundle(bundle)
        assert found.record["seed"] == 4
        assert all(v.eq(number).all() for v in found.files["accuracy.safetensors"].values())
    assert len([*bundle.glob("accuracy*")]) == 2
    with changing(bundle):
        pass
    assert len([*bundle.glob("accuracy*")]) == 1
    assert load(bundle).tasks == ["a", "b"]
