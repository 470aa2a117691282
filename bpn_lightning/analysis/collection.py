"""What is kept of a grid's runs: one small ``cells.json``, from which every report is made.

It has the grid's words, what was not run or is missing, and for each finished run what its
``results.json`` says and the lower triangle of its accuracy matrix, one run a line. No checkpoint,
no picture and no name of a machine is in it, so it can be committed.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypedDict

from bpn_lightning.analysis.record import MAX_COUNT, RunRecord, check_curve, check_record
from bpn_lightning.errors import ResultsError
from bpn_lightning.files.writing import write_atomically
from bpn_lightning.metrics.scores import AfterLearning, TaskAgnostic
from bpn_lightning.run.moments import Row
from bpn_lightning.run.schema import (
    MAX_TASKS,
    Accuracy,
    BytesHeld,
    BytesPerTask,
    ClassAccuracy,
    Conditions,
    FrontRecord,
    GateResults,
    Validation,
    read_schema,
    violations,
)

__all__ = ["CELLS", "Collection", "NotRun", "kept", "read_collection", "write_collection"]

CELLS = "cells.json"

SCHEMA_VERSION = 2
"""Goes up when a key of cells.json is renamed, removed or changes its meaning."""

_DECIMALS = 5  # of an accuracy: a hundredth of what one image of a test set makes

_KEPT = (
    "accuracy",
    "accuracy_task_agnostic",
    "accuracy_after_learning",
    "front",
    "gates",
    "bytes_per_task",
    "bytes_held",
)


_ADDED = ("conditions", "by_class", "validation")
"""What runs of earlier releases lack."""


@dataclass(frozen=True)
class NotRun:
    """An entry that stands in the tables without results, and why."""

    experiment: str
    methods: tuple[str, ...]
    reason: str


@dataclass(frozen=True)
class Collection:
    """A grid and what its finished runs gave.

    Args:
        name: of the grid.
        title: of the grid.
        text: what it shows.
        compare: pairs of methods.
        report: the artifacts.
        not_run: entries without runs, by intention.
        missing: names of runs that are not finished.
        records: the finished runs, in the order of the grid.
        left_out: why other finished runs are not among them, a sentence each.
    """

    name: str
    title: str
    text: str
    compare: tuple[tuple[str, str], ...]
    report: tuple[str, ...]
    not_run: tuple[NotRun, ...]
    missing: tuple[str, ...]
    records: tuple[RunRecord, ...]
    left_out: tuple[str, ...] = ()

    def places(self) -> list[str]:
        """Experiments, with their labels, in order."""
        return list(dict.fromkeys(record.place for record in self.records))

    def of(self, place: str | None = None, method: str | None = None) -> list[RunRecord]:
        """The records of an experiment, of a method, or of both."""
        return [
            record
            for record in self.records
            if (place is None or record.place == place)
            and (method is None or record.method == method)
        ]

    def methods(self, place: str) -> list[str]:
        """The methods that were run there, in order."""
        return list(dict.fromkeys(record.method for record in self.of(place)))


def kept(record: RunRecord) -> RunRecord:
    """The part of a run's record that a cells.json keeps."""
    provenance = record.at("provenance")
    host = {key: value for key, value in provenance["host"].items() if key != "name"}
    results = {
        **{key: record.at(key) for key in _KEPT},
        "classes": [len(task["classes"]) for task in record.at("tasks")],
        "epochs": list(record.epochs),
        "provenance": {**provenance, "host": host},
        **{key: value for key in _ADDED if (value := record.at(key)) is not None},
    }
    return replace(
        record,
        results=results,
        matrix=_whole(record.triangle),
        task_names=_numbered(record.tasks),
        settings=None,
        source="",
        incomplete={},
    )


def write_collection(collection: Collection, folder: Path) -> Path:
    """Write cells.json, in one step.

    Raises:
        ResultsError: it cannot be written; an earlier one is whole.
    """
    head = {
        "schema_version": SCHEMA_VERSION,
        "grid": {
            "name": collection.name,
            "title": collection.title,
            "text": collection.text,
            "compare": collection.compare,
            "report": collection.report,
        },
        "not_run": [vars(one) for one in collection.not_run],
        "missing": collection.missing,
    }
    lines = [f"  {json.dumps(key)}: {_json(value)}," for key, value in head.items()]
    cells = ",\n".join(f"    {_json(_line(record))}" for record in collection.records)
    text = "\n".join(["{", *lines, '  "cells": [', *([cells] if cells else []), "  ]", "}", ""])
    path = folder / CELLS
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(path, text.encode())
    except OSError as error:
        raise ResultsError(
            f"Expected to write {path}, but got: {error}. Make room or give write access; "
            "`bpn-bench collect` makes it without running anything."
        ) from error
    return path


def read_collection(path: Path) -> Collection:
    """Read a cells.json, or the one of a folder; a run in it that is damaged is left out.

    Raises:
        ResultsError: it is missing, no JSON, of another version, or lacks a key.
    """
    path = path / CELLS if path.is_dir() else path
    what, remedy = "what bpn-bench keeps of a grid", "Run the grid, or `bpn-bench collect`."
    found = read_schema(path, _Kept, SCHEMA_VERSION, what, remedy)
    records, left_out = [], []
    for number, cell in enumerate(found["cells"], start=1):
        try:
            records.append(_read_record(cell))
        # One that somebody made up can lead to anything, and the others count all the same.
        except Exception as error:  # noqa: BLE001
            why = f"{type(error).__name__}: {error!s:.200}"
            left_out.append(f"Run {number} of {path} is left out: it is damaged or made up. {why}.")
    if left_out and not records:
        raise ResultsError(
            f"Expected {path} to hold a run that can be read, but got none. {left_out[0]} Collect the "
            "runs again."
        )
    try:
        grid = found["grid"]
        return Collection(
            name=grid["name"],
            title=grid["title"],
            text=grid["text"],
            compare=tuple((first, second) for first, second in grid["compare"]),
            report=tuple(grid["report"]),
            not_run=tuple(
                NotRun(one["experiment"], tuple(one["methods"]), one["reason"])
                for one in found["not_run"]
            ),
            missing=tuple(found["missing"]),
            records=tuple(records),
            left_out=tuple(left_out),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ResultsError(
            f"Expected {path} to have all the keys of its version, but got an error at {error}. "
            "Collect the runs again."
        ) from error


class _KeptGrid(TypedDict):
    name: str
    title: str
    text: str
    compare: list[list[str]]
    report: list[str]


class _KeptAdded(TypedDict, total=False):
    conditions: Conditions
    by_class: dict[str, ClassAccuracy]
    validation: Validation


class _KeptResults(_KeptAdded):
    accuracy: Accuracy
    accuracy_task_agnostic: TaskAgnostic | None
    accuracy_after_learning: AfterLearning
    front: FrontRecord | None
    gates: dict[str, GateResults]
    bytes_per_task: BytesPerTask
    bytes_held: BytesHeld
    classes: list[int]
    epochs: list[int]
    provenance: dict[str, Any]


class _KeptCell(TypedDict):
    experiment: str
    method: str
    seed: int
    label: str
    variant: dict[str, Any]
    results: _KeptResults
    matrix: list[list[float | None]]
    curve: list[dict[str, Any]]
    probes: dict[str, Any]


class _Kept(TypedDict):
    """The schema of cells.json."""

    grid: _KeptGrid
    not_run: list[dict[str, Any]]
    missing: list[str]
    cells: list[Any]


def _read_record(cell: Any) -> RunRecord:
    for key, rule, value in violations(cell, _KeptCell, ""):
        raise ValueError(f"{key} is not {rule}, but {value}")
    tasks, epochs = len(cell["matrix"]), cell["results"]["epochs"]
    if not 0 < tasks <= MAX_TASKS or any(
        len(row) != task for task, row in enumerate(cell["matrix"], start=1)
    ):
        raise ValueError("its matrix is no triangle")
    if len(epochs) != tasks or any(not 0 <= number <= MAX_COUNT for number in epochs):
        raise ValueError("it has other epochs than a whole number from 0 on for each task")
    check_curve(cell["curve"], tasks)
    parts = {
        "matrix": _whole(cell["matrix"]),
        "epochs": epochs,
        "task_names": _numbered(tasks),
    }
    return check_record(RunRecord(**{**cell, **parts}))


def _line(record: RunRecord) -> dict[str, Any]:
    """What stands in cells.json of a run."""
    return {name: getattr(record, name) for name in _KeptCell.__annotations__} | {
        "matrix": record.triangle
    }


def _whole(triangle: list[list[float | None]]) -> list[Row]:
    """The matrix of a lower triangle: nothing was measured before training, and of later tasks."""
    tasks = len(triangle)
    return [[None] * tasks, *([*row, *[None] * (tasks - len(row))] for row in triangle)]


def _numbered(tasks: int) -> list[str]:
    return [f"task {task + 1}" for task in range(tasks)]


def _json(value: Any) -> str:
    return json.dumps(_rounded(value), ensure_ascii=False, allow_nan=False)


def _rounded(value: Any) -> Any:
    """Accuracies without digits that say nothing, and null for NaN."""
    if isinstance(value, float):
        return round(value, _DECIMALS) if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {
            key: item if key == "variant" else _rounded(item)  # settings are no accuracies
            for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        return [_rounded(item) for item in value]
    return value
