"""Tables over all methods of an experiment, and the tests between them."""

from bpn_lightning.analysis.artifact import Artifact, seeds_text, slug
from bpn_lightning.analysis.collection import Collection
from bpn_lightning.analysis.comparison import SCORES, compare, method_rows
from bpn_lightning.analysis.pictures import Dots, Point, dot_chart, tradeoff_chart
from bpn_lightning.analysis.statistics import p_text
from bpn_lightning.analysis.table import Cell, Table

__all__ = ["accuracy", "bytes_per_task", "paired_tests"]

_ACC = ("average", "average_task_agnostic")
_SHOWN = ("first_task", "average", "after_learning", "average_task_agnostic")


def accuracy(collection: Collection) -> list[Artifact]:
    """What every method reached in each experiment, what it stored, and how long it took."""
    return [_accuracy(collection, place) for place in collection.places()]


def _accuracy(collection: Collection, place: str) -> Artifact:
    rows = method_rows(collection.records, place)
    body: list[list[Cell]] = [
        [
            row.name,
            *(row.scores[score] for score in _SHOWN),
            row.bytes_per_task,
            None if row.seconds is None else round(row.seconds),
        ]
        for row in rows
    ]
    columns = ["method", *(SCORES[score].title for score in _SHOWN), "bytes per task", "seconds"]
    picture = dot_chart(
        [row.name for row in rows],
        [Dots(SCORES[score].title, [row.scores[score] for row in rows]) for score in _ACC],
        title=place,
    )
    seeds = [record.seed for record in collection.of(place)]
    caption = (
        f"{place}, {seeds_text(seeds)}. ACC is the mean over tasks after the last one. Task ID "
        "given: the network is told which task each test image is from. A dash without the task ID: "
        "not measured, or every task has outputs of its own, which cannot be chosen without it."
    )
    return Artifact(f"accuracy_{slug(place)}", place, caption, Table(columns, body), picture)


def bytes_per_task(collection: Collection) -> list[Artifact]:
    """Accuracy over the bytes that one more task adds to what is stored for use, in each experiment."""
    return [_bytes(collection, place) for place in collection.places()]


def _bytes(collection: Collection, place: str) -> Artifact:
    rows = [row for row in method_rows(collection.records, place) if row.bytes_per_task is not None]
    rows.sort(key=lambda row: row.bytes_per_task or 0)
    shown = [score for score in _ACC if any(row.scores[score] for row in rows)]
    titles = [SCORES[score].title for score in shown]
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
    return Artifact(
        f"bytes_{slug(place)}", f"{place}: accuracy over bytes", caption, table, picture
    )


def paired_tests(collection: Collection) -> list[Artifact]:
    """Student's paired t-tests between methods, seed by seed, corrected for their number."""
    scores = ("average", "first_task")
    pairs = collection.compare
    tests = compare(collection.records, pairs, scores=scores).tests if pairs else []
    named = [(test, f"{test.first.name} - {test.second.name}") for test in tests]
    body: list[list[Cell]] = [
        [
            test.place,
            difference,
            SCORES[test.score].title,
            test.difference.interval,
            test.difference.n,
            p_text(test.difference.p),
            p_text(test.corrected),
        ]
        for test, difference in named
    ]
    columns = ("experiment", "difference", "of", "mean", "seeds", "p", "p, corrected")
    names = [f"{test.place} · {name}, {SCORES[test.score].title}" for test, name in named]
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
    return [Artifact("paired_tests", "Paired tests", caption, Table(columns, body), picture)]
