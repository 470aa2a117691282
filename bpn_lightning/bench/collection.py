"""What is kept of a grid's runs: one small ``cells.json``, from which every report is made.

It has the grid's words, what was not run or is missing, and for each finished run what its
``results.json`` says and the lower triangle of its accuracy matrix, one run a line. No checkpoint,
no picture and no name of a machine is in it, so it can be committed.
"""

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypedDict, cast

from bpn_lightning.bench.grid import Cell, Grid, NotRun
from bpn_lightning.bench.runner import state
from bpn_lightning.cli.config_files import read_yaml
from bpn_lightning.errors import ConfigurationError, ResultsError
from bpn_lightning.files import write_atomically
from bpn_lightning.metrics.scores import AfterLearning, TaskAgnostic
from bpn_lightning.run.identity import defining, differences
from bpn_lightning.run.results import read_matrix_rows, read_results
from bpn_lightning.run.schema import (
    MAX_TASKS,
    Accuracy,
    BytesHeld,
    BytesPerTask,
    read_schema,
    violations,
)
from bpn_lightning.untrusted import read_json

__all__ = [
    "CELLS",
    "MAX_COUNT",
    "Collection",
    "Record",
    "check_kept",
    "check_values",
    "collect",
    "is_between",
    "read_collection",
    "write_collection",
]

CELLS = "cells.json"

SCHEMA_VERSION = 1
"""Goes up when a key of cells.json is renamed, removed or changes its meaning."""

_DECIMALS = 5  # of an accuracy: a hundredth of what one image of a test set makes


MAX_COUNT = 10**15
"""Of bytes, seconds and epochs."""

_ROUNDING = 1e-6  # of an accuracy that is a sum

# What comparisons count with.
_NUMBERS = (
    *(("accuracy", key) for key in ("average", "first_task", "forgetting", "bwt")),
    *(("accuracy_task_agnostic", key) for key in ("average", "first_task")),
    ("accuracy_after_learning", "average"),
    ("bytes_per_task", "measured"),
    ("bytes_held", "inference"),
    ("provenance", "seconds"),
)

MAX_NAME = 1000
"""Characters of an experiment and of a method."""


@dataclass(frozen=True)
class Record:
    """What is kept of a finished run.

    Args:
        experiment: its name.
        method: its name.
        seed: its seed.
        label: of the grid's entry, or "".
        variant: varied keys and their values.
        results: of results.json, but for what only the run's folder has a use for.
        matrix: row k has the accuracies on tasks 1 to k after task k; None where not measured.
        curve: accuracies at the ends of epochs, ``{epoch, task, accuracy}``; may be empty.
        probes: what they saw after each task, by their names.
    """

    experiment: str
    method: str
    seed: int
    label: str
    variant: dict[str, Any]
    results: dict[str, Any]
    matrix: list[list[float | None]]
    curve: list[dict[str, Any]]
    probes: dict[str, Any] = field(default_factory=dict)

    @property
    def place(self) -> str:
        """The experiment, with its label: what has a table of its own."""
        return f"{self.experiment}, {self.label}" if self.label else self.experiment

    def at(self, *keys: str) -> Any:
        """A value of the results by its keys, or None where a part of the way is null."""
        value: Any = self.results
        for key in keys:
            value = None if value is None else value[key]
        return value


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
    records: tuple[Record, ...]
    left_out: tuple[str, ...] = ()

    def places(self) -> list[str]:
        """Experiments, with their labels, in order."""
        return list(dict.fromkeys(record.place for record in self.records))

    def of(self, place: str | None = None, method: str | None = None) -> list[Record]:
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


def collect(grid: Grid, root: Path) -> Collection:
    """Read what is finished.

    Args:
        grid: whose runs.
        root: where they are.

    Raises:
        ResultsError: a folder holds another run than the grid's, or seeds of a cell differ in more than
            their seed.
    """
    records, left_out = {}, []
    finished = [cell for cell in grid.cells if state(cell, root) == "finished"]
    _check_one_setting(finished, root)
    for cell in grid.cells:
        if cell in finished:
            try:
                # Maps are large, and one seed's are drawn.
                maps_too = cell.seed == grid.cells[0].seed
                probes = [name for name in cell.probes if name != "regions" or maps_too]
                records[cell.name] = _record(cell, cell.folder(root), probes)
            except (ResultsError, ValueError) as error:  # of an earlier release, perhaps
                left_out.append(f"{cell.name} is left out. {error}")
    return Collection(
        name=grid.name,
        title=grid.title,
        text=grid.text,
        compare=grid.compare,
        report=grid.report,
        not_run=grid.not_run,
        missing=tuple(cell.name for cell in grid.cells if cell.name not in records),
        records=tuple(records.values()),
        left_out=tuple(left_out),
    )


def _check_one_setting(cells: Sequence[Cell], root: Path) -> None:
    """Seeds differ by their seeds alone, and methods learn one stream: a mean mixes nothing else."""
    first: dict[object, tuple[Path, dict[str, Any]]] = {}
    for cell in cells:
        folder = cell.folder(root)
        try:
            config = defining(read_yaml(folder / "config.yaml"))
        except ConfigurationError:
            continue  # only the results were kept
        config.pop("data.init_args.seed", None)
        of_stream = {key: value for key, value in config.items() if key.startswith("data.")}
        place = (cell.experiment, cell.label, cell.variant)
        for group, part in (((*place, cell.method), config), (place, of_stream)):
            other, there = first.setdefault(group, (folder, part))
            different = differences(part, there, 3)
            if different:
                raise ResultsError(
                    f"Expected {folder} and {other} to be runs of one setting, but of these "
                    f"{'; '.join(different)}. Remove the folder that the grid does not mean, so that it "
                    "runs again."
                )


def check_kept(name: str, records: Sequence[Record] | None, folder: Path) -> None:
    """Refuse a folder whose cells.json has what a new one would not: it may be all that is left.

    Args:
        name: of the grid that is to be written there.
        records: its finished runs; None while they are not known.
        folder: of the report.

    Raises:
        ResultsError: it is of another grid, or has runs that the new one lacks.
    """
    try:
        kept = read_collection(folder)
    except ResultsError:  # none, mostly
        return
    path = folder / CELLS
    if kept.name != name:
        raise ResultsError(
            f"Expected {path} to be of the grid {name}, but it is of {kept.name}. Give another --out."
        )
    if records is None:
        return
    have = {(one.place, one.method, one.seed, str(one.variant)) for one in records}
    lost = [
        f"{one.place}, {one.method}, seed {one.seed}"
        for one in kept.records
        if (one.place, one.method, one.seed, str(one.variant)) not in have
    ]
    if lost:
        more = f" and {len(lost) - 3} more" if len(lost) > 3 else ""
        raise ResultsError(
            f"Expected the runs of {path} to be among those collected now, but {len(lost)} of its "
            f"{len(kept.records)} are not: {'; '.join(lost[:3])}{more}. Give another --out, or remove "
            "that file if nothing in it is wanted any more."
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
    cells = ",\n".join(f"    {_json(vars(record))}" for record in collection.records)
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


class _KeptResults(TypedDict):
    accuracy: Accuracy
    accuracy_task_agnostic: TaskAgnostic | None
    accuracy_after_learning: AfterLearning
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


def _read_record(cell: Any) -> Record:
    for key, rule, value in violations(cell, _KeptCell, ""):
        raise ValueError(f"{key} is not {rule}, but {value}")
    return _checked(Record(**cell))


def _checked(record: Record) -> Record:
    """The record, whose parts fit each other and can be counted with; else a ValueError."""
    tasks = len(record.matrix)
    if not 0 < tasks <= MAX_TASKS or any(
        len(row) != task for task, row in enumerate(record.matrix, start=1)
    ):
        raise ValueError("its matrix is no triangle")
    if any(not 0 < epochs <= MAX_COUNT for epochs in record.results["epochs"]):
        raise ValueError("it has other epochs than whole numbers from 1 on")
    for point in record.curve:
        if point["task"] not in range(tasks) or not is_between(point["epoch"], 0, MAX_COUNT):
            raise ValueError(f"its curve has a point of epoch {point['epoch']!r:.80}")
    accuracies = [*record.matrix, *(point["accuracy"] for point in record.curve)]
    check_values(record.at, accuracies, (record.experiment, record.method))
    return record


def check_values(
    at: Callable[..., Any], accuracies: Iterable[Iterable[Any]], names: Iterable[str]
) -> None:
    """Refuse what no run can give, and no mean can be taken of.

    Args:
        at: a value of the results by its keys.
        accuracies: of the matrix and the curve; None where not measured.
        names: of the experiment and the method.

    Raises:
        ValueError: says what there is.
    """
    for keys in _NUMBERS:
        value, accuracy = at(*keys), keys[0].startswith("accuracy")
        low, high = (-1, 1) if accuracy else (0, MAX_COUNT)
        if not is_between(value, low, high):
            raise ValueError(f"{'.'.join(keys)} is {value!r:.80}")
    for value in (value for row in accuracies for value in row):
        if not is_between(value, 0, 1):
            raise ValueError(f"an accuracy is {value!r:.80}")
    for name in names:
        if len(name) > MAX_NAME:
            raise ValueError(f"a name has {len(name):,} characters")


def is_between(value: Any, low: float, high: float) -> bool:
    """Whether a value is a number in a range, or was not measured; sums of accuracies are rounded."""
    if value is None:
        return True
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and low - _ROUNDING <= value <= high + _ROUNDING


def _record(cell: Cell, folder: Path, probes: Sequence[str]) -> Record:
    results = cast(dict[str, Any], read_results(folder))
    matrix = [
        [None if math.isnan(value) else value for value in row] for row in read_matrix_rows(folder)
    ]
    curve = results["extra"].get("curve") or []
    provenance = results["provenance"]
    host = {key: value for key, value in provenance["host"].items() if key != "name"}
    kept = {key: results[key] for key in _KEPT}
    kept["classes"] = [len(task["classes"]) for task in results["tasks"]]
    kept["epochs"] = [task["epochs"] for task in results["tasks"]]
    kept["provenance"] = {**provenance, "host": host}
    record = Record(
        experiment=cell.experiment,
        method=cell.method,
        seed=cell.seed,
        label=cell.label,
        variant=dict(cell.variant),
        results=kept,
        matrix=[row[:moment] for moment, row in enumerate(matrix) if moment],
        curve=list(curve),
        probes={name: _probe(folder / f"{name}.json") for name in probes},
    )
    return _checked(record)


def _probe(path: Path) -> Any:
    try:
        return read_json(path)
    except (OSError, ValueError) as error:
        raise ResultsError(
            f"Expected {path} to be what a probe of the grid saw, but got: {error}. "
            "Remove the run's folder, so that it runs again with its probes."
        ) from error


_KEPT = (
    "accuracy",
    "accuracy_task_agnostic",
    "accuracy_after_learning",
    "bytes_per_task",
    "bytes_held",
)


def _json(value: Any) -> str:
    return json.dumps(_rounded(value), ensure_ascii=False, allow_nan=False)


def _rounded(value: Any) -> Any:
    """Accuracies without digits that say nothing, and null for NaN."""
    if isinstance(value, float):
        return round(value, _DECIMALS) if math.isfinite(value) else None
    if isinstance(value, dict):
        return {
            key: item if key == "variant" else _rounded(item)  # settings are no accuracies
            for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        return [_rounded(item) for item in value]
    return value
