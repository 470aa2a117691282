"""Find the runs in a folder, and say of everything else that looks like one why it is not shown."""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bpn_lightning.analysis.collection import CELLS, Collection, read_collection
from bpn_lightning.analysis.record import RunRecord, read_run
from bpn_lightning.bench.cell import Cell
from bpn_lightning.errors import ResultsError
from bpn_lightning.files.untrusted import is_inside
from bpn_lightning.report.settings import setting_labels
from bpn_lightning.run.identity import OBSERVED, decides, is_method_folder, other_gates, short

__all__ = ["Found", "Problem", "find_runs"]

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
        runs: by place, setup and seed.
        compare: pairs of methods that grids name for their tests.
        problems: what is not shown, or not whole.
    """

    title: str
    text: str
    runs: list[RunRecord]
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
    problems: list[Problem] = []
    candidates = list(_candidates(folder, problems))
    folders = [path for path in candidates if path.name != CELLS]
    runs = list(_of_folders(folders, folder, problems))
    collections = []
    for path in candidates:
        if path.name == CELLS and (one := _read_cells(path, folder, problems)) is not None:
            names = {run.name for run in runs}
            runs += _of_collection(one, path, folder, set(folders))
            problems += _not_run(one, names)
            collections.append(one)
    if not runs and not problems:
        raise ResultsError(
            f"Expected {folder} to hold runs, but found no results.json and no {CELLS} at or below "
            "it. Name the folder of a run, one above runs, or one of docs/results."
        )
    runs = _tell_apart(runs)
    runs.sort(key=lambda run: (run.place, run.setup, run.seed))
    grid = collections[0] if len(collections) == 1 else None
    return Found(
        title=grid.title if grid else runs[0].name if len(runs) == 1 else folder.resolve().name,
        text=grid.text if grid else "",
        runs=_once(runs, problems),
        compare=list(dict.fromkeys(pair for one in collections for pair in one.compare)),
        problems=problems,
    )


def _of_folders(
    folders: Sequence[Path], root: Path, problems: list[Problem]
) -> Iterator[RunRecord]:
    """Those that are finished; the others are problems."""
    for path in folders:
        where = path.relative_to(root).as_posix()
        if not os.path.lexists(path / "results.json"):
            if not any(path in other.parents for other in folders):  # else it is above runs
                problems.append(_not_finished(path, root))
            continue
        try:
            _refuse_outside(path, root)
            record = _of_folder(path, root)
        except ResultsError as error:
            problems.append(Problem(where, "unreadable", str(error)))
        # One that somebody made up can lead to anything, and the others count all the same.
        except Exception as error:  # noqa: BLE001
            why = f"It is damaged or made up: {type(error).__name__}: {error!s:.200}."
            problems.append(Problem(where, "unreadable", why))
        else:
            problems += [Problem(where, "incomplete", why) for why in record.incomplete.values()]
            yield record


def _read_cells(path: Path, root: Path, problems: list[Problem]) -> Collection | None:
    where = path.relative_to(root).as_posix()
    try:
        collection = read_collection(path)
    except ResultsError as error:
        problems.append(Problem(where, "unreadable", str(error)))
        return None
    problems += [Problem(where, "unreadable", why) for why in collection.left_out]
    return collection


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


def _of_folder(folder: Path, root: Path) -> RunRecord:
    """The run, with what its path says beyond <experiment>/<method>/seed_<n>.

    A grid lays runs of varied values into folders such as ``rank=10,epsilon=0.1``.
    """
    record = read_run(folder)
    parts = list(folder.relative_to(root).parts)
    if parts and parts[-1] == f"seed_{record.seed}":
        parts.pop()
    if parts and is_method_folder(parts[-1], record.method):
        parts.pop()
    if parts and parts[-1] == record.experiment:
        parts.pop()
    varied = [word.partition("=") for part in parts if "=" in part for word in part.split(",")]
    return replace(
        record,
        label="/".join(part for part in parts if "=" not in part),
        variant={key: value for key, _, value in varied},
        source=_where(folder, root),
    )


def _where(folder: Path, root: Path) -> str:
    where = folder.relative_to(root).as_posix()
    return where if where != "." else folder.resolve().name


def _of_collection(
    collection: Collection, path: Path, root: Path, folders: set[Path]
) -> Iterator[RunRecord]:
    """Those of its runs that have no folder here; a grid's `report` lies beside its runs."""
    home = path.parent
    beside = home.parent if home.name == "report" and home != root else home
    inside = "/".join(part for part in home.relative_to(root).parts if part != "report")
    for record in collection.records:
        cell = Cell(
            "",
            record.experiment,
            record.method,
            record.seed,
            record.label,
            tuple(record.variant.items()),
            gate=other_gates(record.method, record.gates),
            front=record.at("front", "name"),
        )
        if cell.folder(beside) not in folders:
            label = ", ".join(filter(None, [inside, record.label]))
            yield replace(record, label=label, source=path.relative_to(root).as_posix())


def _not_finished(folder: Path, root: Path) -> Problem:
    where = _where(folder, root)
    if (folder / "failed.json").exists():
        log = " Its log.txt says why." if (folder / "log.txt").exists() else ""
        return Problem(where, "failed", f"It has a failed.json and no results.json.{log}")
    kept = any((folder / "checkpoints").glob("*.ckpt"))
    return Problem(
        where,
        "not finished",
        "It has no results.json: it is running, or was stopped."
        + (" It has a checkpoint to continue from." if kept else ""),
    )


def _not_run(collection: Collection, finished: Iterable[str]) -> Iterator[Problem]:
    words = {frozenset(name.split(", ")) for name in finished}
    for name in collection.missing:
        if frozenset(name.split(", ")) not in words:  # finished since the collection was made
            yield Problem(name, "not finished", f"The grid {collection.name} asks for it.")
    for one in collection.not_run:
        yield Problem(f"{one.experiment}: {', '.join(one.methods)}", "not run", one.reason)


def _tell_apart(records: Sequence[RunRecord]) -> list[RunRecord]:
    """Put what decides about a result into the names of runs that do not share it.

    A place has one stream, and a setup in it one setting, whose runs differ by their seeds only.
    """
    apart = [
        replace(record, label=", ".join(filter(None, [record.label, label])))
        for group in _grouped(records, lambda record: record.place)
        for record, label in _labeled(group, [_deciding(one, of_stream=True) for one in group])
    ]
    return [
        replace(record, note=label)
        for group in _grouped(apart, lambda record: record.place + "\n" + record.setup)
        for record, label in _labeled(group, [_of_method(one, group) for one in group])
    ]


def _grouped(
    records: Sequence[RunRecord], key: Callable[[RunRecord], str]
) -> Iterable[list[RunRecord]]:
    groups: dict[str, list[RunRecord]] = {}
    for record in records:
        groups.setdefault(key(record), []).append(record)
    return groups.values()


def _labeled(
    records: Sequence[RunRecord], settings: Sequence[Mapping[str, Any] | None]
) -> Iterable[tuple[RunRecord, str]]:
    return zip(records, setting_labels(settings), strict=True)


def _deciding(record: RunRecord, of_stream: bool) -> dict[str, Any] | None:
    """The settings of the stream, or the others, but for those that the run's name has already."""
    named = {f"{short(key)} {value}" for key, value in record.variant.items()}
    if record.settings is None:
        return None
    return {
        key: value
        for key, value in record.settings.items()
        if decides(key)
        and key.startswith("data.") == of_stream
        and key not in ("method", _STREAM_SEED, *OBSERVED)
        and f"{short(key)} {value}" not in named
    }


def _of_method(run: RunRecord, group: Sequence[RunRecord]) -> dict[str, Any] | None:
    """With the stream's own seed, unless all runs have one of their own, or all have the same."""
    settings = _deciding(run, of_stream=False)
    seeds = [_stream_seed(one) for one in group]
    if settings is not None and 1 < len(set(seeds)) < len(seeds):
        settings[_STREAM_SEED] = _stream_seed(run)
    return settings


def _stream_seed(run: RunRecord) -> Any:
    """Of classes, splits and batches; that of the run unless it was set."""
    own = (run.settings or {}).get(_STREAM_SEED)
    return run.seed if own is None else own


def _once(runs: Sequence[RunRecord], problems: list[Problem]) -> list[RunRecord]:
    """Two runs that nothing tells apart would count twice in a mean."""
    kept: dict[str, RunRecord] = {}
    for run in runs:
        if run.name in kept:
            other = kept[run.name].source
            problems.append(
                Problem(run.source, "not shown", f"{run.name} was read from {other} already.")
            )
        else:
            kept[run.name] = run
    return list(kept.values())
