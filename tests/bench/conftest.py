"""A grid of two methods and two seeds, and a stand-in for `bpn-fit` that takes milliseconds."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bpn_lightning.analysis.collection import kept
from bpn_lightning.analysis.record import RunRecord
from bpn_lightning.run.scenarios import scenarios

GRID = """\
title: Two methods
text: On the digits.
seeds: [0, 1]
experiments:
  - config: digits_inc.yaml
    methods: [ewc, bd+ewc]
compare: [[bd+ewc, ewc]]
report: [accuracy, paired_tests]
"""

# What a run of two tasks leaves, as `bpn-fit` does, but for pictures and checkpoints.
STAND_IN = """\
import json, os, sys, time
from pathlib import Path
words = sys.argv[1:]
given = dict(zip(words, words[1:]))
experiment = Path(given["--config"]).stem
folder = Path(given["--runs"], experiment, given["--method"], "seed_" + given["--seed_everything"])
with open(os.environ["CALLS"], "a") as file:
    file.write(given["--method"] + " " + given["--seed_everything"] + "\\n")
if given["--method"] == os.environ.get("FAILS"):
    sys.exit("no such data")
if given["--method"] == os.environ.get("HANGS"):
    time.sleep(3600)
results = json.loads(Path(os.environ["RESULTS"]).read_text())
results |= {"experiment": experiment, "method": given["--method"]}
results["seed"] = int(given["--seed_everything"])
(folder / "accuracy_matrix.csv").write_text(
    "after_task,task_1,task_2\\n0,0.1,0.2\\n1,0.9,0.3\\n2,0.4,0.8\\n")
(folder / "results.json").write_text(json.dumps(results))
"""


def results(first: float = 0.4, average: float = 0.6) -> dict[str, Any]:
    """A results.json of two tasks of two epochs."""
    return {
        "schema_version": 3,
        "experiment": "digits_inc",
        "method": "ewc",
        "seed": 0,
        "tasks": [{"id": k, "classes": ["a", "b"], "epochs": 2} for k in range(2)],
        "tasks_learned": [0, 1],
        "tasks_not_learned": [],
        "accuracy": {
            "average": average,
            "first_task": first,
            "per_task": [first, 0.8],
            "bwt": -0.5,
            "fwt": None,
            "forgetting": 0.5,
        },
        "accuracy_task_agnostic": {"average": 0.3, "first_task": 0.1, "per_task": [0.1, 0.5]},
        "front": None,
        "gates": {},
        "accuracy_after_learning": {"average": 0.85, "per_task": [0.9, 0.8]},
        "unsettled_tasks": [],
        "metrics": {},
        "bytes_per_task": {"measured": 552, "paper": 520},
        "bytes_held": {"training": 1000, "inference": 552},
        "extra": {},
        "provenance": {
            "seconds": 12.3,
            "date": "2020-01-01T00:00:00+00:00",
            "versions": {"python": "3.11"},
            "commit": None,
            "host": {"name": "secret", "platform": "p", "cpu": "c", "gpu": None, "threads": 1},
        },
    }


def conditions(**changes: Any) -> dict[str, Any]:
    """What `results` lacks, as runs of earlier releases do."""
    counts = {
        "samples_per_task": [4, 4],
        "classes": ["ant", "bee", "cat", "dog"],
        "samples": [2, 2, 2, 2],
        "per_class": [1.0, 0.5, 0.0, 0.5],
        "balanced": 0.5,
    }
    known = {
        "scenarios": scenarios("all", task_id_at_inference=True, agnostic=True),
        "order": "seed",
        "tuned_for": None,
        "updates": 8,
    }
    by_class = {"accuracy": counts, "accuracy_task_agnostic": counts}
    validation = {"average": 0.5, "per_task": [0.5, 0.5]}
    return {"conditions": known | changes, "by_class": by_class, "validation": validation}


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The command of the stand-in; it notes its calls in `calls`."""
    (tmp_path / "stand_in.py").write_text(STAND_IN)
    (tmp_path / "results.json").write_text(json.dumps(results()))
    monkeypatch.setenv("CALLS", str(tmp_path / "calls"))
    monkeypatch.setenv("RESULTS", str(tmp_path / "results.json"))
    return [sys.executable, str(tmp_path / "stand_in.py")]


@pytest.fixture
def write_grid(tmp_path: Path) -> Callable[[str], str]:
    """Writes a grid and gives its path."""

    def write(text: str = GRID) -> str:
        path = tmp_path / "two.yaml"
        path.write_text(text)
        return str(path)

    return write


@pytest.fixture
def record() -> Callable[..., RunRecord]:
    """Makes a finished run whose accuracies are those of a lower triangle."""

    def make(method: str, seed: int, matrix: list[list[float]], **more: Any) -> RunRecord:
        found = results(first=matrix[-1][0], average=sum(matrix[-1]) / len(matrix[-1]))
        if "recorded" in more:
            found |= conditions(**more.pop("recorded"))
        found["accuracy"]["per_task"] = matrix[-1]
        tasks = len(matrix)
        found["tasks"] = [{"id": k, "classes": ["a", "b"], "epochs": 2} for k in range(tasks)]
        given: dict[str, Any] = {
            "experiment": "digits_inc",
            "method": method,
            "seed": seed,
            "results": found,
            "matrix": [[None] * tasks, *([*row, *[None] * (tasks - len(row))] for row in matrix)],
            "epochs": [2] * tasks,
        }
        return kept(RunRecord(**{**given, **more}))

    return make
