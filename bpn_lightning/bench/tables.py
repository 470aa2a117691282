"""Tables over all methods of an experiment, and the tests between them."""

from bpn_lightning.analysis.artifact import Artifact, seeds_text, slug
from bpn_lightning.analysis.claims import small_test, test_samples
from bpn_lightning.analysis.collection import Collection
from bpn_lightning.analysis.comparison import (
    MethodRow,
    PairedTest,
    compare,
    method_rows,
    score_title,
)
from bpn_lightning.analysis.pictures import Dots, Point, dot_chart, tradeoff_chart
from bpn_lightning.analysis.statistics import Interval, binomial_half, interval, p_text
from bpn_lightning.analysis.table import Cell, Table

__all__ = ["accuracy", "bytes_per_task", "paired_tests"]

_ACC = ("average", "average_task_agnostic")
_SHOWN = ("first_task", "average", "after_learning", "average_task_agnostic")
_BALANCED = ("balanced", "balanced_task_agnostic")


def accuracy(collection: Collection) -> list[Artifact]:
    """What every method reached in each experiment, also by class, what it stored, and how long it took."""
    found = []
    for place in collection.places():
        found.append(_accuracy(collection, place))
        if any(record.at("by_class") for record in collection.of(place)):
            found.append(_classes(collection, place))
    return found


def _accuracy(collection: Collection, place: str) -> Artifact:
    rows, records = method_rows(collection.records, place), collection.of(place)
    balanced = [score for score in _BALANCED if any(row.scores[score] for row in rows)]
    shown = [*_SHOWN, *balanced]
    body: list[list[Cell]] = [
        [
            row.name,
            *(row.scores[score] for score in shown),
            *([test_samples(row.records)] if balanced else []),
            row.bytes_per_task,
            None if row.seconds is None else round(row.seconds),
        ]
        for row in rows
    ]
    titles = [score_title(score, records) for score in shown]
    columns = [
        "method",
        *titles,
        *(["test samples"] if balanced else []),
        "bytes per task",
        "seconds",
    ]
    picture = dot_chart(
        [row.name for row in rows],
        [Dots(score_title(score, records), [row.scores[score] for row in rows]) for score in _ACC],
        title=place,
    )
    seeds = [record.seed for record in records]
    caption = (
        f"{place}, {seeds_text(seeds)}. ACC is the mean over tasks after the last one. Task ID "
        "given: the network is told which task each test image is from. A dash without the task ID: "
        "not measured, or every task has outputs of its own, which cannot be chosen without it."
    )
    if balanced:
        caption += " Balanced: the mean over classes of the accuracy on each."
    caption += _size_of_test(rows)
    name, table = f"accuracy_{slug(place)}", Table(columns, body)
    return Artifact(name, place, caption, table, picture, places=[place])


def _size_of_test(rows: list[MethodRow]) -> str:
    """How far chance in the choice of test samples alone may move an ACC."""
    known = [
        (binomial_half(score.mean, samples), samples)
        for row in rows
        if (samples := test_samples(row.records)) and (score := row.scores["average"]) is not None
    ]
    if not known:
        return ""
    widest, samples = max(known)
    return f" With {samples:,} test samples, the binomial 95 % interval of an ACC is up to ± {widest:.3f}."


def _classes(collection: Collection, place: str) -> Artifact:
    """The accuracy on each class, means over the seeds that tested it."""
    body: list[list[Cell]] = []
    whole: list[list[Cell]] = []
    records = collection.of(place)
    for row in method_rows(collection.records, place):
        for accuracy, score in zip(("accuracy", "accuracy_task_agnostic"), _ACC, strict=True):
            found = _by_class(row, accuracy)
            title = score_title(score, records)
            whole += [[row.name, title, name, of_class] for name, of_class in found.items()]
            if found:
                ends = [f(found, key=lambda name: found[name].mean) for f in (min, max)]
                body.append(
                    [row.name, title, len(found), *(c for e in ends for c in (e, found[e]))]
                )
    columns = (
        "method",
        "of",
        "classes",
        "lowest class",
        "its accuracy",
        "highest class",
        "and its",
    )
    return Artifact(
        f"classes_{slug(place)}",
        f"{place}: accuracy by class",
        f"{place}, {seeds_text(record.seed for record in records)}. The classes with the lowest and the highest "
        "accuracy, over the test samples of all tasks; the CSV has every class.",
        Table(columns, body),
        data=Table(("method", "of", "class", "accuracy"), whole),
    )


def _by_class(row: MethodRow, accuracy: str) -> dict[str, Interval]:
    values: dict[str, list[float | None]] = {}
    for record in row.records:
        found = record.at("by_class", accuracy)
        if found:
            for name, value in zip(found["classes"], found["per_class"], strict=True):
                if value is not None:
                    values.setdefault(name, []).append(value)
    return {name: mean for name, of in values.items() if (mean := interval(of)) is not None}


def bytes_per_task(collection: Collection) -> list[Artifact]:
    """Accuracy over the bytes that one more task adds to what is stored for use, in each experiment."""
    return [_bytes(collection, place) for place in collection.places()]


def _bytes(collection: Collection, place: str) -> Artifact:
    rows = [row for row in method_rows(collection.records, place) if row.bytes_per_task is not None]
    rows.sort(key=lambda row: row.bytes_per_task or 0)
    shown = [score for score in _ACC if any(row.scores[score] for row in rows)]
    titles = [score_title(score, collection.of(place)) for score in shown]
    body: list[list[Cell]] = [
        [row.name, row.bytes_per_task, *(row.scores[score] for score in shown)] for row in rows
    ]
    points = [
        Point(row.name, row.bytes_per_task or 0, [row.scores[score] for score in shown])
        for row in rows
    ]
    caption = (
        f"{place}, {seeds_text(record.seed for record in collection.of(place))}. Bytes that one more task "
        "adds to what is stored for use, measured; rows of the head are not among them. Named are the "
        "methods that no method of fewer bytes beats."
    )
    picture = (
        tradeoff_chart(
            points, titles, xlabel="bytes per task", ylabel="accuracy", title=place, limits=None
        )
        if points and shown
        else None
    )
    table = Table(["method", "bytes per task", *titles], body)
    name, title = f"bytes_{slug(place)}", f"{place}: accuracy over bytes"
    return Artifact(name, title, caption, table, picture, places=[place])


def paired_tests(collection: Collection) -> list[Artifact]:
    """Student's paired t-tests between methods, seed by seed, corrected for their number."""
    scores = ("average", "average_task_agnostic", "first_task")
    pairs = collection.compare
    tests = compare(collection.records, pairs, scores=scores).tests if pairs else []
    named = [(test, f"{test.first.name} - {test.second.name}", _title(test)) for test in tests]
    body: list[list[Cell]] = [
        [
            test.place,
            difference,
            title,
            test.difference.interval,
            test.difference.n,
            p_text(test.difference.p),
            p_text(test.corrected),
        ]
        for test, difference, title in named
    ]
    columns = ("experiment", "difference", "of", "mean", "seeds", "p", "p, corrected")
    names = [f"{test.place} · {name}, {title}" for test, name, title in named]
    picture = dot_chart(
        names,
        [Dots("difference over seeds", [test.difference.interval for test in tests])],
        title="Differences between methods",
        xlabel="difference in accuracy",
        limits=None,
        width=max(7.5, 2.5 + 0.08 * max(map(len, names), default=0)),  # room beside long names
    )
    caption = (
        "Differences seed by seed, with the 95 % interval of their mean and p of the two-sided "
        "paired t-test, before and after Holm's correction for the number of tests here. Without a "
        "p, all seeds differ alike, or there is one only."
    )
    averages = [
        (test, f"{test.place} · {name}") for test, name, _ in named if test.score == "average"
    ]
    small = small_test(
        (name, test.difference.mean, test.first, test.second) for test, name in averages
    )
    caption = " ".join(filter(None, [caption, small]))
    table, places = Table(columns, body), [*dict.fromkeys(test.place for test in tests)]
    return [Artifact("paired_tests", "Paired tests", caption, table, picture, places=places)]


def _title(test: PairedTest) -> str:
    return score_title(test.score, [*test.first.records, *test.second.records])
