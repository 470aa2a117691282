"""How often accuracy falls from one epoch to the next, in the task that is learned and in earlier ones."""

from collections.abc import Iterator
from itertools import pairwise

from bpn_lightning.analysis.artifact import Artifact, seeds_text, slug
from bpn_lightning.analysis.collection import Collection
from bpn_lightning.analysis.comparison import MethodRow, method_rows, score_title
from bpn_lightning.analysis.pictures import Dots, dot_chart
from bpn_lightning.analysis.record import RunRecord
from bpn_lightning.analysis.statistics import interval
from bpn_lightning.analysis.table import Cell, Table
from bpn_lightning.metrics.settling import MAX_FALL

__all__ = ["dips", "falls"]


def dips(collection: Collection) -> list[Artifact]:
    """For each place whose runs were tested after every epoch: dips, and what the runs came to."""
    found = []
    for place in collection.places():
        rows = [
            row
            for row in method_rows(collection.records, place)
            if all(record.curve for record in row.records)
        ]
        if rows:
            found.append(_dips(place, rows))
    return found


def falls(record: RunRecord) -> Iterator[tuple[int, float, bool]]:
    """What each task lost from one test to the next, by epochs.

    Yields:
        The task, from 0; the fall in accuracy, below 0 where it rose; whether the task was being learned.
    """
    over_stream = record.moments
    ends = [*over_stream.starts[1:], float("inf")]
    for task, (start, end) in enumerate(zip(over_stream.starts, ends, strict=True)):
        seen = [
            (x, row[task])
            for x, row in zip(over_stream.at, over_stream.accuracy, strict=True)
            if x > start
        ]
        for (_, before), (x, after) in pairwise(seen):
            if before is not None and after is not None:
                yield task, before - after, x <= end


def _dips(place: str, rows: list[MethodRow]) -> Artifact:
    body: list[list[Cell]] = []
    for row in rows:
        seen = [fall for record in row.records for fall in falls(record)]
        learning = [fall for _, fall, learned_now in seen if learned_now]
        later = [fall for _, fall, learned_now in seen if not learned_now]
        accuracies = [record.at("accuracy", "average") for record in row.records]
        body.append(
            [
                row.name,
                sum(fall > MAX_FALL for fall in learning),
                len(learning),
                sum(fall > MAX_FALL for fall in later),
                len(later),
                row.scores["average"],
                min((value for value in accuracies if value is not None), default=None),
                row.scores["average_task_agnostic"],
            ]
        )
    records = [record for row in rows for record in row.records]
    given, agnostic = (score_title(key, records) for key in ("average", "average_task_agnostic"))
    columns = (
        *("method", "dips while learned", "epochs", "dips afterwards", "epochs afterwards"),
        *(given, "lowest seed", agnostic),
    )
    scores = [
        interval([record.at("accuracy", "average")]) for row in rows for record in row.records
    ]
    figure = dot_chart(
        [f"{row.name}, seed {seed}" for row in rows for seed in row.seeds],
        [Dots(given, scores)],
        title=f"{place}: every seed",
    )
    caption = (
        f"{place}, {seeds_text(seed for row in rows for seed in row.seeds)}. A dip: the accuracy on a "
        f"task is lower by more than {MAX_FALL:.2f} after an epoch than before it. They are counted while "
        "the task is learned and afterwards, over all seeds; beside them, how many epochs were looked at."
    )
    name, table = f"dips_{slug(place)}", Table(columns, body)
    return Artifact(name, f"Dips, {place}", caption, table, figure, places=[place])
