"""Folders of runs as `bpn-fit` leaves them, made of nothing but numbers."""

import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml

Matrix = list[list[float | None]]

# Two tasks; the second was learned well, and the first forgotten.
MATRIX: Matrix = [[0.1, 0.2], [0.9, 0.3], [0.4, 0.8]]


def mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return math.fsum(known) / len(known) if known else None


def results(method: str, seed: int, matrix: Matrix, **more: Any) -> dict[str, Any]:
    """A results.json that says what the matrix says."""
    tasks = len(matrix) - 1
    learned = max((n for n, row in enumerate(matrix) if any(v is not None for v in row)), default=0)
    last = [*matrix[learned][:learned], *[None] * (tasks - learned)]
    right_after = [matrix[k + 1][k] for k in range(learned)] + [None] * (tasks - learned)
    found = {
        "schema_version": 3,
        "experiment": "digits_inc",
        "method": method,
        "seed": seed,
        "tasks": [{"id": k, "classes": [f"c{k}"], "epochs": 2} for k in range(tasks)],
        "tasks_learned": list(range(learned)),
        "tasks_not_learned": list(range(learned, tasks)),
        "accuracy": {
            "average": mean(last),
            "first_task": last[0],
            "per_task": last,
            "bwt": -0.5,
            "fwt": None,
            "forgetting": 0.5,
        },
        "accuracy_task_agnostic": {"average": 0.3, "first_task": 0.1, "per_task": last},
        "front": None,
        "gates": {},
        "accuracy_after_learning": {"average": mean(right_after), "per_task": right_after},
        "unsettled_tasks": [],
        "metrics": {},
        "bytes_per_task": {"measured": 552, "paper": 520},
        "bytes_held": {"training": 1000, "inference": 1104},
        "extra": {},
        "provenance": {
            "seconds": 12.5,
            "date": "2020-01-01T00:00:00+00:00",
            "versions": {"python": "3.11.7", "torch": "2.14.1"},
            "commit": "0123456789abcdef0123456789abcdef01234567",
            "host": {"name": "h", "platform": "p", "cpu": "c", "gpu": None, "threads": 1},
        },
    }
    return found | more


def gate(own_class: float | None = 0.75, mixture: float = 0.625, **more: Any) -> dict[str, Any]:
    """A gate of results.json after two tasks: 10 bytes for each, 7 for both."""
    keys = ("task_accuracy", "end_to_end", "mixture", "own_class", "own_class_task_given")
    last = dict(zip(keys, (0.875, 0.5, mixture, own_class, own_class and 0.9375), strict=True))
    first = dict.fromkeys(keys, 1.0) | {"own_class": own_class and 1.0}
    moments = [
        {"after": 1, "epoch": 2, **first, "calibration_error": 0.0, "rejection": 0.96875},
        {"after": 2, "epoch": 4, **last, "calibration_error": 0.125, "rejection": None},
    ]
    of_last = {
        key: None if value is None else {"average": value, "per_task": [value, value]}
        for key, value in last.items()
    }
    bins = {
        "error": 0.125,
        "counts": [*[0] * 9, 4, *[0] * 4, 12],
        "confidence": [*[None] * 9, 0.625, *[None] * 4, 1.0],
        "accuracy": [*[None] * 9, 0.5, *[None] * 4, 1.0],
    }
    sizes = {"modes": 2, "bytes_held": 27, "bytes_per_task": 10}
    return of_last | {"calibration": bins, "over_stream": moments, **sizes, **more}


@pytest.fixture
def make_gate() -> Callable[..., dict[str, Any]]:
    """What results.json has of a gate: see :func:`gate`."""
    return gate


@pytest.fixture(scope="session")
def make_run_in() -> Callable[..., Path]:
    """Writes the folder of a run below another folder and gives its path.

    ``make_run_in(folder, "ewc", 0, matrix, root="runs", parts=",front=random", config={...}, **keys of results.json)``
    """

    def make(
        place: Path,
        method: str = "ewc",
        seed: int = 0,
        matrix: Matrix = MATRIX,
        root: str = "runs",
        parts: str = "",
        config: dict[str, Any] | None = None,
        **more: Any,
    ) -> Path:
        found = results(method, seed, matrix, **more)
        home = place / root / found["experiment"]
        folder = home / f"{method.replace('/', '_')}{parts}" / f"seed_{seed}"
        folder.mkdir(parents=True)
        (folder / "results.json").write_text(json.dumps(found))
        header = ",".join(["after_task", *(f"task_{k + 1}" for k in range(len(matrix) - 1))])
        lines = [
            ",".join([str(n), *("" if v is None else repr(v) for v in row)])
            for n, row in enumerate(matrix)
        ]
        (folder / "accuracy_matrix.csv").write_text("\n".join([header, *lines, ""]))
        settings = {"seed_everything": seed, "method": method, "model": {"mask": "all"}}
        (folder / "config.yaml").write_text(yaml.safe_dump(settings | (config or {})))
        return folder

    return make


@pytest.fixture
def make_run(make_run_in: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """The same below the test's own folder."""
    return partial(make_run_in, tmp_path)
