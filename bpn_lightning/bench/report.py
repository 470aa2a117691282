"""The report of a grid, made of its cells.json alone, and docs/results.md, made of several."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from bpn_lightning.analysis.artifact import Artifact
from bpn_lightning.analysis.claims import not_comparable, scenarios_of, tuned_apart
from bpn_lightning.analysis.collection import CELLS, Collection, read_collection
from bpn_lightning.analysis.comparison import method_rows
from bpn_lightning.bench.dips import dips
from bpn_lightning.bench.gates import gates
from bpn_lightning.bench.sweeps import gains, sweeps
from bpn_lightning.bench.tables import accuracy, bytes_per_task, paired_tests
from bpn_lightning.bench.variance import order_variance
from bpn_lightning.errors import ResultsError
from bpn_lightning.files.writing import write_atomically
from bpn_lightning.paper.curves import figure_6
from bpn_lightning.paper.many_tasks import figure_7
from bpn_lightning.paper.mechanism import drift, figure_5, moves
from bpn_lightning.paper.tables import parameters, table_1, table_2
from bpn_lightning.terminal import printable

__all__ = ["MAKERS", "make", "report_all", "write_report"]

MAKERS: dict[str, Callable[[Collection], list[Artifact]]] = {
    "accuracy": accuracy,
    "bytes_per_task": bytes_per_task,
    "table_1": table_1,
    "table_2": table_2,
    "figure_6": figure_6,
    "figure_7": figure_7,
    "figure_5": figure_5,
    "drift": drift,
    "parameters": parameters,
    "sweeps": sweeps,
    "gains": gains,
    "paired_tests": paired_tests,
    "gates": gates,
    "dips": dips,
    "moves": moves,
}
"""How each name of ``report:`` is made."""

REPORT = "report.md"


def make(collection: Collection) -> list[Artifact]:
    """All artifacts that the grid asks for; those that have nothing to show yet are left out."""
    found = [one for name in collection.report for one in MAKERS[name](collection)]
    found += order_variance(collection)
    return [_with_missing(one, collection) for one in found if one.table.rows]


def _with_missing(artifact: Artifact, collection: Collection) -> Artifact:
    """The artifact, which says what its rows lack for a claim."""
    if not artifact.places:
        return artifact
    rows = [row for row in method_rows(collection.records) if row.place in artifact.places]
    if not rows:
        return artifact
    caption = " ".join(filter(None, [artifact.caption, scenarios_of(rows), tuned_apart(rows)]))
    return replace(artifact, caption=caption, missing=not_comparable(rows))


def write_report(collection: Collection, folder: Path) -> list[Artifact]:
    """Write every artifact, and report.md with all of them.

    Raises:
        ResultsError: a file cannot be written; those written before are whole.
    """
    for why in collection.left_out:
        print(f"bpn-bench: {printable(why)}", file=sys.stderr)
    artifacts = make(collection)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for artifact in artifacts:
            artifact.write(folder)
        text = f"# {_section(collection, artifacts, '')}\n"
        write_atomically(folder / REPORT, text.encode())
    except OSError as error:
        raise ResultsError(
            f"Expected to write the report into {folder}, but got: {error}. Make room or give write "
            "access; `bpn-bench report` makes it again from cells.json."
        ) from error
    return artifacts


def report_all(folder: Path) -> list[Path]:
    """Make the report of a folder with a cells.json, or of all those below a folder.

    Below a folder, ``<folder>.md`` beside it gets all of them, in the order of the packaged grids.

    Returns:
        The files to be read.

    Raises:
        ResultsError: there is no cells.json, or one cannot be read.
    """
    if (folder / CELLS).is_file():
        write_report(read_collection(folder), folder)
        return [folder / REPORT]
    found = sorted(path.parent for path in folder.glob(f"*/{CELLS}"))
    if not found:
        raise ResultsError(
            f"Expected {folder} to hold {CELLS}, or folders with one, but found none. "
            "`bpn-bench GRID --out DIR` and `bpn-bench collect` write it."
        )
    home = folder.resolve() if folder.name in ("", "..") else folder
    sections = []
    for one in sorted(found, key=_order):
        collection = read_collection(one)
        artifacts = write_report(collection, one)
        sections.append("## " + _section(collection, artifacts, f"{home.name}/{one.name}/"))
    page = home.with_name(f"{home.name}.md")
    write_atomically(page, ("\n\n".join([HEAD.format(home.name), *sections]) + "\n").encode())
    return [page]


HEAD = """\
# Results

<!-- Made by `bpn-bench report docs/{0}` from the cells.json in its folders. Do not edit. -->

What the experiments of Wen et al. give here, compared with the paper's own numbers. Every number is of a run
of `bpn-fit`; each grid is trained, and its section made, by the command under its title. Intervals
are 95 % intervals of Student's t over seeds. "Task ID given" means that the network is told which task
a test image is from, as for the paper's single-head scores; the scores without the task ID (class-incremental) are next to them."""

# The paper's order; what the project adds comes after.
_ORDER = ("digits", "incremental", "toy", "permuted", "eight_datasets")


def _order(folder: Path) -> tuple[int, str]:
    name = folder.name
    return (_ORDER.index(name) if name in _ORDER else len(_ORDER), name)


def _section(collection: Collection, artifacts: Sequence[Artifact], folder: str) -> str:
    """A heading without its marks, the words, and all artifacts."""
    parts = [collection.title, f"    bpn-bench {collection.name}.yaml", collection.text]
    if collection.missing:
        total = len(collection.missing) + len(collection.records)
        names = "; ".join(collection.missing[:6])
        more = "; ..." if len(collection.missing) > 6 else ""
        parts.append(f"{len(collection.missing)} of {total} runs are missing: {names}{more}.")
    parts += [f"Left out: {why}" for why in collection.left_out]
    not_run = (f"Not run: {one.experiment}. {one.reason}" for one in collection.not_run)
    parts += dict.fromkeys(not_run)
    parts += [artifact.markdown(f"{folder}{artifact.name}.png") for artifact in artifacts]
    return "\n\n".join(part for part in parts if part)
