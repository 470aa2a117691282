"""`benchmarks/compare_results.py` finds what was changed in a tree of runs, and nothing else."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "compare_results.py"


def write(root: Path, record: dict[str, Any]) -> Path:
    run = root / "digits" / "ewc" / "seed_0"
    run.mkdir(parents=True)
    (run / "results.json").write_text(json.dumps(record))
    (run / "metrics.csv").write_text("step,accuracy_without_oracle/task_1\n0,\n4,0.5\n")
    return root


@pytest.fixture
def trees(tmp_path: Path) -> tuple[Path, Path]:
    """A run before a key was renamed, and the same run after."""
    old = {"accuracy_without_oracle": {"per_task": [0.5, None]}, "provenance": {"seconds": 1.0}}
    new = {"accuracy_task_agnostic": {"per_task": [0.5, None]}, "provenance": {"seconds": 2.0}}
    return write(tmp_path / "old", old), write(tmp_path / "new", new)


def compare(*trees: Path) -> tuple[int, list[str]]:
    command = [sys.executable, str(SCRIPT), *map(str, trees)]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    return done.returncode, done.stdout.splitlines()


def edit(file: Path, old: str, new: str) -> None:
    assert old in file.read_text()
    file.write_text(file.read_text().replace(old, new))


def test_renamed_keys_and_provenance_are_no_difference(trees: tuple[Path, Path]) -> None:
    code, lines = compare(*trees)
    assert code == 0
    assert lines[1:] == [
        "not compared: results.json provenance.seconds differs, 1 runs",
        "everything that is compared is equal",
    ]


@pytest.mark.parametrize(
    ("name", "old", "new", "said"),
    [
        ("results.json", "null", "0.1", "results.json accuracy_task_agnostic.per_task differs"),
        ("results.json", '{"acc', '{"seed": 0, "acc', "results.json seed is only in one tree"),
        ("metrics.csv", "4,0.5", "4,0.6", "metrics.csv accuracy_task_agnostic/task_* differs"),
    ],
)
def test_what_differs_is_named(
    trees: tuple[Path, Path], name: str, old: str, new: str, said: str
) -> None:
    edit(trees[1] / "digits" / "ewc" / "seed_0" / name, old, new)
    code, lines = compare(*trees)
    assert code == 1
    assert [line for line in lines if line.startswith(name)] == [f"{said}, 1 runs"]


def test_runs_of_one_tree_only_are_named(trees: tuple[Path, Path]) -> None:
    shutil.move(trees[1] / "digits" / "ewc", trees[1] / "digits" / "si")
    assert compare(*trees)[1][:3] == [
        "0 runs are in both trees",
        "only in one: digits/ewc/seed_0",
        "only in one: digits/si/seed_0",
    ]
