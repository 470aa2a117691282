"""Wrong inputs, and what is said about each: the rows of bad_input.yaml.

Each row also says how the command ends, and that no file was written, changed or lost on the way.
"""

import errno
import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from bpn_lightning import ContinualModule
from bpn_lightning.analysis import collection
from bpn_lightning.bench import cli as bench
from bpn_lightning.cli import data as data_command
from bpn_lightning.cli import main as cli
from bpn_lightning.errors import CheckpointError, ResultsError
from bpn_lightning.nn import MLP
from bpn_lightning.run import results

pytestmark = pytest.mark.slow

Said = pytest.CaptureFixture[str]
BadFile = Callable[[str, str], None]

EVIL = "from pathlib import Path\nPath('owned').touch()\nclass Net: pass\n"
COMMANDS = {"bpn-fit": cli, "bpn-bench": bench, "bpn-data": data_command}
DIGITS = ["--config", "digits_inc.yaml"]
CPU = ["--trainer.accelerator", "cpu"]
TABLE = yaml.safe_load(Path(__file__).with_name("bad_input.yaml").read_text(encoding="utf-8"))

#: A few lines of aliases that stand for millions of values.
BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{new}: &{new} [{','.join([f'*{old}'] * 9)}]\n"
    for old, new in zip("abcdef", "bcdefg", strict=True)
)


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A folder with an untrusted module, which must never be imported."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")  # seed_everything sets them for good
    monkeypatch.setenv("PL_SEED_WORKERS", "0")
    Path("evil.py").write_text(EVIL)
    yield
    assert not Path("owned").exists()
    assert "evil" not in sys.modules


def files() -> dict[str, bytes]:
    """Every file below the current folder, and what is in it."""
    found = {}
    for path in sorted(Path().rglob("*")):
        # A cache's lock is all that is left of a cache that could not be built.
        if path.is_file() and "__pycache__" not in path.parts and path.suffix != ".lock":
            found[str(path)] = path.read_bytes()
    return found


def refused(command: Any, line: str | list[str], capsys: Said, status: int = 2) -> str:
    """The message of a command that ends with an exit code and changes no file."""
    before = files()
    assert command.main(line.split() if isinstance(line, str) else line) == status
    shown = capsys.readouterr()
    assert files() == before
    assert shown.out == ""
    *notices, error = [line for line in shown.err.splitlines() if line]
    expected = (
        "bpn-fit: There are no tuned values of ",
        "bpn-fit: The values of ",
        "bpn-bench: 1 runs: ",
    )
    assert all(notice.startswith(expected) for notice in notices)
    return error


def whole_results(**change: Any) -> str:
    """A results.json that is read, but for what changes."""
    accuracy = {"average": 0.5, "first_task": 0.5, "per_task": [0.5], "bwt": None, "fwt": None}
    host = {"name": "n", "platform": "p", "cpu": "c", "gpu": None, "threads": 1}
    found = {
        "schema_version": 3,
        "experiment": "e",
        "method": "m",
        "seed": 0,
        "tasks": [{"id": 0, "classes": ["a"], "epochs": 1}],
        "tasks_learned": [0],
        "tasks_not_learned": [],
        "accuracy": {**accuracy, "forgetting": None},
        "accuracy_task_agnostic": None,
        "front": None,
        "gates": {},
        "accuracy_after_learning": {"average": 0.5, "per_task": [0.5]},
        "unsettled_tasks": [],
        "metrics": {},
        "bytes_per_task": {"measured": 0, "paper": None},
        "bytes_held": {"training": 0, "inference": 0},
        "extra": {},
        "provenance": {"seconds": 1.0, "date": "d", "versions": {}, "commit": None, "host": host},
    }
    return json.dumps(found | change)


def whole_cells(**change: Any) -> str:
    """A cells.json that is read, but for what changes."""
    grid = {"name": "g", "title": "G", "text": "", "compare": [], "report": ["accuracy"]}
    whole = {"schema_version": 2, "grid": grid, "not_run": [], "missing": [], "cells": []}
    return json.dumps(whole | change)


def rows(*commands: str) -> list[Any]:
    """A parameter for each row of these commands: its section, what is given, and what is said."""
    return [
        pytest.param(section, given, parts, id=f"{section['given']}: {given!s:.60}")
        for section in TABLE
        if section["command"] in commands
        for given, *parts in section["cases"]
    ]


def check(message: str, parts: list[str]) -> None:
    """One part is the whole message; of several the first follows "Expected", the others in order."""
    parts = [part.replace("{here}", str(Path.cwd())) for part in parts]
    if len(parts) == 1:
        assert message == parts[0]
        return
    assert message.endswith((".", "?"))
    _, expected, rest = message.partition("Expected ")
    assert expected, message
    assert rest.startswith(parts[0]), message
    for part in parts:
        _, found, rest = rest.partition(part)
        assert found, f"{part!r} of {parts} in: {message}"


def written_out(given: Any) -> Any:
    """What a row abbreviates: ``<3 of "x">`` is xxx."""
    if not isinstance(given, str):
        return given
    repeated = re.sub(r'<(\d+) of "([^"]+)">', lambda match: int(match[1]) * match[2], given)
    return repeated.replace("<bomb>", BOMB)


def line_of(section: dict[str, Any], given: Any, bad_file: BadFile) -> list[str]:
    """What is typed; the files that belong to it are made."""
    kind, given = section["given"], written_out(given)
    if kind == "line":
        line, kept = given if isinstance(given, list) else (given, None)
        if kept is not None:
            Path("kept").mkdir()
            Path("kept/cells.json").write_text(
                kept if isinstance(kept, str) else whole_cells(**kept)
            )
        words: list[str] = line.split()
        own = section["command"] != "bpn-fit" or words[0] == "--config"
        return words if own else [*DIGITS, *words, *CPU]
    if kind == "x.yaml":
        Path(kind).write_bytes(given if isinstance(given, bytes) else given.encode())
        Path("net.yaml").write_text("class_path: evil.Net\n")
        return [*DIGITS, "--config", kind, *CPU]
    if kind == "g.yaml":
        Path(kind).write_text(given)
        Path("up.yaml").write_text("experiment: ../../up\nmethod: ewc\n")
        return [kind]
    bad_file(kind, given)
    return [*DIGITS, *CPU, *section["flags"].split()]


@pytest.mark.parametrize(("section", "given", "parts"), rows(*COMMANDS))
def test_a_command(
    section: dict[str, Any], given: Any, parts: list[str], bad_file: BadFile, capsys: Said
) -> None:
    command = section["command"]
    line = line_of(section, given, bad_file)
    said = refused(COMMANDS[command], line, capsys, section["exit"])
    prefix = f"{command}: error: "
    assert said.startswith(prefix)
    check(said.removeprefix(prefix), parts)


@pytest.mark.parametrize(("section", "given", "parts"), rows("read_results"))
def test_results(section: dict[str, Any], given: Any, parts: list[str]) -> None:
    path = Path(section["given"])
    path.write_text(whole_results())
    results.read_results(path)
    path.write_text(given if isinstance(given, str) else whole_results(**given))
    with pytest.raises(ResultsError) as caught:
        results.read_results(path)
    check(str(caught.value), parts)


@pytest.mark.parametrize(("section", "given", "parts"), rows("read_matrix_csv"))
def test_a_matrix(section: dict[str, Any], given: str, parts: list[str]) -> None:
    path = Path(section["given"])
    path.write_text(given)
    with pytest.raises(ResultsError) as caught:
        results.read_matrix_csv(path)
    check(str(caught.value), parts)


@pytest.mark.parametrize(("section", "given", "parts"), rows("load_from_checkpoint"))
def test_load_from_checkpoint(
    section: dict[str, Any], given: str, parts: list[str], bad_file: BadFile
) -> None:
    bad_file(section["given"], given)
    with pytest.raises(CheckpointError) as caught:
        ContinualModule.load_from_checkpoint("x.ckpt", backbone=MLP([4]))
    check(str(caught.value), parts)


def test_no_row_is_lost() -> None:
    messages = [parts for section in TABLE for _, *parts in section["cases"]]
    assert len(messages) >= 224
    assert sum(len(parts) == 1 for parts in messages) >= 25


# --- nothing is lost -----------------------------------------------------------------------------

SHORT = "--config digits_inc.yaml --method finetune --trainer.accelerator cpu --data.num_tasks 1"
SHORT += " --data.epochs_per_task 1"
FOLDER = Path("runs/digits_inc/finetune/seed_0")


def full(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_run_that_cannot_begin_costs_no_earlier_results(
    capsys: Said, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cli.main(SHORT.split()) == 0
    capsys.readouterr()
    for flags in (
        "--data SplitArrays --data.path nowhere.npz",
        "--data.num_tasks 6",
        "--model.optimizer.lr -1",
        "--trainer.max_epochs 7",
        "--method ewc --strategies.ewc.update proximal --model.optimizer Adam",
    ):
        assert "Expected" in refused(cli, f"{SHORT} --overwrite true {flags}", capsys)
    before = files()
    with monkeypatch.context() as patch:
        patch.setattr(results, "write_atomically", full)
        assert cli.main([*SHORT.split(), "--runs", "full"]) == 2
    here = Path("full", *FOLDER.parts[1:])
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"bpn-fit: error: Expected to write the run's results into {here}, but got: [Errno 28] No "
        "space left on device. Make room or give write access, then resume the run from its last "
        "checkpoint."
    )
    assert {name: text for name, text in files().items() if not name.startswith("full")} == before
    assert not (here / "results.json").exists()
    assert cli.main([*SHORT.split(), "--runs", "full", "--ckpt_path", "last"]) == 0
    assert results.read_results(here)["accuracy"] == results.read_results(FOLDER)["accuracy"]


def test_a_full_disk_leaves_an_earlier_report(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("kept").mkdir()
    Path("kept/cells.json").write_text(whole_cells())
    found = collection.read_collection(Path("kept"))
    monkeypatch.setattr(collection, "write_atomically", full)
    before = files()
    with pytest.raises(ResultsError) as caught:
        collection.write_collection(found, Path("kept"))
    assert str(caught.value) == (
        "Expected to write kept/cells.json, but got: [Errno 28] No space left on device. Make room "
        "or give write access; `bpn-bench collect` makes it without running anything."
    )
    assert files() == before


@pytest.mark.parametrize(
    "place", ["runs/digits_inc", "runs/digits_inc/finetune/seed_0/metrics.csv"]
)
def test_a_run_never_writes_out_of_its_root(place: str, capsys: Said) -> None:
    Path("elsewhere").mkdir()
    Path("elsewhere/metrics.csv").write_text("kept")
    link = Path(place)
    link.parent.mkdir(parents=True)
    target = Path("elsewhere", "metrics.csv" if link.suffix else "").absolute()
    link.symlink_to(target)
    shown = link if link.suffix else FOLDER
    inside = target if link.suffix else target / "finetune/seed_0"
    wanted = (
        f"Expected {shown} to be in runs, but a link leads to {inside}. Remove the link, or set the "
        "other location with --runs."
    )
    assert refused(cli, SHORT, capsys) == f"bpn-fit: error: {wanted}"
    Path("g.yaml").write_text("experiments: [{config: digits_inc, methods: [finetune]}]")
    assert refused(bench, "g.yaml --runs runs", capsys) == f"bpn-bench: error: {wanted}"


def test_the_root_may_be_a_link(capsys: Said) -> None:
    Path("disk").mkdir()
    Path("runs").symlink_to("disk")
    assert cli.main(SHORT.split()) == 0
    assert Path("disk/digits_inc/finetune/seed_0/results.json").is_file()
