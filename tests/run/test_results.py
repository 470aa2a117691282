"""A run's files, read back by the standard library, written twice, and written by halves."""

import csv
import errno
import json
import math
import re
import subprocess
from collections.abc import Iterator
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
import torch
from pictures import left_blank
from PIL import Image

from bpn_lightning import AccuracyMatrix
from bpn_lightning.costs import Bytes
from bpn_lightning.errors import ConfigurationError, ResultsError
from bpn_lightning.files import writing
from bpn_lightning.files.writing import write_atomically
from bpn_lightning.metrics.scores import ClassCounts
from bpn_lightning.run import provenance, results
from bpn_lightning.run.provenance import collect_provenance
from bpn_lightning.run.results import (
    read_matrix_csv,
    read_results,
    write_results,
)
from bpn_lightning.run.scenarios import scenario, scenario_text, scenarios
from bpn_lightning.run.schema import Conditions, Provenance
from bpn_lightning.tasks import Task

pytestmark = pytest.mark.slow

TASKS = [Task(k, (2 * k, 2 * k + 2), (f"{2 * k}", f"{2 * k + 1} é"), epochs=2) for k in range(3)]
ROWS = [[1 / 3, 0.4, 0.3], [0.9, 0.5, 0.4], [0.6, 0.8, 0.6], [0.5, 0.9, 0.7]]
PROVENANCE: Provenance = {
    "seconds": 1.5,
    "date": "2024-01-01T00:00:00+00:00",
    "versions": {"python": "3.11.7", "torch": None},
    "commit": None,
    "host": {"name": "here", "platform": "p", "cpu": "c", "gpu": None, "threads": 1},
}


def matrix(moments: int = 4) -> AccuracyMatrix:
    metric = AccuracyMatrix(3)
    for row, accuracies in enumerate(ROWS[:moments]):
        metric.update(row, accuracies)
    return metric


def write(folder: Path, **changes: Any) -> Path:
    arguments: dict[str, Any] = {
        "experiment": "tiny",
        "method": "bd+ewc",
        "seed": 3,
        "matrix": matrix(),
        "curve": [],
        "tasks": TASKS,
        "bytes_per_task": {"measured": 6040, "paper": 4808},
        "bytes_held": Bytes(30000, 20000),
        "provenance": PROVENANCE,
    }
    return write_results(folder, **{**arguments, **changes})


@pytest.fixture
def blank() -> Iterator[None]:
    """For tests that do not look at pictures."""
    with left_blank():
        yield


def contents(folder: Path) -> dict[str, bytes]:
    paths = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def test_pictures_name_gates_and_front(tmp_path: Path) -> None:
    write(tmp_path, front={"name": "random", "bytes": 8})
    drawn = (tmp_path / "figures" / "accuracy_matrix.svg").read_text()
    assert "<!-- tiny · bd+ewc, front random · seed 3 -->" in drawn


@pytest.mark.usefixtures("blank")
def test_results_json(tmp_path: Path) -> None:
    metric = matrix()
    metric.update_task_agnostic([0.1, 0.2, 0.6])
    path = write(tmp_path / "a" / "b", matrix=metric)
    assert path == tmp_path / "a" / "b" / "results.json"
    found = json.loads(path.read_bytes())
    assert found == {
        "schema_version": 3,
        "experiment": "tiny",
        "method": "bd+ewc",
        "seed": 3,
        "tasks": [
            {"id": 0, "classes": ["0", "1 é"], "epochs": 2},
            {"id": 1, "classes": ["2", "3 é"], "epochs": 2},
            {"id": 2, "classes": ["4", "5 é"], "epochs": 2},
        ],
        "tasks_learned": [0, 1, 2],
        "tasks_not_learned": [],
        "accuracy": {
            "average": pytest.approx(0.7),  # (.5 + .9 + .7) / 3
            "first_task": 0.5,
            "per_task": [0.5, 0.9, 0.7],
            "bwt": pytest.approx(-0.15),  # (.5 - .9 + .9 - .8) / 2
            "fwt": pytest.approx(0.2),  # (.5 - .4 + .6 - .3) / 2
            "forgetting": pytest.approx(0.15),  # (.9 - .5 + .8 - .9) / 2
        },
        "accuracy_task_agnostic": {
            "average": pytest.approx(0.3),
            "first_task": 0.1,
            "per_task": [0.1, 0.2, 0.6],
        },
        "by_class": {},
        "validation": None,
        "front": None,
        "gates": {},
        "accuracy_after_learning": {
            "average": pytest.approx(0.8),
            "per_task": [0.9, 0.8, 0.7],
        },
        "unsettled_tasks": [],
        "metrics": {},
        "bytes_per_task": {"measured": 6040, "paper": 4808},
        "bytes_held": {"training": 30000, "inference": 20000},
        "extra": {},
        "provenance": PROVENANCE,
    }
    assert read_results(path) == read_results(path.parent) == found


@pytest.mark.usefixtures("blank")
def test_what_a_comparison_depends_on_is_recorded(tmp_path: Path) -> None:
    conditions: Conditions = {
        "scenarios": scenarios("all", task_id_at_inference=True, agnostic=True),
        "order": "seed",
        "tuned_for": None,
        "split": "test",
        "updates": 12,
    }
    counts: ClassCounts = {
        "tasks": [2, 2, 0],
        "samples": [1, 3, 0, 0, 0, 0],
        "right": [1, 2] + [0] * 4,
    }
    found = read_results(
        write(
            tmp_path,
            conditions=conditions,
            class_counts={"accuracy": counts},
            validation=[0.5, 1.0, None],
        )
    )
    assert found["conditions"] == conditions
    assert found["by_class"]["accuracy"]["balanced"] == pytest.approx(5 / 6)
    assert found["validation"] == {"average": None, "per_task": [0.5, 1.0, None]}


@pytest.mark.usefixtures("blank")
def test_results_of_earlier_releases_lack_it(tmp_path: Path) -> None:
    found = json.loads(write(tmp_path).read_bytes())
    for key in ("by_class", "validation"):
        del found[key]
    (tmp_path / "results.json").write_text(json.dumps(found))
    assert read_results(tmp_path) == found


@pytest.mark.parametrize(
    ("mask", "given", "expected"),
    [
        ("all", True, "task-incremental, task ID given"),
        ("task", True, "task-incremental, task ID given"),
        ("seen", False, "class-incremental, task ID not given"),
        ("shared", True, "domain-incremental, task ID given"),
        ("shared", False, "domain-incremental, task ID not given"),
    ],
)
def test_scenarios(mask: str, given: bool, expected: str) -> None:
    assert scenario_text(scenario(mask, given)) == expected
    of_run = scenarios(mask, task_id_at_inference=given, agnostic=False)
    assert scenario_text(of_run["accuracy"]) == expected
    assert of_run["accuracy_task_agnostic"] is None


def test_every_file_of_a_run(tmp_path: Path) -> None:
    write(tmp_path, config="trainer: {}\n", curve=[{"epoch": 1, "task": 0, "accuracy": ROWS[1]}])
    assert sorted(contents(tmp_path)) == [
        "accuracy_matrix.csv",
        "config.yaml",
        "figures/accuracy_matrix.png",
        "figures/accuracy_matrix.svg",
        "figures/accuracy_over_stream.png",
        "figures/accuracy_over_stream.svg",
        "results.json",
    ]
    assert (tmp_path / "config.yaml").read_text() == "trainer: {}\n"
    for picture in (tmp_path / "figures").glob("*.png"):
        with Image.open(picture) as image:
            image.verify()


@pytest.mark.usefixtures("blank")
def test_matrix_csv(tmp_path: Path) -> None:
    metric = matrix()
    metric.update(1, [0.9, math.nan, 0.1 + 0.2])
    write(tmp_path, matrix=metric)
    with open(tmp_path / "accuracy_matrix.csv", newline="") as file:
        rows = list(csv.reader(file))
    assert rows == [
        ["after_task", "task_1", "task_2", "task_3"],
        ["0", "0.3333333333333333", "0.4", "0.3"],
        ["1", "0.9", "", "0.30000000000000004"],
        ["2", "0.6", "0.8", "0.6"],
        ["3", "0.5", "0.9", "0.7"],
    ]
    for path in (tmp_path, tmp_path / "accuracy_matrix.csv"):
        torch.testing.assert_close(
            read_matrix_csv(path), metric.accuracy, rtol=0, atol=0, equal_nan=True
        )


@pytest.mark.parametrize("moments", [0, 1, 2, 3])
def test_stream_that_ended_early(tmp_path: Path, moments: int) -> None:
    metric = matrix(moments)
    found = read_results(write(tmp_path, matrix=metric))
    learned = max(0, moments - 1)
    assert found["tasks_learned"] == [0, 1, 2][:learned]
    assert found["tasks_not_learned"] == [0, 1, 2][learned:]
    assert found["accuracy"]["per_task"][learned:] == [None] * (3 - learned)
    assert found["accuracy_task_agnostic"] is None
    assert len((tmp_path / "accuracy_matrix.csv").read_text().splitlines()) == 1 + moments
    torch.testing.assert_close(read_matrix_csv(tmp_path), metric.accuracy, equal_nan=True)


def test_equal_runs_write_equal_bytes_but_for_provenance(tmp_path: Path) -> None:
    write(tmp_path / "a")
    write(tmp_path / "b", provenance=collect_provenance(2.0))
    one, other = contents(tmp_path / "a"), contents(tmp_path / "b")
    texts = [
        re.sub(rb'"provenance": \{.*\n  \}', b"", side.pop("results.json"), flags=re.DOTALL)
        for side in (one, other)
    ]
    assert one == other
    assert texts[0] == texts[1]
    write(tmp_path / "a")
    assert contents(tmp_path / "a") == one | {
        "results.json": (tmp_path / "a" / "results.json").read_bytes()
    }


@pytest.mark.usefixtures("blank")
def test_extra_results_are_kept_and_nan_is_null(tmp_path: Path) -> None:
    extra = {"intransigence": 0.1, "seeds": (1, 2), "unknown": {"a": [math.nan, -math.inf]}}
    found = read_results(write(tmp_path, extra=extra))
    assert found["extra"] == {
        "intransigence": 0.1,
        "seeds": [1, 2],
        "unknown": {"a": [None, None]},
    }


def test_tasks_must_fit_the_matrix(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="3 columns of the matrix, but got 2"):
        write(tmp_path, tasks=TASKS[:2])


# --- whole files or none -----------------------------------------------------------------------------


def test_crash_before_the_rename_leaves_the_earlier_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "results.json"
    write_atomically(path, b"earlier")

    def power_cut(*_: object) -> None:
        raise KeyboardInterrupt

    for step in ("replace", "fsync"):
        with monkeypatch.context() as patch:
            patch.setattr(writing.os, step, power_cut)
            with pytest.raises(KeyboardInterrupt):
                write_atomically(path, b"half of the la")
        assert path.read_bytes() == b"earlier"
    write_atomically(path, b"later")
    assert contents(tmp_path) == {"results.json": b"later"}


def test_written_files_have_the_usual_permissions(tmp_path: Path) -> None:
    (tmp_path / "usual").write_bytes(b"")
    write_atomically(tmp_path / "ours", b"")
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "usual").stat().st_mode


@pytest.mark.usefixtures("blank")
def test_results_json_comes_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, data: bytes) -> None:
        if path.suffix == ".json":
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        write_atomically(path, data)

    monkeypatch.setattr(results, "write_atomically", full)
    with pytest.raises(ResultsError, match=r"No space left on device.*resume"):
        write(tmp_path)
    assert len(contents(tmp_path)) == 5
    assert not (tmp_path / "results.json").exists()  # not a finished run


# --- reading ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Of a results.json."""
    with left_blank():
        return write(tmp_path_factory.mktemp("written")).read_text()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r.pop("method"), "Expected method of .* to be there"),
        (lambda r: r["accuracy"].pop("bwt"), r"Expected accuracy\.bwt of"),
        (
            lambda r: r["accuracy"].update(bwt="low"),
            r"accuracy\.bwt .* of type float or null, but got",
        ),
        (lambda r: r.update(seed=True), "seed of .* of type int, but got True"),
        (
            lambda r: r["tasks"][1].update(classes="ab"),
            r"tasks\[1\]\.classes .* a list, but got 'ab'",
        ),
        (lambda r: r["accuracy"]["per_task"].append("x"), r"accuracy\.per_task\[3\] of"),
        (lambda r: r.update(accuracy=None), "accuracy of .* an object, but got None"),
        (lambda r: r.update(accuracy_task_agnostic=3), "an object or null, but got 3"),
        (lambda r: r["provenance"]["versions"].update(torch=2), r"provenance\.versions\.torch of"),
        (lambda r: r.update(schema_version=99), "schema_version of .* to be 3, but got 99"),
        (lambda r: r.pop("schema_version"), "but got None"),
    ],
)
def test_reading_names_the_file_and_the_key(
    tmp_path: Path, text: str, change: Any, message: str
) -> None:
    path, found = tmp_path / "results.json", json.loads(text)
    change(found)
    path.write_text(json.dumps(found))
    with pytest.raises(ResultsError, match=message) as caught:
        read_results(path)
    assert str(path) in str(caught.value)


def test_integers_are_numbers_and_other_keys_are_let_be(tmp_path: Path, text: str) -> None:
    path, found = tmp_path / "results.json", json.loads(text)
    found["accuracy"]["average"] = 1
    found["someone_elses"] = {}
    path.write_text(json.dumps(found))
    assert read_results(path) == found


@pytest.mark.parametrize("text", ["", "{", "[]", "\x00", '"a"'])
def test_other_files_are_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "results.json"
    path.write_text(text)
    with pytest.raises(ResultsError, match=re.escape(str(path))):
        read_results(path)
    with pytest.raises(ResultsError, match="absent"):
        read_results(tmp_path / "absent")
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ResultsError, match="UTF-8"):
        read_results(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "to begin with after_task"),
        ("after_task\n", "to begin with"),
        ("task,task_1\n", "but got 'task,task_1'"),
        ("after_task,task_1\n2,0.5\n", "line 2 .* from 0 to 1 and 1 accuracies"),
        ("after_task,task_1\n0,0.5\n1,0.5,0.5\n", "line 3"),
        ("after_task,task_1\n0,half\n", "half"),
        ("after_task,task_1\n\n0,0.5\n", "line 2"),
    ],
)
def test_other_tables_are_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "accuracy_matrix.csv"
    path.write_text(text)
    with pytest.raises(ResultsError, match=message) as caught:
        read_matrix_csv(path)
    assert str(path) in str(caught.value)


# --- provenance -----------------------------------------------------------------------------------------


def test_provenance_is_of_here_and_now(tmp_path: Path) -> None:
    found = collect_provenance(1.23456)
    assert found["seconds"] == 1.235
    age = datetime.now(timezone.utc) - datetime.fromisoformat(found["date"])
    assert timedelta(0) <= age < timedelta(minutes=1)
    assert torch.__version__.startswith(str(found["versions"]["torch"]))
    assert set(found["versions"]) == {
        "python", "torch", "lightning", "torchvision", "torchmetrics", "bpn_lightning",
    }  # fmt: skip
    assert found["host"]["threads"] == torch.get_num_threads()
    write(tmp_path, provenance=found)
    assert read_results(tmp_path)["provenance"] == found


def git(folder: Path, *arguments: str) -> str:
    identity = ("-c", "user.name=a", "-c", "user.email=a@b")
    command = ["git", *identity, *arguments]
    return subprocess.run(
        command, cwd=folder, check=True, capture_output=True, text=True
    ).stdout.strip()


def test_commit_is_of_the_checkout_that_tracks_the_file(tmp_path: Path) -> None:
    source = tmp_path / "package.py"
    source.write_text("")
    assert provenance._commit(source) is None  # no checkout
    git(tmp_path, "init", "-q")
    assert provenance._commit(source) is None  # somebody else's checkout, and one without commits
    git(tmp_path, "add", "package.py")
    assert provenance._commit(source) is None
    git(tmp_path, "commit", "-qm", "one")
    git(tmp_path, "tag", "-a", "v1", "-m", "v1")
    head = git(tmp_path, "rev-parse", "HEAD")
    assert provenance._commit(source) == head
    (tmp_path / "runs").mkdir()  # what git does not track is not the package's
    (tmp_path / "runs" / "a").write_text("")
    assert provenance._commit(source) == head
    source.write_text("x = 1\n")
    assert provenance._commit(source) == f"{head}-dirty"


def test_no_git_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert collect_provenance(0.0)["commit"] is None
