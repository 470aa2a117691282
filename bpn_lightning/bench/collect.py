"""From the folders of a grid's runs to what is kept of them."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from bpn_lightning.analysis.collection import CELLS, Collection, kept, read_collection
from bpn_lightning.analysis.record import RunRecord, read_run
from bpn_lightning.bench.cell import Cell
from bpn_lightning.bench.grid import Grid
from bpn_lightning.bench.runner import state
from bpn_lightning.cli.config_files import read_yaml
from bpn_lightning.errors import ConfigurationError, ResultsError
from bpn_lightning.files.untrusted import read_json
from bpn_lightning.run.identity import defining, differences

__all__ = ["add_to_kept", "check_kept", "collect"]


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
            keys = defining(read_yaml(folder / "config.yaml"))
        except ConfigurationError:
            continue  # only the results were kept
        # A key that a run does not have is one that has no value: it may be newer than the run.
        seeds = _seeds(keys)
        config = {k: v for k, v in keys.items() if v is not None and k not in seeds}
        of_stream = {key: value for key, value in config.items() if key.startswith("data.")}
        place = (cell.experiment, cell.label, cell.variant)
        own = (cell.method, cell.gate, cell.front)
        for group, part in (((*place, own), config), (place, of_stream)):
            other, there = first.setdefault(group, (folder, part))
            different = differences(part, there, 3)
            if different:
                raise ResultsError(
                    f"Expected {folder} and {other} to be runs of one setting, but of these "
                    f"{'; '.join(different)}. Remove the folder that the grid does not mean, so that it "
                    "runs again."
                )


def _seeds(keys: Iterable[str]) -> set[str]:
    """What a run's seed may be given to: its stream, and its front."""
    return {key for key in keys if re.fullmatch(r"data\.init_args\.seed|fronts\.\w+\.seed", key)}


def add_to_kept(collection: Collection, cells: Sequence[Cell], folder: Path) -> Collection:
    """Add rows to those of a folder's cells.json, whose runs may be gone.

    Args:
        collection: of the runs that are there.
        cells: of its grid, whose order the rows have.
        folder: of the report.

    Raises:
        ResultsError: there is no cells.json, or it has some seeds of a row whose others are new: whether they are runs of
            one setting cannot be known.
    """
    earlier = read_collection(folder)
    new = {(one.place, one.setup) for one in collection.records}
    mixed = [one.name for one in earlier.records if (one.place, one.setup) in new]
    if mixed:
        raise ResultsError(
            f"Expected --add to get rows that {folder / CELLS} has no run of, but it has {mixed[0]}. Collect all runs of "
            "the grid without --add, or remove that row from the file."
        )
    order = {_key(cell): number for number, cell in enumerate(cells)}
    records = sorted(
        (*earlier.records, *collection.records),
        key=lambda one: order.get((one.place, one.setup, one.seed), len(order)),
    )
    there = {(one.place, one.setup, one.seed) for one in records}
    missing = tuple(cell.name for cell in cells if _key(cell) not in there)
    return replace(collection, records=tuple(records), missing=missing)


def _key(cell: Cell) -> tuple[str, str, int]:
    """Place, setup and seed, as its record has them."""
    return ", ".join(filter(None, [cell.experiment, cell.label])), cell.row, cell.seed


def check_kept(name: str, records: Sequence[RunRecord] | None, folder: Path) -> None:
    """Refuse a folder whose cells.json has what a new one would not: it may be all that is left.

    Args:
        name: of the grid that is to be written there.
        records: its finished runs; None while they are not known.
        folder: of the report.

    Raises:
        ResultsError: it is of another grid, or has runs that the new one lacks.
    """
    try:
        earlier = read_collection(folder)
    except ResultsError:  # none, mostly
        return
    path = folder / CELLS
    if earlier.name != name:
        raise ResultsError(
            f"Expected {path} to be of the grid {name}, but it is of {earlier.name}. Give another --out."
        )
    if records is None:
        return
    have = {(one.place, one.setup, one.seed) for one in records}
    lost = [one.name for one in earlier.records if (one.place, one.setup, one.seed) not in have]
    if lost:
        more = f" and {len(lost) - 3} more" if len(lost) > 3 else ""
        raise ResultsError(
            f"Expected the runs of {path} to be among those collected now, but {len(lost)} of its "
            f"{len(earlier.records)} are not: {'; '.join(lost[:3])}{more}. Give another --out, or remove "
            "that file if nothing in it is wanted any more."
        )


def _record(cell: Cell, folder: Path, probes: Sequence[str]) -> RunRecord:
    record = read_run(folder)
    for part in ("matrix", "curve"):
        if part in record.incomplete:
            raise ResultsError(record.incomplete[part])
    return replace(
        kept(record),
        experiment=cell.experiment,
        method=cell.method,
        seed=cell.seed,
        label=cell.label,
        variant=dict(cell.variant),
        probes={name: _probe(folder / f"{name}.json") for name in probes},
    )


def _probe(path: Path) -> Any:
    try:
        return read_json(path)
    except (OSError, ValueError) as error:
        raise ResultsError(
            f"Expected {path} to be what a probe of the grid saw, but got: {error}. "
            "Remove the run's folder, so that it runs again with its probes."
        ) from error
