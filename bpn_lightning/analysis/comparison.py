"""Records that differ by their seed alone as one row, and tests between rows."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import fmean
from typing import NamedTuple

from bpn_lightning.analysis.record import RunRecord
from bpn_lightning.analysis.statistics import Difference, Interval, holm, interval, paired
from bpn_lightning.errors import ConfigurationError, did_you_mean
from bpn_lightning.run.scenarios import scenario_text

__all__ = [
    "MOST_COMPARED",
    "SCORES",
    "Comparison",
    "MethodRow",
    "PairedTest",
    "Score",
    "compare",
    "method_rows",
    "score_title",
]


class Score(NamedTuple):
    """A number of every run.

    Attributes:
        title: of its column, where the scenario is not known.
        keys: where results.json has it.
        scenario: of which accuracy its scenario is.
    """

    title: str
    keys: tuple[str, ...]
    scenario: str = "accuracy"


_AGNOSTIC = "accuracy_task_agnostic"

SCORES: dict[str, Score] = {
    "average": Score("ACC, task ID given", ("accuracy", "average")),
    "average_task_agnostic": Score("ACC, task ID not given", (_AGNOSTIC, "average"), _AGNOSTIC),
    "after_learning": Score("right after learning", ("accuracy_after_learning", "average")),
    "first_task": Score("task 1, task ID given", ("accuracy", "first_task")),
    "first_task_agnostic": Score("task 1, task ID not given", (_AGNOSTIC, "first_task"), _AGNOSTIC),
    "balanced": Score("balanced, task ID given", ("by_class", "accuracy", "balanced")),
    "balanced_task_agnostic": Score(
        "balanced, task ID not given", ("by_class", _AGNOSTIC, "balanced"), _AGNOSTIC
    ),
    "forgetting": Score("forgetting", ("accuracy", "forgetting")),
    "validation": Score("ACC, held-out samples", ("validation", "average")),
}
"""What is compared. Accuracies are those after the last task, unless their title says otherwise."""

MOST_COMPARED = 12
"""Methods of a place up to which every pair is tested: 66 pairs."""


@dataclass(frozen=True)
class MethodRow:
    """The runs of one method in one place, over their seeds.

    Args:
        place: see :class:`RunRecord`.
        name: of the method, with what sets it apart: the setup of its records.
        records: by seed.
        scores: mean and interval of each of :data:`SCORES`; None where a seed lacks the value.
        bytes_per_task: of the first seed: what a task adds to what is stored for use.
        bytes_held: of the first seed: what the strategies hold for use after the last task.
        seconds: mean wall time.
    """

    place: str
    name: str
    records: list[RunRecord]
    scores: Mapping[str, Interval | None]
    bytes_per_task: int | None
    bytes_held: int | None
    seconds: float | None

    @property
    def seeds(self) -> list[int]:
        """In order."""
        return [record.seed for record in self.records]

    def by_seed(self, score: str) -> dict[int, float]:
        """The values of a score, of those seeds that have one."""
        values = {record.seed: record.at(*SCORES[score].keys) for record in self.records}
        return {seed: value for seed, value in values.items() if value is not None}


def score_title(score: str, records: Sequence[RunRecord]) -> str:
    """The title of a score with the scenario of some runs, if they have one in common."""
    title, _, accuracy = SCORES[score]
    known = [record.at("conditions", "scenarios", accuracy) for record in records]
    texts = {None if one is None else scenario_text(one) for one in known}
    if accuracy == _AGNOSTIC:  # where it was not measured, a row has no number
        texts.discard(None)
    (text,) = texts if len(texts) == 1 else (None,)
    return title if text is None else f"{title.partition(', task ID')[0]}, {text}"


@dataclass(frozen=True)
class PairedTest:
    """One paired test.

    Args:
        first: the row whose score comes first in the difference.
        second: the other one, of the same place.
        score: key of :data:`SCORES`.
        difference: over the seeds that both have.
        corrected: p after Holm's correction for all tests of the comparison; None without a test.
    """

    first: MethodRow
    second: MethodRow
    score: str
    difference: Difference
    corrected: float | None

    @property
    def place(self) -> str:
        """Where."""
        return self.first.place

    @property
    def verdict(self) -> str:
        """In words, at the level of 5 %."""
        if self.difference.n < 2:
            return "one seed: no test"
        if self.difference.p is None:
            return "no spread over seeds: no test"
        if self.corrected is None or self.corrected >= 0.05:
            return "no difference shown"
        return f"{(self.first if self.difference.mean > 0 else self.second).name} is higher"


@dataclass(frozen=True)
class Comparison:
    """All rows, and the tests between them.

    Args:
        rows: in the order of their records.
        tests: differences, with corrected p.
        pairs: says which pairs are tested.
    """

    rows: list[MethodRow]
    tests: list[PairedTest]
    pairs: str


def method_rows(records: Sequence[RunRecord], place: str | None = None) -> list[MethodRow]:
    """One row for each place and setup, or for each setup of one place."""
    grouped: dict[tuple[str, str], list[RunRecord]] = {}
    for record in records:
        if place in (None, record.place):
            grouped.setdefault((record.place, record.setup), []).append(record)
    return [_row(where, name, own) for (where, name), own in grouped.items()]


def compare(
    records: Sequence[RunRecord],
    wanted: Sequence[tuple[str, str]] = (),
    reference: str | None = None,
    scores: Sequence[str] = ("average", "average_task_agnostic"),
) -> Comparison:
    """Rows, and Student's paired t-tests between them, with Holm's correction for their number.

    Args:
        records: all of them.
        wanted: pairs of methods that a grid names.
        reference: the method that each other one is compared with, instead.
        scores: whose differences are tested: keys of :data:`SCORES`.

    Raises:
        ConfigurationError: there is no such reference.
    """
    rows = method_rows(records)
    pairs, words = _pairs(rows, wanted, reference)
    found = [
        (first, second, score, difference)
        for first, second in pairs
        for score in scores
        if (difference := paired(first.by_seed(score), second.by_seed(score))) is not None
    ]
    corrected = holm([difference.p for *_, difference in found])
    tests = [PairedTest(*parts, p) for parts, p in zip(found, corrected, strict=True)]
    return Comparison(rows, tests, words)


def _row(place: str, name: str, records: list[RunRecord]) -> MethodRow:
    seconds = [record.at("provenance", "seconds") for record in records]
    return MethodRow(
        place=place,
        name=name,
        records=records,
        scores={
            key: interval([record.at(*score.keys) for record in records])
            for key, score in SCORES.items()
        },
        bytes_per_task=records[0].at("bytes_per_task", "measured"),
        bytes_held=records[0].at("bytes_held", "inference"),
        seconds=None if None in seconds else fmean(seconds),
    )


Pair = tuple[MethodRow, MethodRow]


def _pairs(
    rows: Sequence[MethodRow], wanted: Sequence[tuple[str, str]], reference: str | None
) -> tuple[list[Pair], str]:
    """The pairs of rows that are tested, and the words for which they are."""
    places = dict.fromkeys(row.place for row in rows)
    by_place = [{row.name: row for row in rows if row.place == place} for place in places]
    if reference is not None:
        _check_reference(rows, reference)
        return list(_with(by_place, reference)), f"each method against {reference}"
    if wanted:
        named = [(here[a], here[b]) for here in by_place for a, b in wanted if {a, b} <= set(here)]
        return named, "the pairs that the grid names"
    few = [here for here in by_place if len(here) <= MOST_COMPARED]
    every = [pair for here in few for pair in combinations(here.values(), 2)]
    left_out = [
        f"{place} ({len(here)})"
        for place, here in zip(places, by_place, strict=True)
        if len(here) > MOST_COMPARED
    ]
    words = "every pair of methods of an experiment"
    if left_out:
        words += (
            f"; not in {', '.join(left_out)}, which has more than {MOST_COMPARED} methods: name one "
            "to compare the others with by --reference"
        )
    return every, words


def _with(by_place: Sequence[Mapping[str, MethodRow]], reference: str) -> Iterator[Pair]:
    for here in by_place:
        if reference in here:
            yield from ((row, here[reference]) for row in here.values() if row.name != reference)


def _check_reference(rows: Sequence[MethodRow], reference: str) -> None:
    methods = list(dict.fromkeys(row.name for row in rows))
    if reference not in methods:
        raise ConfigurationError(
            f"Expected --reference to be a method of these runs, but got {reference!r}."
            f"{did_you_mean(reference, methods)} They have {', '.join(methods)}."
        )
