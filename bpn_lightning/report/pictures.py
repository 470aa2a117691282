"""The page's pictures: matplotlib's SVGs, inlined, whose marks carry their values as ``data-value``."""

import re
import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from io import BytesIO
from itertools import pairwise
from xml.etree import ElementTree as ET

from matplotlib import rc_context, style
from matplotlib.figure import Figure

from bpn_lightning.analysis.comparison import MethodRow, score_title
from bpn_lightning.analysis.gates import DRAWN, GateRow, draw_over_tasks
from bpn_lightning.analysis.pictures import Dots, Line, Point, dot_chart, tradeoff_chart
from bpn_lightning.analysis.record import RunRecord
from bpn_lightning.run.drawing import FEW, draw_curves, draw_reliability
from bpn_lightning.run.moments import Moments

__all__ = [
    "Picture",
    "bytes_picture",
    "calibration_picture",
    "curves_picture",
    "gates_picture",
    "inline_svg",
    "methods_picture",
]

MOST_ROWS = 60
"""Methods of a place up to which they are drawn; the table has all."""

MOST_GATES = 14
"""Gates of a place up to which they are drawn; the table has all."""

MOST_READ = 200
"""Moments of a curve whose values can be read in the picture."""

_WIDTH = 6.2  # inches: text is readable when a phone shows it at two thirds of its size
_LONGEST = 28  # characters of a name in a picture
_ACC = ("average", "average_task_agnostic")


@dataclass(frozen=True)
class Picture:
    """A picture for the page.

    Args:
        label: what it shows.
        svg: the element.
    """

    label: str
    svg: str


def methods_picture(place: str, rows: Sequence[MethodRow]) -> Picture | None:
    """ACC of each method, with and without the task ID."""
    if not 1 < len(rows) <= MOST_ROWS:
        return None
    titles = _titles(rows)
    dots = [Dots(titles[score], [row.scores[score] for row in rows]) for score in _ACC]
    figure = dot_chart([_short(row.name) for row in rows], dots, title="", width=_WIDTH)
    known = [score for score in _ACC if any(row.scores[score] is not None for row in rows)]
    values = {f"dots-{n}": _texts(rows, score) for n, score in enumerate(known)}
    return Picture(f"ACC of each method on {place}", inline_svg(figure, values))


def bytes_picture(place: str, rows: Sequence[MethodRow]) -> Picture | None:
    """ACC over the bytes that one more task adds to what is stored for use."""
    known = [row for row in rows if row.bytes_per_task is not None]
    if len(known) < 2:
        return None
    points = [
        Point(_short(row.name), row.bytes_per_task or 0, [row.scores[score] for score in _ACC])
        for row in known
    ]
    titles = _titles(known).values()
    figure = tradeoff_chart(points, [*titles], xlabel="bytes per task", ylabel="ACC", width=_WIDTH)
    values = {f"dots-{n}": _texts(known, score, True) for n, score in enumerate(_ACC)}
    return Picture(f"ACC over bytes per task on {place}", inline_svg(figure, values))


def curves_picture(record: RunRecord) -> Picture:
    """Each task over the stream: a strip for each moment, and a line ``now-k`` after each task."""
    over_stream = record.moments
    figure = draw_curves(over_stream, size=(_WIDTH, 0.64 * _WIDTH))
    axes = figure.axes[0]
    read = _spread_out(len(over_stream.at), MOST_READ)
    at = [over_stream.at[index] for index in read]
    between = [(left + right) / 2 for left, right in pairwise(at)]
    right = max(1.0, over_stream.at[-1])
    with style.context("default"):
        for number, (low, high) in enumerate(pairwise([0.0, *between, right])):
            axes.axvspan(low, high, facecolor="none", gid=f"strip-{number}")
        for task, end in enumerate([0.0, *over_stream.ends]):
            axes.axvline(end, color="black", linewidth=1.5, gid=f"now-{task}")
    values = {f"strip-{n}": [_moment_text(over_stream, index)] for n, index in enumerate(read)}
    return Picture(
        f"Accuracy of each task over the stream of {record.name}", inline_svg(figure, values)
    )


def gates_picture(place: str, rows: Sequence[GateRow]) -> Picture | None:
    """Accuracies of gates over the number of tasks learned: a panel for each, a strip for each number."""
    names = _short_apart([row.name for row in rows])
    lines = {
        title: [
            replace(row.over_stream(key), name=name) for row, name in zip(rows, names, strict=True)
        ]
        for key, title in DRAWN.items()
    }
    panels = [(title, of) for title, of in lines.items() if any(any(line.y) for line in of)]
    if not panels or len(rows) > MOST_GATES:
        return None
    figure = draw_over_tasks(panels, width=_WIDTH)
    values = {}
    for panel, (axes, (title, of)) in enumerate(zip(figure.axes, panels, strict=True)):
        every = sorted({x for line in of for x in line.x})
        read = [every[index] for index in _spread_out(len(every), MOST_READ)]
        low, high = axes.get_xlim()
        edges = [low, *((left + right) / 2 for left, right in pairwise(read)), high]
        for number, (x, strip) in enumerate(zip(read, pairwise(edges), strict=True)):
            gid = f"strip-{panel}-{number}"
            with style.context("default"):
                axes.axvspan(*strip, facecolor="none", gid=gid)
            values[gid] = [_lines_text(title, of, x)]
        axes.set_xlim(low, high)
    return Picture(f"Gates on {place} over the number of tasks", inline_svg(figure, values))


def calibration_picture(place: str, rows: Sequence[GateRow]) -> Picture | None:
    """How often the likeliest task is right, over its probability."""
    found = [(row.name, bins) for row in rows if (bins := row.calibration())]
    names = _short_apart([name for name, _ in found])
    known = {name: bins for name, (_, bins) in zip(names, found, strict=True)}
    if not known or len(known) > MOST_GATES:
        return None
    figure = draw_reliability(known, size=(_WIDTH, 0.8 * _WIDTH))
    values = {
        f"bins-{n}": [
            f"{name}: mean probability {x:.3f}, fraction right {y:.3f}, {count:,} of {total:,} samples"
            for x, y, count in zip(
                bins["confidence"], bins["accuracy"], bins["counts"], strict=True
            )
            if x is not None and y is not None
        ]
        for n, (name, bins) in enumerate(known.items())
        for total in [sum(bins["counts"])]
    }
    return Picture(f"Calibration of gates on {place}", inline_svg(figure, values))


def inline_svg(figure: Figure, values: Mapping[str, Sequence[str]]) -> str:
    """The figure as an element for HTML: text stays text, and marks get their values.

    Args:
        figure: to be drawn.
        values: by the gid of an artist, a text for each of its marks.
    """
    root = ET.fromstring(_draw(figure))
    by_id = {element.get("id", ""): element for element in root.iter()}
    for gid, texts in values.items():
        for text, mark in zip(texts, _marks(by_id[gid]), strict=True):
            mark.set("data-value", text)
    referred = {name for element in root.iter() for name in _references(element)}
    for element in root.iter():
        _plainly(
            element, keep_id=element.get("id", "").startswith(("task-", "now-")), referred=referred
        )
    for size in ("width", "height", "version"):
        root.attrib.pop(size, None)
    root.set("aria-hidden", "true")  # its values are read in a line below it
    return ET.tostring(root, encoding="unicode", short_empty_elements=False)


def _references(element: ET.Element) -> list[str]:
    """The ids that an element's attributes name, as ``#a`` or ``url(#a)``."""
    return [name for value in element.attrib.values() for name in re.findall(r"#([\w-]+)", value)]


def _plainly(element: ET.Element, keep_id: bool, referred: Collection[str]) -> None:
    """Leave out what HTML does not need: namespaces, most ids, space, hundredths of a point."""
    for child in [child for child in element if _tag(child) == "style"]:
        element.remove(child)  # it would hold for the whole page
    if not keep_id and element.get("id") not in referred:
        element.attrib.pop("id", None)
    for key, value in list(element.attrib.items()):
        del element.attrib[key]
        short = re.sub(r"(\.\d)\d+", r"\1", value) if key in ("d", "x", "y") else value
        element.set(key.rpartition("}")[2], " ".join(short.split()))
    element.tag = _tag(element)
    if not (element.text or "").strip():
        element.text = None
    element.tail = None


def _draw(figure: Figure) -> bytes:
    buffer = BytesIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    # The browser has its own fonts, and names may be too long for any layout.
    plain = rc_context(
        {
            "svg.fonttype": "none",
            "svg.hashsalt": "bpn_lightning",
            "font.sans-serif": ["DejaVu Sans"],
        }
    )
    with style.context("default"), plain, warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        figure.savefig(buffer, format="svg", metadata=nothing, transparent=True)
    return buffer.getvalue()


def _marks(group: ET.Element) -> list[ET.Element]:
    """What is seen of an artist: its markers, or its one path."""
    defined = {path for part in group.iter() if _tag(part) == "defs" for path in part.iter()}
    marks = [part for part in group.iter() if _tag(part) in ("use", "path")]
    return [mark for mark in marks if mark not in defined]


def _tag(element: ET.Element) -> str:
    return element.tag.rpartition("}")[2]


def _titles(rows: Sequence[MethodRow]) -> dict[str, str]:
    records = [record for row in rows for record in row.records]
    return {score: score_title(score, records) for score in _ACC}


def _texts(rows: Sequence[MethodRow], score: str, with_bytes: bool = False) -> list[str]:
    """A line for each row that has the score."""
    return [
        f"{row.name}, {score_title(score, row.records)}: {value.text()}"
        + (f", {row.bytes_per_task:,} bytes per task" if with_bytes else "")
        for row in rows
        if (value := row.scores[score]) is not None
    ]


def _lines_text(title: str, lines: Sequence[Line], x: float) -> str:
    """What every line has at a number of tasks."""
    found = [(line.name, dict(zip(line.x, line.y, strict=True)).get(x)) for line in lines]
    known = "; ".join(f"{name} {value.text()}" for name, value in found if value is not None)
    tasks = "1 task" if x == 1 else f"{x:g} tasks"
    return f"{title} after {tasks}: {known or 'nothing measured'}"


def _moment_text(over_stream: Moments, index: int) -> str:
    row = over_stream.accuracy[index]
    known = [(task, value) for task, value in enumerate(row, 1) if value is not None]
    if len(known) <= FEW:
        text = ", ".join(f"task {task} {value:.3f}" for task, value in known) or "nothing measured"
    else:
        mean = sum(value for _, value in known) / len(known)
        text = f"mean over {len(known)} tasks {mean:.3f}"
    return f"{over_stream.at[index]:g} {over_stream.unit}: {text}"


def _spread_out(count: int, most: int) -> list[int]:
    """Indices from the first to the last, so many at most."""
    if count <= most:
        return list(range(count))
    return [round(n * (count - 1) / (most - 1)) for n in range(most)]


def _short_apart(names: Sequence[str]) -> list[str]:
    """Short names that stay different."""
    short = [_short(name) for name in names]
    return [
        f"{number}. {name}" if short.count(name) > 1 else name
        for number, name in enumerate(short, start=1)
    ]


def _short(name: str) -> str:
    """A name that fits beside a picture, and that every encoding takes."""
    plain = "".join(letter if letter.isprintable() else "?" for letter in name)
    return plain if len(plain) <= _LONGEST else f"{plain[: _LONGEST - 1]}…"
