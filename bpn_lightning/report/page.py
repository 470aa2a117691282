"""The page: one HTML file that needs no network, no server and no other file.

``page.html`` is its template, which escapes every text but the style, the script and matplotlib's SVGs. The script inside is named by its hash in
a content security policy that allows nothing else, so the page runs no other script and asks nobody
for anything, whatever the names in the data are.
"""

import base64
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from jinja2 import Environment, StrictUndefined

from bpn_lightning.analysis.comparison import Comparison, MethodRow
from bpn_lightning.analysis.gates import gate_rows
from bpn_lightning.analysis.record import RunRecord
from bpn_lightning.report import tables
from bpn_lightning.report.metric_tables import metric_tables
from bpn_lightning.report.pictures import (
    Picture,
    bytes_picture,
    calibration_picture,
    curves_picture,
    gates_picture,
    methods_picture,
)
from bpn_lightning.report.reading import Found
from bpn_lightning.report.settings import differing_settings
from bpn_lightning.report.summary import summarize
from bpn_lightning.run.drawing import cell_color

__all__ = ["MOST_DRAWN", "render"]

MOST_DRAWN = 100
"""Runs whose curves are drawn, 0.15 s and 30 kB each; the first seeds first. The tables have all runs."""

MOST_VALUES = 1_000_000
"""Accuracies in the matrices of one page, about 8 MB, beyond which fewer runs are drawn."""

_DECIMALS = 5  # of an accuracy in a matrix; as in cells.json
_SHADES = 100  # colors of a matrix's cells, from 0 to 1


@dataclass(frozen=True)
class Place:
    """What is shown of one experiment.

    Args:
        name: of the experiment, with its label.
        table: of its methods.
        scores: ACC of each method, drawn; None where there is one only, or too many.
        tradeoff: ACC over bytes; None where fewer than two methods know their bytes.
        gates: the table of its gates; None where there are none.
        gate_pictures: of their accuracy over the number of tasks, and of their calibration.
    """

    name: str
    table: tables.PageTable
    scores: Picture | None
    tradeoff: Picture | None
    gates: tables.PageTable | None
    gate_pictures: list[Picture]


def render(found: Found, comparison: Comparison, version: str) -> bytes:
    """The page in UTF-8; the same bytes for the same runs.

    Args:
        found: what was read.
        comparison: of its runs.
        version: of this package.
    """
    runs, drawn = found.runs, _drawn(comparison.rows)
    metrics, metrics_left_out = metric_tables(runs)
    script, settings = _text("page.js"), differing_settings(comparison.rows)
    parts = {
        "found": found,
        "comparison": comparison,
        "version": version,
        "script": script,
        "style": _text("page.css"),
        "policy": _policy(script),
        "data": _data(drawn),
        "summary": summarize(found, comparison),
        "places": [_place(name, comparison.rows) for name in _names(comparison.rows)],
        "tests": tables.tests_table(comparison.tests),
        "drawn": drawn,
        "curves": [curves_picture(record) for record in drawn],
        "streams": list(dict.fromkeys(record.place for record in drawn)),
        "metrics": [tables.metric_page_table(one) for one in metrics],
        "metrics_left_out": metrics_left_out,
        "settings_known": any(run.settings is not None for run in runs),
        "settings": [one for one in settings if not one.own],
        "own_settings": [one for one in settings if one.own],
        "problems": tables.problems_table(found.problems),
    }
    if runs:
        parts["same"], parts["origins"] = tables.provenance(runs)
    parts["titles"] = _titles(parts)
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.policies["json.dumps_kwargs"] = {
        "ensure_ascii": False,
        "allow_nan": False,
        "separators": (",", ":"),
    }
    page = environment.from_string(_text("page.html")).render(parts)
    return f"{page}\n".encode("utf-8", "replace")


def _titles(parts: Mapping[str, Any]) -> dict[str, str]:
    """The sections that have something to show, in order, and their titles."""
    rows, runs = parts["comparison"].rows, parts["found"].runs
    titles = {
        "words": ("In words", True),
        "methods": ("Methods" if len(rows) > 1 else "Scores", rows),
        "tests": ("Differences between methods", len(rows) > 1),
        "gates": ("Without the task ID", any(place.gates for place in parts["places"])),
        "bytes": ("Bytes against accuracy", any(place.tradeoff for place in parts["places"])),
        "stream": ("Over the stream", runs),
        "metrics": ("Other metrics", parts["metrics"]),
        "settings": ("Settings that differ", len(runs) > 1),
        "provenance": ("Provenance", runs),
        "left-out": ("Left out", True),
    }
    return {key: title for key, (title, shown) in titles.items() if shown}


def _policy(script: str) -> str:
    """What the page may do: run its own script, and nothing else; matplotlib's SVGs have style attributes."""
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return f"default-src 'none'; script-src 'sha256-{digest}'; style-src 'unsafe-inline'; img-src data:"


def _text(name: str) -> str:
    return files("bpn_lightning.report").joinpath(name).read_text("utf-8")


def _names(rows: Sequence[MethodRow]) -> list[str]:
    return list(dict.fromkeys(row.place for row in rows))


def _place(name: str, every: Sequence[MethodRow]) -> Place:
    rows = [row for row in every if row.place == name]
    gates = gate_rows(rows)
    drawn = [gates_picture(name, gates), calibration_picture(name, gates)]
    return Place(
        name,
        tables.methods_table(name, rows),
        methods_picture(name, rows),
        bytes_picture(name, rows),
        tables.gates_table(name, gates) if gates else None,
        [picture for picture in drawn if picture is not None],
    )


def _drawn(rows: Sequence[MethodRow]) -> list[RunRecord]:
    """The runs that the page can hold: first seeds first, then in order."""
    first = [row.records[0] for row in rows]
    others = [record for row in rows for record in row.records[1:]]
    kept: set[int] = set()
    total = 0
    for record in [*first, *others]:
        total += sum(map(len, record.matrix))
        if kept and (total > MOST_VALUES or len(kept) == MOST_DRAWN):
            break
        kept.add(id(record))
    return [record for row in rows for record in row.records if id(record) in kept]


def _data(drawn: Sequence[RunRecord]) -> dict[str, Any]:
    """What the script makes matrices of."""
    streams = list(dict.fromkeys(tuple(record.task_names) for record in drawn))
    return {
        "shades": [cell_color(shade / _SHADES) for shade in range(_SHADES + 1)],
        "streams": streams,
        "runs": [
            {
                "label": record.name,
                "stream": streams.index(tuple(record.task_names)),
                "learned": record.learned,
                "matrix": _rounded(record.matrix),
            }
            for record in drawn
        ],
    }


def _rounded(rows: Iterable[Iterable[float | None]]) -> list[list[float | None]]:
    return [[None if v is None else round(v, _DECIMALS) for v in row] for row in rows]
