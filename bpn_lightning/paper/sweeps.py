"""Accuracy over a varied setting, and what one method gains over another along it."""

from collections.abc import Sequence

from bpn_lightning.bench.artifact import Artifact
from bpn_lightning.bench.collection import Collection, Record
from bpn_lightning.bench.grid import short
from bpn_lightning.bench.pictures import Dots, Line, dot_chart, line_chart
from bpn_lightning.bench.statistics import Interval, interval, paired
from bpn_lightning.bench.tables import Cell, Table
from bpn_lightning.paper.accuracy import AVERAGE, AVERAGE_ALONE, FIRST, LEARNED, slug

__all__ = ["gains", "sweeps"]

_SCORES = (
    ("task 1 at the end", FIRST),
    ("ACC", AVERAGE),
    ("right after learning", LEARNED),
    ("ACC without the oracle", AVERAGE_ALONE),
)


def sweeps(collection: Collection) -> list[Artifact]:
    """One picture for each key that a place varies: every score over its values."""
    return [
        _sweep(collection, place, key)
        for place in collection.places()
        for key in _keys(collection, place)
    ]


def gains(collection: Collection) -> list[Artifact]:
    """For each pair of ``compare:``, its difference over the varied key, and each one's own best."""
    return [
        _gain(collection, place, key, first, second)
        for place in collection.places()
        for key in _keys(collection, place)
        for first, second in collection.compare
        if _values(collection, place, key, first) and _values(collection, place, key, second)
    ]


def _keys(collection: Collection, place: str) -> list[str]:
    return list(dict.fromkeys(key for r in collection.of(place) for key in r.variant))


def _values(
    collection: Collection, place: str, key: str, method: str
) -> dict[object, list[Record]]:
    """The records of each value; other varied keys have their tables elsewhere."""
    found: dict[object, list[Record]] = {}
    for record in collection.of(place, method):
        if list(record.variant) == [key]:
            found.setdefault(record.variant[key], []).append(record)
    return found


def _sweep(collection: Collection, place: str, key: str) -> Artifact:
    body: list[list[Cell]] = []
    panels: list[tuple[str, list[Line]]] = [(name, []) for name, _ in _SCORES]
    marks: list[tuple[str, Interval | None, Interval | None]] = []
    numeric = True
    for method in collection.methods(place):
        found = _values(collection, place, key, method)
        if not found:
            continue
        numeric = numeric and all(type(value) in (int, float) for value in found)
        for value, records in found.items():
            scores = [interval([r.at(*keys) for r in records]) for _, keys in _SCORES]
            stored = records[0].at("bytes_per_task", "measured")
            body.append([method, str(value), *scores, stored, len(records)])
            marks.append((f"{method}, {value}", scores[1], scores[3]))
        if numeric:
            for (_, lines), (_, keys) in zip(panels, _SCORES, strict=True):
                x = sorted(value for value in found if isinstance(value, int | float))
                y = [interval([r.at(*keys) for r in found[value]]) for value in x]
                lines.append(Line(method, [float(value) for value in x], y))
    title = f"{place}: {short(key)}"
    if numeric:
        shown = [panel for panel in panels if any(v for line in panel[1] for v in line.y)]
        log = all(x > 0 for _, lines in shown for line in lines for x in line.x)
        figure = line_chart(shown, title=title, xlabel=short(key), log=log)
    else:
        dots = [Dots("ACC, the task is given", [acc for _, acc, _ in marks])]
        dots.append(Dots("ACC without the oracle", [alone for *_, alone in marks]))
        figure = dot_chart([name for name, *_ in marks], dots, title=title)
    columns = ("method", short(key), *(name for name, _ in _SCORES), "bytes per task", "seeds")
    caption = f"{place} at several values of `{key}`; mean and 95 % interval over seeds."
    name = f"sweep_{slug(place)}_{slug(short(key))}"
    return Artifact(name, title, caption, Table(columns, body), figure)


def _gain(collection: Collection, place: str, key: str, first: str, second: str) -> Artifact:
    ours = _values(collection, place, key, first)
    theirs = _values(collection, place, key, second)
    shared = sorted(v for v in ours if v in theirs and isinstance(v, int | float))
    body: list[list[Cell]] = []
    differences: list[Interval | None] = []
    for value in shared:
        mean = _difference(ours[value], theirs[value])
        differences.append(mean)
        a, b = _average(ours[value]), _average(theirs[value])
        relative = 100 * (a.mean / b.mean - 1) if a and b and b.mean else None
        body.append([str(value), a, b, mean, relative])
    best = [max((v for v in map(_average, f.values()) if v), key=_mean) for f in (ours, theirs)]
    mean = _difference(*(max(f.values(), key=lambda r: _mean(_average(r))) for f in (ours, theirs)))
    relative = 100 * (best[0].mean / best[1].mean - 1) if best[1].mean else None
    body.append(["each at its own best", best[0], best[1], mean, relative])
    x = [float(value) for value in shared]
    lines = [
        Line(first, x, [_average(ours[value]) for value in shared]),
        Line(second, x, [_average(theirs[value]) for value in shared]),
        Line(f"{second}, at its own best", x, [Interval(best[1].mean, None, 1) for _ in x]),
    ]
    figure = line_chart(
        [("", lines)],
        title=f"{place}: {first} and {second} over {short(key)}",
        xlabel=short(key),
        ylabel="ACC",
        log=all(value > 0 for value in x),
    )
    columns = (short(key), first, second, "difference", "relative, %")
    caption = (
        f"ACC of {first} and {second} at several values of `{key}`, and each at its own best value: "
        "a gain that is there at one value only, and gone when both are at their best, is a gain of "
        "tuning."
    )
    name = f"gain_{slug(place)}_{slug(first)}_over_{slug(second)}"
    return Artifact(name, f"{first} over {second}, {place}", caption, Table(columns, body), figure)


def _difference(ours: Sequence[Record], theirs: Sequence[Record]) -> Interval | None:
    """Seed by seed."""
    found = paired(_scores(ours), _scores(theirs))
    return None if found is None else found.interval


def _scores(records: Sequence[Record]) -> dict[int, float]:
    return {r.seed: r.at(*AVERAGE) for r in records if r.at(*AVERAGE) is not None}


def _average(records: Sequence[Record]) -> Interval | None:
    return interval([record.at(*AVERAGE) for record in records])


def _mean(value: Interval | None) -> float:
    return float("-inf") if value is None else value.mean
