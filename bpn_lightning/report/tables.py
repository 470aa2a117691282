"""The page's tables, as data for its template."""

from collections.abc import Sequence
from dataclasses import dataclass

from bpn_lightning.analysis.comparison import MethodRow, PairedTest, score_title
from bpn_lightning.analysis.gates import GateRow
from bpn_lightning.analysis.record import RunRecord
from bpn_lightning.analysis.statistics import Interval, p_text
from bpn_lightning.report.metric_tables import MetricTable
from bpn_lightning.report.reading import Problem
from bpn_lightning.run.gates import GATE_ACCURACIES

__all__ = [
    "Number",
    "PageTable",
    "gates_table",
    "methods_table",
    "metric_page_table",
    "problems_table",
    "provenance",
    "tests_table",
]

FOLDED = 40
"""Rows from which on a table is folded."""

_SCORES = (
    *("average", "average_task_agnostic", "after_learning"),
    *("first_task", "first_task_agnostic", "forgetting"),
    *("balanced", "balanced_task_agnostic"),
)
_IF_KNOWN = ("balanced", "balanced_task_agnostic")


@dataclass(frozen=True)
class Number:
    """A number whose full value stands next to what is shown of it.

    Args:
        value: all of it.
        text: what is shown.
        spread: the half width of its interval, or "".
    """

    value: float
    text: str
    spread: str = ""


Cell = str | Number | None


@dataclass(frozen=True)
class PageTable:
    """A table.

    Args:
        caption: what it shows.
        columns: names; that of the rows' names first.
        rows: as many cells for each; the first is its name, None was not measured.
        sortable: whether a click on a column's name sorts.
        folded: the line that it is behind, or "" where it is short.
    """

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    sortable: bool = False
    folded: str = ""

    def is_number(self, column: int) -> bool:
        """Whether a column holds numbers, which stand at the right."""
        return any(isinstance(row[column], Number) for row in self.rows)


def methods_table(place: str, rows: Sequence[MethodRow]) -> PageTable:
    """What every method of a place reached, stored and took."""
    records = [record for row in rows for record in row.records]
    shown = [s for s in _SCORES if s not in _IF_KNOWN or any(row.scores[s] for row in rows)]
    columns = ["method", *(score_title(score, records) for score in shown)]
    columns += ["bytes per task", "bytes for use", "seconds", "seeds"]
    body = [
        [
            row.name,
            *(_interval(row.scores[score]) for score in shown),
            _number(row.bytes_per_task),
            _number(row.bytes_held),
            None if row.seconds is None else Number(row.seconds, f"{row.seconds:.0f}"),
            ", ".join(map(str, row.seeds)),
        ]
        for row in rows
    ]
    return PageTable(f"Methods on {place}", columns, body, sortable=len(rows) > 1)


def gates_table(place: str, rows: Sequence[GateRow]) -> PageTable:
    """What every gate of a place gave, and what it stores."""
    columns = [
        "modes, gate",
        *GATE_ACCURACIES.values(),
        "modes, task ID given",
        "gate and modes less own class",
        "calibration error",
        "rejection, AUROC",
        "bytes per task",
        "bytes shared",
        "seeds",
    ]
    body = [
        [
            one.name,
            *(_interval(one.average(key)) for key in GATE_ACCURACIES),
            _interval(one.modes_given()),
            _interval(one.gain()),
            _interval(one.calibration_error()),
            _interval(one.rejection()),
            _number(one.bytes_per_task),
            _number(one.bytes_shared),
            ", ".join(map(str, one.row.seeds)),
        ]
        for one in rows
    ]
    return PageTable(f"Gates on {place}", columns, body, sortable=len(rows) > 1)


def tests_table(tests: Sequence[PairedTest]) -> PageTable:
    """The paired tests and their verdicts."""
    columns = ["difference", "of", "mean", "p", "p, corrected", "seeds", "result", "experiment"]
    body = [
        [
            f"{test.first.name} - {test.second.name}",
            score_title(test.score, [*test.first.records, *test.second.records]),
            _interval(test.difference.interval),
            _p(test.difference.p),
            _p(test.corrected),
            _number(test.difference.n),
            test.verdict,
            test.place,
        ]
        for test in tests
    ]
    return PageTable("Paired tests", columns, body, True, _fold(len(body), "All tests"))


def metric_page_table(table: MetricTable) -> PageTable:
    """Of a metric of the module's own."""
    body = [[name, *map(_number, values)] for name, values in table.rows]
    sortable = len(body) > 1 and not table.folded
    folded = table.caption if table.folded else ""
    return PageTable(table.caption, table.columns, body, sortable, folded)


def problems_table(problems: Sequence[Problem]) -> PageTable:
    """What is not shown, or not whole."""
    body = [[problem.where, problem.state, problem.why] for problem in problems]
    folded = _fold(len(body), "All that is not shown, or not whole")
    return PageTable("Not shown, or not whole", ["what", "state", "why"], body, folded=folded)


def provenance(records: Sequence[RunRecord]) -> tuple[dict[str, str], PageTable | None]:
    """What the runs have in common, and a table of the rest where there are several."""
    facts = [_facts(record) for record in records]
    keys = list(dict.fromkeys(key for one in facts for key in one))
    same = {key: facts[0][key] for key in keys if len({one.get(key) for one in facts}) == 1}
    if len(records) == 1:
        return same, None
    differ = [key for key in keys if key not in same]
    body = [
        [record.name, *(one.get(key, "-") for key in differ), record.source]
        for record, one in zip(records, facts, strict=True)
    ]
    columns = ["run", *differ, "read from"]
    caption = "Where each run comes from"
    return same, PageTable(caption, columns, body, True, _fold(len(body), "All runs"))


def _facts(record: RunRecord) -> dict[str, str]:
    """What provenance says, as texts."""
    seconds = record.at("provenance", "seconds")
    before = record.at("provenance", "continues") or {}
    found = {
        "ended": record.at("provenance", "date"),
        "seconds": None if seconds is None else f"{seconds:.1f}",
        "commit": _short(record.at("provenance", "commit")),
        "host": record.at("provenance", "host", "name"),
        "platform": record.at("provenance", "host", "platform"),
        "CPU": record.at("provenance", "host", "cpu"),
        "GPU": record.at("provenance", "host", "gpu") or "none",
        "threads": record.at("provenance", "host", "threads"),
        **(record.at("provenance", "versions") or {}),
    }
    if before:
        ended = before["date"] or "at an unknown time"
        found["continues"] = f"{before['run']} ({before['tasks']} tasks, ended {ended})"
    return {key: "not kept" if value is None else str(value) for key, value in found.items()}


def _short(commit: str | None) -> str:
    """Twelve digits name a commit, and whether the checkout differed from it."""
    if commit is None:
        return "not known (an installed package)"
    return commit[:12] + ("-dirty" if commit.endswith("-dirty") else "")


def _number(value: float | None) -> Number | None:
    if value is None:
        return None
    return Number(value, f"{value:,}" if isinstance(value, int) else f"{value:.3f}")


def _interval(value: Interval | None) -> Number | None:
    if value is None:
        return None
    spread = "" if value.half is None else f"± {value.half:.3f}"
    return Number(value.mean, f"{value.mean:.3f}", spread)


def _p(value: float | None) -> Number | None:
    return None if value is None else Number(value, p_text(value) or "")


def _fold(rows: int, title: str) -> str:
    return f"{title} ({rows} rows)" if rows > FOLDED else ""
