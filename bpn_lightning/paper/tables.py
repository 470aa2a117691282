"""Tables I and II of Wen et al., ours next to theirs, and the parameters that a task adds."""

from itertools import pairwise

from bpn_lightning.analysis.artifact import Artifact, seeds_text
from bpn_lightning.analysis.collection import Collection
from bpn_lightning.analysis.comparison import MethodRow, method_rows, score_title
from bpn_lightning.analysis.pictures import Dots, dot_chart
from bpn_lightning.analysis.statistics import Interval, interval
from bpn_lightning.analysis.table import Cell, Table
from bpn_lightning.paper import published as paper

__all__ = ["parameters", "table_1", "table_2"]


def table_1(collection: Collection) -> list[Artifact]:
    """Table I: task 1 after all tasks and bytes per task, ours next to the paper's."""
    body: list[list[Cell]] = []
    marks: list[tuple[str, Interval | None, Interval | None, Interval | None]] = []
    rows = [
        row
        for row in method_rows(collection.records)
        if row.name.removesuffix("_task_mask") not in paper.NOT_IN_TABLE_1
    ]
    for experiment, of_table in paper.TABLE_1.items():
        published = of_table | paper.TABLE_1_FROM_TEXT[experiment]
        reasons = [one.reason for one in collection.not_run if one.experiment == experiment]
        found = {row.name: row for row in rows if row.records[0].experiment == experiment}
        if not found and not reasons and not _missing(collection, experiment):
            continue
        for method in [*found, *(name for name in published if name not in found)]:
            row, theirs = found.get(method), published.get(method)
            ours = row.scores["first_task"] if row else None
            agnostic = row.scores["first_task_agnostic"] if row else None
            body.append(
                [
                    row.place if row else experiment,
                    method,
                    ours if row else (reasons or ["not run"])[0],
                    _published(method, theirs, experiment),
                    agnostic,
                    row.scores["average"] if row else None,
                    *_bytes(row),
                    theirs.bytes if theirs else None,
                ]
            )
            if ours is not None or theirs is not None:
                other = Interval(theirs.first_task, None, 1) if theirs else None
                name = f"{experiment.removesuffix('_inc')} · {method}"
                marks.append((name, ours, agnostic, other))
    columns = [
        *("experiment", "method", "task 1, ours", "task 1, paper"),
        *(score_title(key, collection.records) for key in ("first_task_agnostic", "average")),
        *("bytes per task, ours", "by the paper's formula", "bytes, paper"),
    ]
    picture = dot_chart(
        [name for name, *_ in marks],
        [
            Dots("ours, task ID given", [ours for _, ours, _, _ in marks]),
            Dots("ours, task ID not given", [agnostic for _, _, agnostic, _ in marks]),
            Dots("paper", [other for *_, other in marks], hollow=True),
        ],
        title="Task 1 after all tasks",
    )
    caption = (
        "Table I: accuracy on task 1 after all tasks, task ID given unless a column says otherwise, "
        f"{seeds_text(record.seed for record in collection.records)}. Figures of the paper with "
        '"about" follow from percentages in its text. `ewc_task_mask` is the control: EWC with the '
        "task ID, like the others, and with no bias at all. Bytes are of the network that was built, "
        "then of the same network by the paper's formula, then as its table has them."
    )
    table, places = Table(columns, body), collection.places()
    return [Artifact("table_1", "Table I", caption, table, picture, places=places)]


def _bytes(row: MethodRow | None) -> tuple[int | None, int | None]:
    if row is None:
        return None, None
    return row.bytes_per_task, row.records[0].at("bytes_per_task", "paper")


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
        for row in method_rows(collection.records, place):
            of_seeds = (record.at("accuracy", "per_task") for record in row.records)
            cells = [_percent(interval(values)) for values in zip(*of_seeds, strict=True)]
            mean = _percent(row.scores["average"])
            body.append([row.name, "ours", *cells, mean])
            if mean is not None:
                averages.append((f"{row.name} (ours)", mean))
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
    table = Table(columns, body, digits=2)
    return [Artifact("table_2", "Table II", caption, table, picture, places=places)]


def _percent(value: Interval | None) -> Interval | None:
    if value is None:
        return None
    return Interval(100 * value.mean, None if value.half is None else 100 * value.half, value.n)


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
