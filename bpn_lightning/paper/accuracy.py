"""Tables over all methods of an experiment, and the tests between them."""

from collections.abc import Sequence
from itertools import pairwise
from statistics import fmean

from bpn_lightning.bench.artifact import Artifact
from bpn_lightning.bench.collection import Collection, Record
from bpn_lightning.bench.grid import short
from bpn_lightning.bench.pictures import Dots, dot_chart
from bpn_lightning.bench.statistics import Interval, holm, interval, paired
from bpn_lightning.bench.tables import Cell, Table
from bpn_lightning.paper import published as paper

__all__ = ["accuracy", "over_seeds", "paired_tests", "parameters", "rows", "table_1", "table_2"]

FIRST = ("accuracy", "first_task")
FIRST_ALONE = ("accuracy_task_agnostic", "first_task")
AVERAGE = ("accuracy", "average")
AVERAGE_ALONE = ("accuracy_task_agnostic", "average")
LEARNED = ("accuracy_after_learning", "average")


def over_seeds(records: Sequence[Record], keys: tuple[str, ...]) -> Interval | None:
    """The mean over seeds of one value; None where a seed lacks it."""
    return interval([record.at(*keys) for record in records])


def rows(collection: Collection, place: str) -> list[tuple[str, list[Record]]]:
    """Name and records of each method, and of each of its variants, in order."""
    found: dict[str, list[Record]] = {}
    for record in collection.of(place):
        parts = (f"{short(key)} {value}" for key, value in record.variant.items())
        found.setdefault(", ".join([record.method, *parts]), []).append(record)
    return list(found.items())


def accuracy(collection: Collection) -> list[Artifact]:
    """What every method reached in each experiment, what it stored, and how long it took."""
    return [_accuracy(collection, place) for place in collection.places()]


def _accuracy(collection: Collection, place: str) -> Artifact:
    found = rows(collection, place)
    body: list[list[Cell]] = [
        [
            name,
            over_seeds(records, FIRST),
            over_seeds(records, AVERAGE),
            over_seeds(records, LEARNED),
            over_seeds(records, AVERAGE_ALONE),
            records[0].at("bytes_per_task", "measured"),
            round(fmean(record.at("provenance", "seconds") for record in records)),
        ]
        for name, records in found
    ]
    columns = [
        *("method", "task 1 at the end", "ACC", "right after learning"),
        *("ACC without the oracle", "bytes per task", "seconds"),
    ]
    picture = dot_chart(
        [name for name, _ in found],
        [
            Dots("ACC, the task is given", [over_seeds(r, AVERAGE) for _, r in found]),
            Dots("ACC without the oracle", [over_seeds(r, AVERAGE_ALONE) for _, r in found]),
        ],
        title=place,
    )
    caption = (
        f"{place}, {_seeds(collection.of(place))}. ACC is the mean over tasks after the last one, "
        "where each image comes with its task's number; without the oracle nobody tells it. A dash "
        "there: not measured, or every task has outputs of its own and there is no answer without it."
    )
    return Artifact(f"accuracy_{slug(place)}", place, caption, Table(columns, body), picture)


def table_1(collection: Collection) -> list[Artifact]:
    """Table I: task 1 after all tasks and bytes per task, ours beside the paper's."""
    body: list[list[Cell]] = []
    marks: list[tuple[str, Interval | None, Interval | None, Interval | None]] = []
    for experiment in paper.TABLE_1:
        published = paper.TABLE_1[experiment] | paper.TABLE_1_FROM_TEXT[experiment]
        reasons = [n.reason for n in collection.not_run if n.experiment == experiment]
        found = {name: (place, r) for place in collection.places()
                 for name, r in rows(collection, place) if r[0].experiment == experiment}  # fmt: skip
        if not found and not reasons and not _missing(collection, experiment):
            continue
        for method in [*found, *(name for name in published if name not in found)]:
            label = found[method][1][0].label if method in found else ""
            records = found[method][1] if method in found else []
            theirs = published.get(method)
            ours = over_seeds(records, FIRST)
            body.append(
                [
                    f"{experiment}, {label}" if label else experiment,
                    method,
                    ours if records else (reasons or ["not run"])[0],
                    _published(method, theirs, experiment),
                    over_seeds(records, FIRST_ALONE),
                    over_seeds(records, AVERAGE),
                    records[0].at("bytes_per_task", "measured") if records else None,
                    records[0].at("bytes_per_task", "paper") if records else None,
                    theirs.bytes if theirs else None,
                ]
            )
            if ours is not None or theirs is not None:
                other = Interval(theirs.first_task, None, 1) if theirs else None
                alone = over_seeds(records, FIRST_ALONE)
                marks.append((f"{experiment.removesuffix('_inc')} · {method}", ours, alone, other))
    columns = [
        *("experiment", "method", "task 1, ours", "task 1, paper", "task 1 without the oracle"),
        *("ACC, ours", "bytes per task, ours", "by the paper's formula", "bytes, paper"),
    ]
    picture = dot_chart(
        [name for name, *_ in marks],
        [
            Dots("ours", [ours for _, ours, _, _ in marks]),
            Dots("ours, without the oracle", [alone for _, _, alone, _ in marks]),
            Dots("paper", [other for *_, other in marks], hollow=True),
        ],
        title="Task 1 after all tasks",
    )
    caption = (
        f"Table I: accuracy on task 1 after all tasks, {_seeds(collection.records)}. Figures of the "
        'paper with "about" follow from percentages in its text. `ewc_task_mask` is the control: '
        "EWC, told the task like the others, with no bias at all. Bytes are of the network that was "
        "built, then of the same network by the paper's formula, then as its table has them."
    )
    return [Artifact("table_1", "Table I", caption, Table(columns, body), picture)]


def _published(method: str, theirs: paper.Paper | None, experiment: str) -> Cell:
    if theirs is None:
        return "fails" if method in paper.COLLAPSES else None
    if method in paper.TABLE_1[experiment] or method == "ewc":
        return theirs.first_task
    return f"about {theirs.first_task:.2f}"


def _missing(collection: Collection, experiment: str) -> bool:
    return any(name.startswith(f"{experiment},") for name in collection.missing)


def table_2(collection: Collection) -> list[Artifact]:
    """Table II: eight data sets in percent, ours (if they were run) above the paper's."""
    body: list[list[Cell]] = []
    averages: list[tuple[str, Interval]] = []
    places = [p for p in collection.places() if p.startswith("eight_datasets")]
    for place in places:
        for name, records in rows(collection, place):
            per_task = zip(*(record.at("accuracy", "per_task") for record in records), strict=True)
            cells = [_percent(interval(list(values))) for values in per_task]
            mean = _percent(over_seeds(records, AVERAGE))
            body.append([name, "ours", *cells, mean])
            if mean is not None:
                averages.append((f"{name} (ours)", mean))
    for reason in dict.fromkeys(n.reason for n in collection.not_run):
        body.append(["all methods", f"ours: not run. {reason}", *[None] * 9])
    for name, (accuracies, mean_theirs, copied) in paper.TABLE_2.items():
        origin = "paper, from others" if copied else "paper"
        body.append([name, origin, *accuracies, mean_theirs])
        averages.append((f"{name} (paper)", Interval(mean_theirs, None, 1)))
    columns = ("method", "source", *paper.DATA_SETS, "average")
    picture = dot_chart(
        [name for name, _ in averages],
        [
            Dots("ours", [v if "(ours)" in name else None for name, v in averages]),
            Dots("paper", [v if "(paper)" in name else None for name, v in averages], hollow=True),
        ],
        title="Eight data sets, average accuracy",
        xlabel="percent",
        limits=(0.0, 100.0),
    )
    caption = (
        "Table II: accuracy on each data set after all eight, in percent, every task with outputs of "
        "its own (multi-head)."
    )
    return [Artifact("table_2", "Table II", caption, Table(columns, body, digits=2), picture)]


def _percent(value: Interval | None) -> Interval | None:
    if value is None:
        return None
    return Interval(100 * value.mean, None if value.half is None else 100 * value.half, value.n)


def paired_tests(collection: Collection) -> list[Artifact]:
    """Student's paired t-tests between methods, seed by seed, corrected for their number."""
    found: list[tuple[str, str, str, str, Interval, float | None]] = []
    for place in collection.places():
        for first, second in collection.compare:
            for score, keys in (("ACC", AVERAGE), ("task 1", FIRST)):
                difference = paired(
                    _by_seed(collection, place, first, keys),
                    _by_seed(collection, place, second, keys),
                )
                if difference is not None:
                    found.append((place, first, second, score, difference.interval, difference.p))
    corrected = holm([p for *_, p in found])
    body: list[list[Cell]] = [
        [place, f"{first} - {second}", score, mean, mean.n, _p(p), _p(q)]
        for (place, first, second, score, mean, p), q in zip(found, corrected, strict=True)
    ]
    columns = ("experiment", "difference", "of", "mean", "seeds", "p", "p, corrected")
    picture = dot_chart(
        [f"{place} · {first} - {second}, {score}" for place, first, second, score, *_ in found],
        [Dots("difference over seeds", [mean for *_, mean, _ in found])],
        title="Differences between methods",
        xlabel="difference in accuracy",
        limits=None,
    )
    caption = (
        "Differences seed by seed, with the 95 % interval of their mean and p of the two-sided "
        "paired t-test, before and after Holm's correction for the number of tests here. Without a "
        "p, all seeds differ alike, or there is one only."
    )
    return [Artifact("paired_tests", "Paired tests", caption, Table(columns, body), picture)]


#: Inputs, hidden layers and outputs of the fully connected networks here and in the paper.
_NETWORKS = {
    "the paper's text, MNIST, 2 outputs": (784, [300] * 5, 2),
    "mnist_inc": (784, [300] * 5, 10),
    "cifar100_inc": (3072, [300] * 5, 20),
    "permuted MNIST": (784, [128] * 4, 10),
}


def parameters(collection: Collection) -> list[Artifact]:
    """What share of a network's parameters a task's bias adds; counted from the layers' sizes."""
    body: list[list[Cell]] = []
    for name, (inputs, hidden, outputs) in _NETWORKS.items():
        sizes = [inputs, *hidden, outputs]
        network = sum((n + 1) * m for n, m in pairwise(sizes))
        added = sum(sizes[1:])
        body.append([name, network, added, 100 * added / network])
    dots = [Interval(float(row[3]), None, 1) for row in body if isinstance(row[3], float)]
    picture = dot_chart(
        [str(row[0]) for row in body],
        [
            Dots("one bias for each unit", dots),
            Dots("paper", [Interval(paper.PARAMETERS_PER_TASK, None, 1)] + [None] * 3, hollow=True),
        ],
        title="What a task adds to a network's parameters",
        xlabel="percent of its parameters",
        limits=(0.0, 1.0),
    )
    caption = (
        "Parameters that a task adds, by BD: one bias for each unit of every layer. The paper says "
        "0.3 %; its network for MNIST gives 0.25 %."
    )
    columns = ("network", "its parameters", "added by a task", "percent")
    table = Table(columns, body, digits=2)
    return [Artifact("parameters", "Parameters per task", caption, table, picture)]


def _by_seed(
    collection: Collection, place: str, method: str, keys: tuple[str, ...]
) -> dict[int, float]:
    """A value for each seed, of a method that was run in one variant only."""
    records = [r for r in collection.of(place, method) if not r.variant]
    return {r.seed: r.at(*keys) for r in records if r.at(*keys) is not None}


def _p(value: float | None) -> str | None:
    if value is None:
        return None
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def _seeds(records: Sequence[Record]) -> str:
    seeds = sorted({record.seed for record in records})
    many = f"seeds {', '.join(map(str, seeds))}: mean and 95 % interval"
    return many if len(seeds) > 1 else f"seed {seeds[0]}" if seeds else "no runs yet"


def slug(text: str) -> str:
    """A file's name out of a title."""
    return "".join(
        letter if letter.isalnum() else "_" for letter in text.replace(", ", "_")
    ).lower()
