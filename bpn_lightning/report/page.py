"""The page: one HTML file that needs no network, no server and no other file.

It is built as a tree and written by :mod:`xml.etree.ElementTree`, which escapes every text and every
attribute; no HTML is put together from strings. The script inside is named by its hash in a
content security policy that allows nothing else, so the page runs no other script and asks nobody
for anything, whatever the names in the data are.
"""

import base64
import hashlib
import json
from collections.abc import Iterable, Sequence
from importlib.resources import files
from typing import Any
from xml.etree import ElementTree as ET

from bpn_lightning.analysis.comparison import SCORES, Comparison, MethodRow
from bpn_lightning.analysis.record import RunRecord
from bpn_lightning.analysis.statistics import Interval
from bpn_lightning.report.metric_tables import metric_tables
from bpn_lightning.report.reading import Found
from bpn_lightning.report.settings import DifferingSetting, differing_settings
from bpn_lightning.report.summary import summarize

__all__ = ["MOST_VALUES", "render"]

MOST_VALUES = 1_000_000
"""Accuracies in the pictures of one page, about 8 MB. Beyond, the first seeds are drawn only."""

_DECIMALS = 5  # of an accuracy in a picture; as in cells.json

_FOLDED = 40  # rows from which on a table is folded

Child = ET.Element | str | None


def render(found: Found, comparison: Comparison, version: str) -> bytes:
    """The page in UTF-8; the same bytes for the same runs.

    Args:
        found: what was read.
        comparison: of its runs.
        version: of this package.
    """
    places = list(dict.fromkeys(row.place for row in comparison.rows))
    drawn = _drawn(comparison.rows)
    sections = [
        ("words", "In words", _words(found, comparison)),
        (
            "methods",
            "Methods" if len(comparison.rows) > 1 else "Scores",
            _methods(comparison, places),
        ),
        ("tests", "Differences between methods", _tests(comparison)),
        ("bytes", "Bytes against accuracy", _bytes(comparison.rows, places)),
        ("stream", "Over the stream", _stream(found.runs, drawn)),
        ("metrics", "Other metrics", _metrics(found.runs)),
        ("settings", "Settings that differ", _settings(comparison.rows)),
        ("provenance", "Provenance", _provenance(found.runs)),
        ("left-out", "Left out", _left_out(found)),
    ]
    sections = [(key, title, children) for key, title, children in sections if children]
    script = _text("page.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; script-src 'sha256-{digest}'; style-src 'unsafe-inline'; img-src data:"
    page = _e(
        "html",
        _e(
            "head",
            _e("meta", charset="utf-8"),
            _e("meta", http_equiv="Content-Security-Policy", content=policy),
            _e("meta", name="viewport", content="width=device-width, initial-scale=1"),
            _e("meta", name="generator", content=f"bpn-report {version}"),
            _e("link", rel="icon", href="data:,"),
            _e("title", f"{found.title}: continual learning report"),
            _e("style", _text("page.css")),
        ),
        _e(
            "body",
            _e("a", "To the content", href="#words", class_="skip"),
            _e(
                "header",
                _e(
                    "div",
                    _e("h1", found.title),
                    _e("p", *_with_code(found.text)) if found.text else None,
                ),
                _e("button", "Dark page", type="button", id="theme", hidden=""),
            ),
            _e(
                "nav",
                _e("ul", *(_e("li", _e("a", t, href=f"#{k}")) for k, t, _ in sections)),
                aria_label="Sections",
            ),
            _e("main", *(_section(*one) for one in sections)),
            _e(
                "script",
                _json(_data(comparison, places, drawn)),
                type="application/json",
                id="data",
            ),
            _e("script", script),
        ),
        lang="en",
    )
    text = ET.tostring(page, encoding="unicode", method="html")
    return f"<!DOCTYPE html>\n{text}\n".encode("utf-8", "replace")


def _e(tag: str, *children: Child, **attributes: str) -> ET.Element:
    """An element; ``class_`` is class, ``aria_label`` is aria-label."""
    names = {name.rstrip("_").replace("_", "-"): value for name, value in attributes.items()}
    element = ET.Element(tag, names)
    for child in children:
        if isinstance(child, str):
            if len(element):
                element[-1].tail = (element[-1].tail or "") + child
            else:
                element.text = (element.text or "") + child
        elif child is not None:
            element.append(child)
    return element


def _text(name: str) -> str:
    return files("bpn_lightning.report").joinpath(name).read_text("utf-8")


def _json(value: Any) -> str:
    """JSON that cannot end the script element that it stands in."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _with_code(text: str) -> list[Child]:
    """What stands between backticks, as grids write names, becomes code."""
    return [_e("code", part) if n % 2 else part for n, part in enumerate(text.split("`"))]


def _section(key: str, title: str, children: Iterable[Child]) -> ET.Element:
    heading = _e("h2", title, id=f"{key}-title")
    return _e("section", heading, *children, id=key, aria_labelledby=f"{key}-title")


def _list(items: Iterable[str]) -> ET.Element:
    return _e("ul", *(_e("li", item) for item in items))


# ---- tables ---------------------------------------------------------------------------------------


def _table(
    caption: str,
    columns: Sequence[tuple[str, str]],
    rows: Iterable[Sequence[ET.Element]],
    sortable: bool = False,
) -> ET.Element:
    """A table in a frame of its own, in which it scrolls when it is too wide.

    Args:
        caption: what it shows.
        columns: a name and a class for each; sorting is by any but those named "chart".
        rows: cells.
        sortable: whether a click on a column's name sorts.
    """
    heads = []
    for name, kind in columns:
        head = _e("th", name, scope="col", class_=kind)
        if sortable and kind != "chart":
            head.set("data-sort", "")
        if kind == "chart":
            head.append(
                _e("div", _e("span", "0"), _e("span", "0.5"), _e("span", "1"), class_="ends")
            )
        heads.append(head)
    table = _e(
        "table",
        _e("caption", caption),
        _e("thead", _e("tr", *heads)),
        _e("tbody", *(_e("tr", *row) for row in rows)),
    )
    if sortable:
        table.set("class", "sortable")
    return _e("div", table, class_="scroll", tabindex="0", role="region", aria_label=caption)


def _cell(*children: Child) -> ET.Element:
    return _e("td", *children)


def _head(text: str) -> ET.Element:
    return _e("th", text, scope="row")


def _number(value: float | None, text: str = "") -> ET.Element:
    """A number whose full value stands beside what is shown of it."""
    if value is None:
        return _missing()
    shown = text or (f"{value:,}" if isinstance(value, int) else f"{value:.3f}")
    return _e("td", _e("data", shown, value=repr(value)), class_="number")


def _interval(value: Interval | None) -> ET.Element:
    if value is None:
        return _missing()
    cell = _number(value.mean)
    if value.half is not None:
        cell.append(_e("small", f" ± {value.half:.3f}"))
    return cell


def _missing() -> ET.Element:
    words = _e("span", "not measured", class_="hidden")
    return _e("td", _e("span", "-", aria_hidden="true"), words, class_="number")


def _folded(table: ET.Element, rows: int, title: str) -> ET.Element:
    """The table, behind a line to click on where it is long."""
    if rows <= _FOLDED:
        return table
    return _e("details", _e("summary", f"{title} ({rows} rows)"), table)


# ---- sections -------------------------------------------------------------------------------------


def _words(found: Found, comparison: Comparison) -> list[Child]:
    summary = summarize(found, comparison)
    return [
        _list(summary.shown) if summary.shown else None,
        *(
            [_e("h3", "What this does not show"), _list(summary.not_shown)]
            if summary.not_shown
            else []
        ),
    ]


def _methods(comparison: Comparison, places: Sequence[str]) -> list[Child]:
    if not comparison.rows:
        return []
    mark = {
        kind: _e("span", _e("i", class_=f"dot {kind}", style="left:50%"), class_="lane")
        for kind in ("told", "alone")
    }
    children: list[Child] = [
        _e(
            "p",
            "ACC is the mean accuracy over the tasks learned, after the last of them; a range is the "
            "95 % interval of Student's t over seeds, which the picture cuts at 0 and 1. Right after "
            "learning: each task at the moment when it had just been learned. Forgetting: the mean "
            "fall from each task's best moment. A dash: not measured.",
        ),
        _e(
            "div",
            _e("span", mark["told"], "task given (the task oracle)"),
            _e("span", mark["alone"], "no oracle: nobody tells the task"),
            class_="keys",
        ),
    ]
    columns = [
        ("method", ""),
        ("ACC", "chart"),
        ("ACC, task given", "number"),
        ("ACC, no oracle", "number"),
        ("right after learning", "number"),
        ("task 1 at the end", "number"),
        ("task 1, no oracle", "number"),
        ("forgetting", "number"),
        ("bytes per task", "number"),
        ("bytes for use", "number"),
        ("seconds", "number"),
        ("seeds", ""),
    ]
    for place in places:
        rows = [_row(row) for row in comparison.rows if row.place == place]
        children.append(_e("h3", place))
        children.append(_table(f"Methods on {place}", columns, rows, sortable=len(rows) > 1))
    return children


def _row(row: MethodRow) -> list[ET.Element]:
    scores = row.scores
    seconds = row.seconds
    return [
        _head(row.name),
        _cell(_lane(scores["average"], scores["average_task_agnostic"])),
        *(
            _interval(scores[score])
            for score in (
                *("average", "average_task_agnostic", "after_learning"),
                *("first_task", "first_task_agnostic", "forgetting"),
            )
        ),
        _number(row.bytes_per_task),
        _number(row.bytes_held),
        _number(seconds, "" if seconds is None else f"{seconds:.0f}"),
        _cell(", ".join(map(str, row.seeds))),
    ]


def _lane(told: Interval | None, alone: Interval | None) -> ET.Element:
    """A picture of two scores; the numbers stand beside it."""
    lane = _e("div", class_="lane", aria_hidden="true")
    for kind, value in (("told", told), ("alone", alone)):
        if value is None:
            continue
        if value.half is not None:
            low, high = (_percent(value.mean + sign * value.half) for sign in (-1, 1))
            style = f"left:{low:.2f}%;width:{high - low:.2f}%"
            lane.append(_e("i", class_=f"range {kind}", style=style))
        lane.append(_e("i", class_=f"dot {kind}", style=f"left:{_percent(value.mean):.2f}%"))
    return lane


def _percent(value: float) -> float:
    return 100 * min(1.0, max(0.0, value))


def _tests(comparison: Comparison) -> list[Child]:
    if len(comparison.rows) < 2:
        return []
    intro = _e(
        "p",
        f"Tested: {comparison.pairs}. Student's paired t-test, two-sided, over the seeds that both "
        "have; p is corrected by Holm's method for all the tests of this page. “No difference "
        "shown” does not mean that there is none: with few seeds only large ones are found.",
    )
    if not comparison.tests:
        return [intro]
    columns = [
        ("difference", ""),
        ("of", ""),
        ("mean", "number"),
        ("p", "number"),
        ("p, corrected", "number"),
        ("seeds", "number"),
        ("result", ""),
        ("experiment", ""),
    ]
    rows = [
        [
            _head(f"{test.first.name} - {test.second.name}"),
            _cell(SCORES[test.score].title),
            _interval(test.difference.interval),
            _number(test.difference.p, _p(test.difference.p)),
            _number(test.corrected, _p(test.corrected)),
            _number(test.difference.n),
            _cell(test.verdict),
            _cell(test.place),
        ]
        for test in comparison.tests
    ]
    table = _table("Paired tests", columns, rows, sortable=True)
    return [intro, _folded(table, len(rows), "All tests")]


def _p(value: float | None) -> str:
    if value is None:
        return ""
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def _bytes(rows: Sequence[MethodRow], places: Sequence[str]) -> list[Child]:
    known = [row.place for row in rows if row.bytes_per_task is not None]
    with_bytes = {place for place in known if known.count(place) > 1}
    if not with_bytes:
        return []
    children: list[Child] = [
        _e(
            "p",
            "What one more task adds to what is stored for use, and what it buys: upper left is "
            "better. Filled circles: the task is given; hollow diamonds: no oracle. Of more than 16 "
            "methods, those are named that none beats in both. The numbers are in the tables of "
            "methods.",
        )
    ]
    for index, place in enumerate(places):
        if place in with_bytes:
            children.append(_e("h3", place))
            children.append(_e("div", class_="picture bytes", data_place=str(index)))
    return children


def _stream(runs: Sequence[RunRecord], drawn: Sequence[RunRecord]) -> list[Child]:
    if not runs:
        return []
    options = []
    for place in dict.fromkeys(run.place for run in drawn):
        group = _e("optgroup", label=place)
        for index, run in enumerate(drawn):
            if run.place == place:
                group.append(_e("option", f"{run.setup}, seed {run.seed}", value=str(index)))
        options.append(group)
    note = None
    if len(drawn) < len(runs):
        note = _e(
            "p",
            f"{len(drawn)} of {len(runs)} runs can be chosen here: the page would be too large with "
            "all of them. bpn-report on the folder of another run shows it.",
            class_="note",
        )
    return [
        _e("noscript", _e("p", "The pictures here are drawn by a script, which is switched off.")),
        note,
        _e(
            "div",
            _e("label", "Run ", _e("select", *options, id="run")),
            _e(
                "label",
                "After task ",
                _e("input", type="range", id="moment", min="0", max="1", step="1"),
                _e("output", id="moment-text", for_="moment"),
            ),
            class_="controls",
        ),
        _e("p", id="state", aria_live="polite"),
        _e(
            "div",
            _e(
                "div",
                _e("h3", "Accuracy matrix, task given"),
                _picture("heat", "Accuracy matrix. Arrow keys read single values.", "reading"),
                _e(
                    "p",
                    "Point at a cell, or use the arrow keys in the matrix.",
                    id="reading",
                    class_="reading",
                    aria_live="polite",
                ),
                _e("h3", "Each task at this moment"),
                _e("div", class_="picture", id="bars"),
                _e("p", "Grey: tasks still to come. Dashed: mean of those learned.", class_="note"),
            ),
            _e(
                "div",
                _e("h3", "Each task over the stream"),
                _picture("curves", "Accuracies over the stream. Arrow keys move.", "curve-reading"),
                _e("div", id="legend"),
                _e(
                    "p",
                    "Point at a moment, or use the arrow keys in the picture.",
                    id="curve-reading",
                    class_="reading",
                    aria_live="polite",
                ),
            ),
            class_="pair",
        ),
        _e(
            "details",
            _e("summary", "The matrix as a table"),
            _e(
                "div",
                _e("table", id="values-table"),
                class_="scroll",
                tabindex="0",
                role="region",
                aria_label="The matrix as a table",
            ),
            id="values",
        ),
    ]


def _picture(key: str, label: str, reading: str) -> ET.Element:
    return _e(
        "div",
        class_="picture",
        id=key,
        tabindex="0",
        role="group",
        aria_label=label,
        aria_describedby=reading,
    )


def _metrics(runs: Sequence[RunRecord]) -> list[Child]:
    tables, left_out = metric_tables(runs)
    if not tables:
        return []
    children: list[Child] = [
        _e(
            "p",
            "What the module's metrics came to on each task's test set after the last task, with the "
            "task given. Rows and columns that have numbers only are the head's columns, from 0.",
        )
    ]
    for table in tables:
        columns = [(name, "number" if index else "") for index, name in enumerate(table.columns)]
        rows = [[_head(name), *map(_number, values)] for name, values in table.rows]
        shown = _table(table.caption, columns, rows, sortable=len(rows) > 1 and not table.folded)
        if table.folded:
            shown = _e("details", _e("summary", table.caption), shown)
        children.append(shown)
    if left_out:
        text = f"{left_out} tables are left out, for size: their numbers are in each results.json."
        children.append(_e("p", text, class_="note"))
    return children


def _settings(rows: Sequence[MethodRow]) -> list[Child]:
    if sum(len(row.records) for row in rows) < 2:
        return []
    if all(run.settings is None for row in rows for run in row.records):
        return [_e("p", "No config.yaml was kept with these runs.")]
    found = differing_settings(rows)
    if not found:
        return [_e("p", "None: the runs have one configuration, but for their seed.")]
    shared = [setting for setting in found if not setting.own]
    own = [setting for setting in found if setting.own]
    children: list[Child] = [
        _setting_table("Settings with several values", shared)
        if shared
        else _e("p", "No setting that several methods have differs between them.")
    ]
    if own:
        title = f"Settings that only some methods have ({len(own)})"
        children.append(_e("details", _e("summary", title), _setting_table(title, own)))
    return children


def _setting_table(caption: str, found: Sequence[DifferingSetting]) -> ET.Element:
    rows = []
    for setting in found:
        key = _e("th", setting.key, scope="rowgroup", rowspan=str(len(setting.values)))
        for index, (value, methods) in enumerate(setting.values):
            cells = [_cell(value), _cell(", ".join(methods))]
            rows.append(cells if index else [key, *cells])
    return _table(caption, [("setting", ""), ("value", ""), ("methods", "")], rows)


def _provenance(runs: Sequence[RunRecord]) -> list[Child]:
    if not runs:
        return []
    facts = [_facts(run) for run in runs]
    keys = list(dict.fromkeys(key for one in facts for key in one))
    same = [key for key in keys if len({one.get(key) for one in facts}) == 1]
    differ = [key for key in keys if key not in same]
    pairs = [_e(tag, text) for key in same for tag, text in (("dt", key), ("dd", facts[0][key]))]
    columns = [("run", ""), *((key, "") for key in differ), ("read from", "")]
    rows = [
        [
            _head(run.name),
            *(_e("td", one.get(key, "-"), class_="nowrap") for key in differ),
            _cell(run.source),
        ]
        for run, one in zip(runs, facts, strict=True)
    ]
    table = _table("Where each run comes from", columns, rows, sortable=len(rows) > 1)
    title = "The same for all runs" if len(runs) > 1 else "This run"
    return [
        _e("h3", title) if pairs else None,
        _e("dl", *pairs) if pairs else None,
        *([_e("h3", "Each run"), _folded(table, len(rows), "All runs")] if len(runs) > 1 else []),
    ]


def _facts(run: RunRecord) -> dict[str, str]:
    """What provenance says, as texts."""
    seconds = run.at("provenance", "seconds")
    found = {
        "ended": run.at("provenance", "date"),
        "seconds": None if seconds is None else f"{seconds:.1f}",
        "commit": _short(run.at("provenance", "commit")),
        "host": run.at("provenance", "host", "name"),
        "platform": run.at("provenance", "host", "platform"),
        "CPU": run.at("provenance", "host", "cpu"),
        "GPU": run.at("provenance", "host", "gpu") or "none",
        "threads": run.at("provenance", "host", "threads"),
        **(run.at("provenance", "versions") or {}),
    }
    return {key: "not kept" if value is None else str(value) for key, value in found.items()}


def _short(commit: str | None) -> str:
    """Twelve digits name a commit, and whether the checkout differed from it."""
    if commit is None:
        return "not known (an installed package)"
    return commit[:12] + ("-dirty" if commit.endswith("-dirty") else "")


def _left_out(found: Found) -> list[Child]:
    if not found.problems:
        return [_e("p", "Nothing: every run that was found is shown whole.")]
    rows = [
        [_head(problem.where), _cell(problem.state), _cell(problem.why)]
        for problem in found.problems
    ]
    columns = [("what", ""), ("state", ""), ("why", "")]
    table = _table("Not shown, or not whole", columns, rows)
    return [_folded(table, len(rows), "All that is not shown, or not whole")]


# ---- data for the pictures ------------------------------------------------------------------------


def _drawn(rows: Sequence[MethodRow]) -> list[RunRecord]:
    """The runs whose pictures the page can hold: first seeds first, then in order."""
    first = [row.records[0] for row in rows]
    others = [run for row in rows for run in row.records[1:]]
    kept: set[int] = set()
    total = 0
    for run in [*first, *others]:
        total += sum(len(row) for row in run.matrix)
        total += sum(len(row) for row in run.moments.accuracy) if _finer(run) else 0
        if total > MOST_VALUES and kept:
            break
        kept.add(id(run))
    return [run for row in rows for run in row.records if id(run) in kept]


def _finer(run: RunRecord) -> bool:
    """Whether the curve has more than the matrix."""
    return len(run.moments.at) != run.learned + 1


def _data(
    comparison: Comparison, places: Sequence[str], drawn: Sequence[RunRecord]
) -> dict[str, Any]:
    streams = list(dict.fromkeys(tuple(run.task_names) for run in drawn))
    return {
        "streams": streams,
        "runs": [
            {
                "label": run.name,
                "stream": streams.index(tuple(run.task_names)),
                "learned": run.learned,
                "matrix": _rounded(run.matrix),
                "curve": {
                    "unit": run.moments.unit,
                    "at": run.moments.at,
                    "starts": run.moments.starts,
                    "y": _rounded(run.moments.accuracy),
                },
            }
            for run in drawn
        ],
        "rows": [
            {
                "place": places.index(row.place),
                "method": row.name,
                "bytes": row.bytes_per_task,
                "told": _point(row.scores["average"]),
                "alone": _point(row.scores["average_task_agnostic"]),
            }
            for row in comparison.rows
        ],
    }


def _rounded(rows: Iterable[Iterable[float | None]]) -> list[list[float | None]]:
    return [[None if v is None else round(v, _DECIMALS) for v in row] for row in rows]


def _point(value: Interval | None) -> dict[str, Any] | None:
    if value is None:
        return None
    return {"mean": value.mean, "half": value.half, "text": value.text()}
