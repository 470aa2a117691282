"""`bpn-bundle` adds, removes and checks tasks; what is left answers as before."""

import errno
import json
import os
import shutil
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
from fits import trainer_of
from safetensors.torch import load_file, save_file

from bpn_lightning.cli.bundle import main
from bpn_lightning.datamodules import SplitDigits
from bpn_lightning.errors import CheckpointError
from bpn_lightning.export.exporting import export_module, load_exported
from bpn_lightning.modes import load
from bpn_lightning.modes.exporters import write_onnx, write_peft
from bpn_lightning.nn import MLP
from bpn_lightning.strategies import (
    SLDA,
    BeneficialPerturbation,
    GradientEpisodicMemory,
    NearestClassMean,
)

Said = pytest.CaptureFixture[str]
IMAGES = torch.arange(64, dtype=torch.uint8).view(1, 1, 8, 8)


@pytest.fixture
def made(fit: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    stream = SplitDigits(num_tasks=3, epochs_per_task=1, batch_size=64, seed=0)
    module, _ = fit([BeneficialPerturbation(4)], stream=stream, mask="seen")
    export_module(module.eval(), "out", names=["a", "b", "c"])
    shutil.copytree("out", "copy")


def test_a_task_is_removed_and_added_again(made: None, capsys: Said) -> None:
    before = load("out")(IMAGES, task="a")
    assert main(["remove", "out", "b"]) == 0
    assert load("out").tasks == ["a", "c"]
    assert "| b |" not in Path("out/README.md").read_text()
    module = load_exported("out", MLP([16, 16]))
    assert module.network.structure.forgotten == [1]
    assert module.network.head is not None
    assert module.network.head.weight[2:4].eq(0).all()
    torch.testing.assert_close(module.predict(IMAGES, task=0), load("out")(IMAGES, task="a"))
    assert main(["add", "out", "copy/tasks/b", "--name", "again"]) == 0
    assert "| again | 1 | 2, 3 |" in Path("out/README.md").read_text()
    torch.testing.assert_close(load("out")(IMAGES, task="a"), before)
    assert load_exported("out", MLP([16, 16])).network.structure.forgotten == []
    capsys.readouterr()
    assert main(["check", "out"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].startswith("again: task 1, 2 classes, ")
    assert lines[-1] == "every file is the one that was written, and fits the network"


def test_a_task_is_removed_twice(made: None) -> None:
    Path("out/tasks/.1.removed/rest").mkdir(parents=True)  # of a process that was killed
    assert main(["remove", "out", "b"]) == 0
    assert main(["add", "out", "copy/tasks/b"]) == 0
    assert main(["remove", "out", "b"]) == 0
    assert load_exported("out", MLP([16, 16])).network.structure.forgotten == [1]


def test_a_training_state_is_of_the_tasks_that_there_are(
    fit: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Said
) -> None:
    monkeypatch.chdir(tmp_path)
    stream = SplitDigits(num_tasks=2, epochs_per_task=1, batch_size=64, seed=0)
    module, _ = fit([GradientEpisodicMemory(5)], stream=stream, mask="seen")
    export_module(module.eval(), "out", training_state=True)
    assert main(["check", "out"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[3] == f"training state of gem: {2 * 5 * (64 + 8):,} bytes"
    shutil.copytree("out", "copy")
    assert main(["remove", "out", "task_2"]) == 0
    assert "training_state is removed, as it was of the tasks before" in capsys.readouterr().out
    assert not Path("out/training_state").exists()
    assert "samples of the training data" not in Path("out/README.md").read_text()
    (path,) = Path("copy/training_state").glob("*.safetensors")
    path.write_bytes(path.read_bytes()[:-1])
    assert main(["check", "copy"]) == 2
    assert "truncated or changed" in capsys.readouterr().err


def test_a_task_that_does_not_fit_is_not_added(made: None, capsys: Said) -> None:
    path = Path("copy/tasks/b/adapter_model.safetensors")
    save_file({**load_file(path), "head.weight": torch.zeros(2, 5)}, path)
    record = json.loads(path.with_name("adapter_config.json").read_text())
    content = path.read_bytes()
    record["files"][path.name] = {"bytes": len(content), "sha256": sha256(content).hexdigest()}
    path.with_name("adapter_config.json").write_text(json.dumps(record))
    assert main(["remove", "out", "b"]) == 0
    capsys.readouterr()
    assert main(["add", "out", "copy/tasks/b"]) == 2
    assert "Expected copy/tasks/b to be the folder of a task" in capsys.readouterr().err
    assert load("out").tasks == ["a", "c"]


def test_names_that_are_no_text_or_no_code(made: None, capsys: Said) -> None:
    Path("out/tasks/a").rename('out/tasks/a"); quit("')
    assert main(["card", "out"]) == 0
    assert 'task="a\\"); quit(\\"")' in Path("out/README.md").read_text()
    Path("out/tasks/b").rename(os.fsdecode(b"out/tasks/b\xff"))
    capsys.readouterr()
    assert main(["check", "out"]) == 2
    assert "Expected the name of a task to be the name of a folder" in capsys.readouterr().err


def test_the_card_is_written_anew(made: None) -> None:
    Path("out/README.md").write_text("mine")
    assert main(["card", "out"]) == 0
    assert Path("out/README.md").read_bytes() == Path("copy/README.md").read_bytes()


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (["remove", "out", "d"], "Expected task to be one of a, b, c, but got 'd'."),
        (["add", "out", "copy/tasks/b"], "but 'b' has the name 'b'"),
        (["add", "out", "copy/tasks/b", "--name", "d"], "but 'b' has the ID 1"),
        (["add", "out", "copy/tasks/d"], "FileNotFoundError"),
        (["add", "out", "damaged"], "truncated or changed"),
        (["check", "nowhere"], "Expected nowhere to be a bundle of bpn-export"),
    ],
)
def test_what_is_refused(line: list[str], said: str, made: None, capsys: Said) -> None:
    shutil.copytree("out/tasks/b", "damaged")
    path = Path("damaged/adapter_model.safetensors")
    path.write_bytes(path.read_bytes()[:-1])
    capsys.readouterr()
    assert main(line) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert said in lines[0]
    assert {p.name for p in Path("out/tasks").iterdir()} == {"a", "b", "c"}


@pytest.mark.parametrize("verb", ["card", "check", "remove"])
@pytest.mark.parametrize(
    "lie",
    [
        [],
        {"files": []},
        {"strategies": 5},
        {"gates": None},
        {"gates": [{"kind": "ncm", "arguments": {"name": "ncm"}, "together": False, "state": 5}]},
    ],
)
def test_a_record_that_a_stranger_made_up(lie: Any, verb: str, made: None, capsys: Said) -> None:
    """One line, whatever is in it; nothing changes."""
    path = Path("out/config.json")
    record = json.loads(path.read_text())
    path.write_text(json.dumps({**record, **lie} if isinstance(lie, dict) else lie))
    capsys.readouterr()
    assert main([verb, "out", *(["b"] if verb == "remove" else [])]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "Expected out to be a bundle of bpn-export" in line
    assert Path("out/tasks/b").is_dir()


def test_a_full_disk_leaves_no_lock(
    made: None, capsys: Said, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even the words about its holder can be written: what comes next must not wait for itself."""

    def full(*_: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        patch.setattr(os, "fsync", full)
        assert main(["card", "out"]) == 2
    assert "No space left on device" in capsys.readouterr().err
    assert not Path("out/.lock").exists()
    assert main(["card", "out"]) == 0


def test_a_name_that_leads_out_of_the_folder(made: None, capsys: Said) -> None:
    assert main(["remove", "out", "b"]) == 0
    capsys.readouterr()
    for name in ("../b", ".b", "b/c", ".."):
        assert main(["add", "out", "copy/tasks/b", "--name", name]) == 2
        assert "Expected the name of a task" in capsys.readouterr().err
    assert main(["remove", "out", "../../copy"]) == 2
    assert Path("copy/config.json").is_file()


def test_one_task_stays_and_gates_that_are_solved_together_too(
    fit: Callable[..., Any], tmp_path: Path, capsys: Said
) -> None:
    module, _ = fit([SLDA()])
    folder = export_module(module.eval(), tmp_path / "out")
    shutil.copytree(folder / "tasks" / "task_2", tmp_path / "task_2")
    assert main(["remove", str(folder), "task_2"]) == 0
    assert main(["add", str(folder), str(tmp_path / "task_2")]) == 2
    assert "are solved for all tasks together" in capsys.readouterr().err
    assert main(["remove", str(folder), "task_1"]) == 2
    assert "Expected task not to be the only one" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore:The stream has no data of tasks 1 to 2")
def test_a_task_brings_the_temperature_of_all_tasks_along(
    fit: Callable[..., Any], tmp_path: Path, capsys: Said, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That of the run, which learned them all; where only the task's folder is there, the old one, and the card says so."""
    monkeypatch.chdir(tmp_path)
    frozen = {"train": "modes", "train_first": "all", "mask": "seen", "backbone": MLP([16])}
    strategies = [BeneficialPerturbation(4), NearestClassMean(modes=2)]
    past = SplitDigits(num_tasks=2, epochs_per_task=1, batch_size=64, seed=0)
    module, _ = fit(strategies, stream=past, **frozen)
    export_module(module.eval(), "out", names=["a", "b"])
    for name in ("alone", "removed"):
        shutil.copytree("out", name)
    module.train().extend(new := SplitDigits(class_order=[4, 5], epochs_per_task=1, batch_size=64))
    trainer_of(1, strategies).fit(module, new)
    export_module(module.eval(), "whole", names=["a", "b", "c"])
    images = torch.randint(256, (40, 1, 8, 8)).byte()
    wanted = load("whole").predict(images)
    assert json.loads(Path("out/config.json").read_text())["gates"][0]["calibrated"] == [0, 1]

    capsys.readouterr()
    assert main(["add", "out", "whole/tasks/c"]) == 0
    assert capsys.readouterr().out == "out/tasks/c\n"
    assert load("out").predict(images) == wanted
    assert "temperature" not in Path("out/README.md").read_text()

    shutil.copytree("whole/tasks/c", "c")
    assert main(["add", "alone", "c"]) == 0
    said = "the temperature of ncm was not chosen with c"
    assert said in capsys.readouterr().out
    card = Path("alone/README.md").read_text()
    assert "- The temperature of the gate ncm was not chosen with c, added later" in card
    assert load("alone").predict(images) != wanted  # so it matters

    assert main(["remove", "removed", "a"]) == 0  # what the other bundle has more of does no harm
    assert main(["add", "removed", "whole/tasks/c"]) == 0
    assert said not in capsys.readouterr().out
    Path("whole/gate.safetensors").write_bytes(b"")  # it is not needed
    assert main(["remove", "removed", "c"]) == 0
    assert main(["add", "removed", "whole/tasks/c", "--name", "d"]) == 0
    assert main(["check", "removed"]) == 0


def test_a_folder_that_is_deleted_by_hand_leaves_a_hole_for_training_only(made: None) -> None:
    shutil.rmtree("out/tasks/b")
    assert load("out").tasks == ["a", "c"]
    with pytest.raises(CheckpointError, match="there is none of number 1"):
        load_exported("out", MLP([16, 16]))


@pytest.mark.slow
@pytest.mark.filterwarnings(
    "ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning"
)
def test_other_formats_are_made_anew(made: None) -> None:
    ort = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnx")
    net = load("out")
    write_onnx(net, Path("out/onnx"))
    write_peft(net, Path("out/peft"))
    assert main(["remove", "out", "b"]) == 0
    assert {path.name for path in Path("out/peft").iterdir() if path.is_dir()} == {"a", "c"}
    session = ort.InferenceSession("out/onnx/mixed.onnx")
    inputs = torch.rand(3, 1, 8, 8)
    (found,) = session.run(
        None, {"inputs": inputs.numpy(), "tasks": torch.tensor([2, 1, 0]).numpy()}
    )
    assert torch.from_numpy(found[1]).isnan().all()
    wanted = load("out").answer(inputs[[0, 2]], torch.tensor([2, 0]))
    torch.testing.assert_close(torch.from_numpy(found[[0, 2]]), wanted, rtol=0, atol=2e-6)
