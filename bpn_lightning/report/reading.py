"""Find the runs in a folder, and say of everything else that looks like one why it is not shown."""

import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any, cast

from bpn_lightning.bench.collection import (
    CELLS,
    MAX_COUNT,
    Collection,
    Record,
    check_values,
    is_between,
    read_collection,
)
from bpn_lightning.bench.grid import Cell, short
from bpn_lightning.cli.config_files import read_yaml
from bpn_lightning.errors import ConfigurationError, ResultsError
from bpn_lightning.report.labels import setting_labels
from bpn_lightning.run.identity import OBSERVED, decides
from bpn_lightning.run.results import read_matrix_rows, read_results
from bpn_lightning.run.schema import MAX_TASKS
from bpn_lightning.untrusted import is_inside

__all__ = ["Curve", "Found", "Problem", "Run", "find_runs"]

Row = list[float | None]

# What a run leaves in its folder before results.json, which comes last.
_BEGUN = ("config.yaml", "checkpoints", "failed.json")

# Folders without runs, some of which have a config.yaml of their own.
_SKIPPED = ("checkpoints", "figures", "lightning_logs", "mlruns", "wandb")

_READ = ("results.json", "config.yaml", "accuracy_matrix.csv")

MAX_FOLDERS = 100_000
"""Folders that are looked at for runs."""

MAX_DEPTH = 32
"""How deep they may lie."""

_STREAM_SEED = "data.init_args.seed"

_JOINT = " · "  # between an experiment and what sets its runs apart from others of that name


@dataclass(frozen=True)
class Curve:
    """Accuracies at moments of the stream, each task's since it began to be learned.

    Args:
        unit: what ``at`` counts: "epochs", or "tasks learned".
        at: ``(moments,)``, how far the stream had come.
        accuracy: ``(moments, tasks)``; None before a task began, and where not measured.
        starts: how far the stream had come when each task began.
    """

    unit: str
    at: list[float]
    accuracy: list[Row]
    starts: list[float]


@dataclass(frozen=True)
class Run:
    """A run that has results.

    Args:
        source: where it was read, from the folder that was asked for.
        place: the experiment, and what sets its runs apart from others of that name: folders, and
            values of the stream.
        method: its name, with the values that a grid varied, and those in which runs of this name
            differ; runs of one place and method differ by their seed.
        seed: its seed.
        results: as :class:`bpn_lightning.run.results.Results`, as far as a cells.json keeps them.
        task_names: a text for each task of the stream.
        matrix: ``(tasks + 1, tasks)``; row 0 before training, None where not measured.
        curve: accuracies over the stream.
        settings: of config.yaml, by dotted keys; None where they were not kept, as in a cells.json.
    """

    source: str
    place: str
    method: str
    seed: int
    results: Mapping[str, Any]
    task_names: list[str]
    matrix: list[Row]
    curve: Curve
    settings: Mapping[str, Any] | None

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.place}, {self.method}, seed {self.seed}"

    @property
    def tasks(self) -> int:
        """Of the stream."""
        return len(self.task_names)

    @property
    def learned(self) -> int:
        """How many of them were learned."""
        rows = (n for n, row in enumerate(self.matrix) if any(v is not None for v in row))
        return max(rows, default=0)

    def at(self, *keys: str) -> Any:
        """A value of the results by its keys; None where a part of the way is null or not kept."""
        value: Any = self.results
        for key in keys:
            value = None if value is None else value.get(key)
        return value


@dataclass(frozen=True)
class Problem:
    """Something that is not shown, or not whole.

    Args:
        where: a path from the folder that was asked for, or a run's name.
        state: "not finished", "failed", "unreadable", "incomplete", "not run" or "not shown".
        why: a sentence.
    """

    where: str
    state: str
    why: str


@dataclass(frozen=True)
class Found:
    """What lies in a folder.

    Args:
        title: of a grid, or the folder's name.
        text: of a grid, or "".
        runs: by place, method and seed.
        compare: pairs of methods that grids name for their tests.
        problems: what is not shown, or not whole.
    """

    title: str
    text: str
    runs: list[Run]
    compare: list[tuple[str, str]]
    problems: list[Problem]


def find_runs(folder: Path) -> Found:
    """Read a run, or all runs and collections (cells.json) at and below a folder.

    Runs that a collection repeats, because it was made of them, are taken once, from their folders.

    Raises:
        ResultsError: there is no such folder, or nothing in it that looks like a run.
    """
    if folder.is_file() and folder.name == CELLS:
        folder = folder.parent
    if not folder.is_dir():
        raise ResultsError(
            f"Expected {folder} to be the folder of a run, or of several, but there is no such "
            "folder. `bpn-fit` makes runs/<experiment>/<method>/seed_<n>/."
        )
    runs: list[Run] = []
    problems: list[Problem] = []
    candidates = list(_candidates(folder, problems))
    folders = [path for path in candidates if path.name != CELLS]
    for path in folders:
        where = path.relative_to(folder).as_posix()
        if os.path.lexists(path / "results.json"):
            try:
                _refuse_outside(path, folder)
                runs.append(_of_folder(path, folder, problems))
            except ResultsError as error:
                problems.append(Problem(where, "unreadable", str(error)))
            # One that somebody made up can lead to anything, and the others count all the same.
            except Exception as error:  # noqa: BLE001
                why = f"It is damaged or made up: {type(error).__name__}: {error!s:.200}."
                problems.append(Problem(where, "unreadable", why))
        elif not any(path in other.parents for other in folders):  # else it is above runs
            problems.append(_not_finished(path, where))
    collections = []
    for path in candidates:
        if path.name == CELLS:
            try:
                collections.append(read_collection(path))
            except ResultsError as error:
                where = path.relative_to(folder).as_posix()
                problems.append(Problem(where, "unreadable", str(error)))
                continue
            where = path.relative_to(folder).as_posix()
            problems += [Problem(where, "unreadable", why) for why in collections[-1].left_out]
            names = {run.name for run in runs}
            runs += _of_collection(collections[-1], path, folder, set(folders))
            problems += _not_run(collections[-1], names)
    if not runs and not problems:
        raise ResultsError(
            f"Expected {folder} to hold runs, but found no results.json and no {CELLS} at or below "
            "it. Name the folder of a run, one above runs, or one of docs/results."
        )
    runs = _tell_apart(runs)
    runs.sort(key=lambda run: (run.place, run.method, run.seed))
    grid = collections[0] if len(collections) == 1 else None
    return Found(
        title=grid.title if grid else runs[0].name if len(runs) == 1 else folder.resolve().name,
        text=grid.text if grid else "",
        runs=_once(runs, problems),
        compare=list(dict.fromkeys(pair for one in collections for pair in one.compare)),
        problems=problems,
    )


def _candidates(folder: Path, problems: list[Problem]) -> Iterator[Path]:
    """Folders of runs and files of collections, in order.

    Links are followed to what lies in the folder too, each place once.
    """

    def not_shown(path: Path, why: str, state: str = "not shown") -> None:
        problems.append(Problem(path.relative_to(folder).as_posix(), state, why))

    def unreadable(error: OSError) -> None:
        not_shown(
            Path(error.filename), f"Its files cannot be listed: {error.strerror}.", "unreadable"
        )

    root = folder.resolve()
    visited: set[Path] = set()
    for here, folders, files in os.walk(folder, onerror=unreadable, followlinks=True):
        path = Path(here)
        place = path.resolve()
        if place in visited:
            folders.clear()
            continue
        if not place.is_relative_to(root):
            not_shown(path, f"It is a link that leads out of the folder, to {place}. Name {place}.")
            folders.clear()
            continue
        if len(visited) == MAX_FOLDERS:
            why = f"More than {MAX_FOLDERS:,} folders lie here. Name one that is further down."
            not_shown(folder, f"{why} The first that was left out is {path.relative_to(folder)}.")
            return
        visited.add(place)
        if len(path.relative_to(folder).parts) == MAX_DEPTH and folders:
            not_shown(path, f"Its folders lie more than {MAX_DEPTH} deep. Name one further down.")
            folders.clear()
        if CELLS in files:
            yield path / CELLS
        if "results.json" in files:
            yield path
            folders.clear()
        elif any(name in _BEGUN for name in [*folders, *files]):
            yield path
        folders[:] = sorted(f for f in folders if f not in _SKIPPED and not f.startswith("."))


def _refuse_outside(run: Path, root: Path) -> None:
    """Refuse a run whose files lie elsewhere than where it was looked for."""
    for name in _READ:
        if not is_inside(root, run / name):
            raise ResultsError(
                f"Expected {run / name} to lie in {root}, but it is a link to elsewhere. Put the file "
                "itself there."
            )


def _of_folder(folder: Path, root: Path, problems: list[Problem]) -> Run:
    results = cast(dict[str, Any], read_results(folder))
    where = folder.relative_to(root).as_posix()
    tasks = results["tasks"]
    if not 0 < len(tasks) <= MAX_TASKS:
        raise ResultsError(
            f"Expected {folder}/results.json to be of a stream of tasks, {MAX_TASKS:,} at most, but got "
            f"{len(tasks) or 'none'}."
        )
    try:
        matrix = [[_known(value) for value in row] for row in read_matrix_rows(folder)]
        if len(matrix) != len(tasks) + 1:
            raise ResultsError(
                f"Expected {folder}/accuracy_matrix.csv to have a column for each of the "
                f"{len(tasks)} tasks of results.json, but got {len(matrix) - 1}."
            )
    except ResultsError as error:
        problems.append(Problem(where, "incomplete", str(error)))
        matrix = _last_row_only(results)
    epochs = [task["epochs"] for task in tasks]
    settings = None
    try:
        settings = _flat(read_yaml(folder / "config.yaml"))
    except ConfigurationError as error:
        problems.append(Problem(where, "incomplete", f"Its settings are not known. {error}"))
    curve = _curve(None, matrix, epochs)
    try:
        curve = _curve(results["extra"].get("curve"), matrix, epochs)
    except (KeyError, TypeError, ValueError) as error:  # `extra` has no schema
        problems.append(Problem(where, "incomplete", f"extra.curve cannot be read: {error!r}."))
    place, method = _names(results, folder.relative_to(root))
    run = Run(
        source=where if where != "." else folder.resolve().name,
        place=place,
        method=method,
        seed=results["seed"],
        results=results,
        task_names=[_task_name(task["id"], task["classes"]) for task in tasks],
        matrix=matrix,
        curve=curve,
        settings=settings,
    )
    try:
        check_values(run.at, [*run.matrix, *run.curve.accuracy], (run.place, run.method))
    except ValueError as error:
        raise ResultsError(
            f"Expected {folder}/results.json to hold what a run can give, but {error}."
        ) from error
    return run


def _of_collection(
    collection: Collection, path: Path, root: Path, folders: set[Path]
) -> Iterator[Run]:
    """Those of its runs that have no folder here; a grid's `report` lies beside its runs."""
    home = path.parent
    beside = home.parent if home.name == "report" and home != root else home
    for record in collection.records:
        variant = tuple(record.variant.items())
        cell = Cell("", record.experiment, record.method, record.seed, record.label, variant)
        if cell.folder(beside) not in folders:
            yield _of_record(record, home, root)


def _of_record(record: Record, home: Path, root: Path) -> Run:
    tasks = len(record.matrix)
    epochs = record.results.get("epochs") or [1] * tasks
    matrix: list[Row] = [[None] * tasks]
    matrix += [[*row, *[None] * (tasks - len(row))] for row in record.matrix]
    inside = [part for part in home.relative_to(root).parts if part != "report"]
    variant = [f"{short(key)} {value}" for key, value in record.variant.items()]
    run = Run(
        source=(home / CELLS).relative_to(root).as_posix(),
        place=_JOINT.join(filter(None, [record.experiment, "/".join(inside), record.label])),
        method=", ".join([record.method, *variant]),
        seed=record.seed,
        results=record.results,
        task_names=[f"task {task + 1}" for task in range(tasks)],
        matrix=matrix,
        curve=_curve(record.curve, matrix, epochs),
        settings=None,
    )
    return run


def _names(results: Mapping[str, Any], path: Path) -> tuple[str, str]:
    """Place and method, with what the path says beyond <experiment>/<method>/seed_<n>.

    A grid lays runs of varied values into folders such as ``rank=10,epsilon=0.1``.
    """
    parts = list(path.parts)
    for own in (f"seed_{results['seed']}", results["method"], results["experiment"]):
        if parts and parts[-1] == own:
            parts.pop()
    varied = [word.replace("=", " ", 1) for p in parts if "=" in p for word in p.split(",")]
    label = "/".join(part for part in parts if "=" not in part)
    place = _JOINT.join(filter(None, [results["experiment"], label]))
    return place, ", ".join([results["method"], *varied])


def _not_finished(folder: Path, where: str) -> Problem:
    where = where if where != "." else folder.resolve().name
    if (folder / "failed.json").exists():
        log = " Its log.txt says why." if (folder / "log.txt").exists() else ""
        return Problem(where, "failed", f"It has a failed.json and no results.json.{log}")
    kept = any((folder / "checkpoints").glob("*.ckpt"))
    return Problem(
        where,
        "not finished",
        "It has no results.json: it is running, or was stopped."
        + (" It has a checkpoint to go on from." if kept else ""),
    )


def _not_run(collection: Collection, finished: Iterable[str]) -> Iterator[Problem]:
    words = {frozenset(name.replace(_JOINT, ", ").split(", ")) for name in finished}
    for name in collection.missing:
        if frozenset(name.split(", ")) not in words:  # finished since the collection was made
            yield Problem(name, "not finished", f"The grid {collection.name} asks for it.")
    for one in collection.not_run:
        yield Problem(f"{one.experiment}: {', '.join(one.methods)}", "not run", one.reason)


def _tell_apart(runs: Sequence[Run]) -> list[Run]:
    """Put what decides about a result into the names of runs that do not share it.

    A place has one stream, and a method in it one setting, whose runs differ by their seeds alone.
    """
    groups: dict[tuple[str, ...], list[Run]] = {}
    for run in runs:
        groups.setdefault((run.place,), []).append(run)
    apart = [
        replace(run, place=f"{run.place}{_JOINT}{label}") if label else run
        for group in groups.values()
        for run, label in _labeled(group, [_deciding(run, of_stream=True) for run in group])
    ]
    groups.clear()
    for run in apart:
        groups.setdefault((run.place, run.method), []).append(run)
    return [
        replace(run, method=f"{run.method}, {label}") if label else run
        for group in groups.values()
        for run, label in _labeled(group, [_of_method(run, group) for run in group])
    ]


def _labeled(
    runs: Sequence[Run], settings: Sequence[Mapping[str, Any] | None]
) -> Iterable[tuple[Run, str]]:
    return zip(runs, setting_labels(settings), strict=True)


def _deciding(run: Run, of_stream: bool) -> dict[str, Any] | None:
    """The settings of the stream, or the others, but for those that the run's name tells already."""
    told = run.method.split(", ")[1:]
    if run.settings is None:
        return None
    return {
        key: value
        for key, value in run.settings.items()
        if decides(key)
        and key.startswith("data.") == of_stream
        and key not in ("method", _STREAM_SEED, *OBSERVED)
        and f"{short(key)} {value}" not in told
    }


def _of_method(run: Run, group: Sequence[Run]) -> dict[str, Any] | None:
    """With the stream's own seed, unless all runs have one of their own, or all have the same."""
    settings = _deciding(run, of_stream=False)
    seeds = [_stream_seed(one) for one in group]
    if settings is not None and 1 < len(set(seeds)) < len(seeds):
        settings[_STREAM_SEED] = _stream_seed(run)
    return settings


def _stream_seed(run: Run) -> Any:
    """Of classes, splits and batches; that of the run unless it was set."""
    own = (run.settings or {}).get(_STREAM_SEED)
    return run.seed if own is None else own


def _once(runs: Sequence[Run], problems: list[Problem]) -> list[Run]:
    """Two runs that nothing tells apart would count twice in a mean."""
    kept: dict[str, Run] = {}
    for run in runs:
        if run.name in kept:
            other = kept[run.name].source
            problems.append(
                Problem(run.source, "not shown", f"{run.name} was read from {other} already.")
            )
        else:
            kept[run.name] = run
    return list(kept.values())


def _task_name(task: int, classes: Sequence[str]) -> str:
    shown = ", ".join(classes)
    if len(shown) > 60:
        shown = f"{shown[:45]}..., {len(classes)} classes"
    return f"task {task + 1}" + (f" ({shown})" if shown else "")


def _last_row_only(results: Mapping[str, Any]) -> list[Row]:
    tasks, learned = len(results["tasks"]), len(results["tasks_learned"])
    matrix: list[Row] = [[None] * tasks for _ in range(tasks + 1)]
    last = results["accuracy"]["per_task"]
    if learned and len(last) == tasks:
        matrix[learned] = list(last)
    return matrix


def _curve(points: Any, matrix: Sequence[Row], epochs: Sequence[int]) -> Curve:
    """The finer moments where a run kept them, else those of the matrix."""
    tasks = len(matrix) - 1
    if points:
        at = [float(point["epoch"]) for point in points]
        rows = [
            [v if k <= point["task"] and x > 0 else None for k, v in enumerate(point["accuracy"])]
            for x, point in zip(at, points, strict=True)
        ]
        if any(len(row) != tasks for row in rows):
            raise ValueError(f"an entry has no accuracy for each of the {tasks} tasks")
        wrong = [point["task"] for point in points if point["task"] not in range(tasks)]
        if wrong or not all(is_between(x, 0, MAX_COUNT) for x in at):
            raise ValueError(f"an entry is of task {wrong[0]!r:.80}" if wrong else "of no epoch")
        begun = range(1 + max(point["task"] for point in points))
        starts = [
            max((x for x, p in zip(at, points, strict=True) if p["task"] < task), default=0.0)
            for task in begun
        ]
        return Curve("epochs", at, rows, starts)
    learned = max((n for n, row in enumerate(matrix) if any(v is not None for v in row)), default=0)
    known = len(epochs) == tasks and all(epochs)
    ends = [float(x) for x in accumulate(epochs if known else [1] * tasks)][:learned]
    return Curve(
        "epochs" if known else "tasks learned",
        ends,
        [[*matrix[n][:n], *[None] * (tasks - n)] for n in range(1, learned + 1)],
        [0.0, *ends[:-1]] if ends else [],
    )


def _flat(value: Any, key: str = "") -> dict[str, Any]:
    """Dotted keys; lists stay whole."""
    if isinstance(value, Mapping) and (value or not key):
        parts = (_flat(item, f"{key}.{name}" if key else str(name)) for name, item in value.items())
        return {name: item for part in parts for name, item in part.items()}
    return {key: value}


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value
