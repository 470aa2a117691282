"""Runs that differ by their seed alone, as one row: means with intervals, tests, settings."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import fmean
from typing import Any

from bpn_lightning.bench.statistics import Difference, Interval, holm, interval, paired
from bpn_lightning.errors import ConfigurationError, did_you_mean
from bpn_lightning.report.reading import Run

__all__ = [
    "SCORES",
    "TESTED",
    "Comparison",
    "PairedTest",
    "Row",
    "Setting",
    "compare",
    "differing_settings",
    "rows",
]

SCORES: dict[str, tuple[str, ...]] = {
    "average": ("accuracy", "average"),
    "average_task_agnostic": ("accuracy_task_agnostic", "average"),
    "first_task": ("accuracy", "first_task"),
    "first_task_agnostic": ("accuracy_task_agnostic", "first_task"),
    "after_learning": ("accuracy_after_learning", "average"),
    "forgetting": ("accuracy", "forgetting"),
    "bwt": ("accuracy", "bwt"),
}
"""What is compared, and where results.json has it; ``alone`` is without the task oracle."""

TESTED = {"average": "ACC, task given", "average_task_agnostic": "ACC, no oracle"}
"""The scores whose differences are tested."""

MOST_COMPARED = 12
"""Methods of a place up to which every pair is tested: 66 pairs."""

# They name a run or where it is, not what was learned and how.
_NOT_SETTINGS = ("seed_everything", "experiment", "method", "data.init_args.seed")


@dataclass(frozen=True)
class Row:
    """The runs of one method in one place, over their seeds.

    Args:
        place: see :class:`Run`.
        method: see :class:`Run`.
        runs: by seed.
        scores: mean and interval of each of :data:`SCORES`; None where a seed lacks the value.
        bytes_per_task: of the first seed: what a task adds to what is stored for use.
        bytes_held: of the first seed: what the strategies hold for use after the last task.
        seconds: mean wall time.
    """

    place: str
    method: str
    runs: list[Run]
    scores: Mapping[str, Interval | None]
    bytes_per_task: int | None
    bytes_held: int | None
    seconds: float | None

    @property
    def seeds(self) -> list[int]:
        """In order."""
        return [run.seed for run in self.runs]


@dataclass(frozen=True)
class PairedTest:
    """One paired test.

    Args:
        place: where.
        first: the method whose score comes first in the difference.
        second: the other one.
        score: key of :data:`TESTED`.
        difference: over the seeds that both have.
        corrected: p after Holm's correction for all tests of the page; None without a test.
    """

    place: str
    first: str
    second: str
    score: str
    difference: Difference
    corrected: float | None

    @property
    def verdict(self) -> str:
        """In words, at the level of 5 %."""
        if self.difference.n < 2:
            return "one seed: no test"
        if self.difference.p is None:
            return "no spread over seeds: no test"
        if self.corrected is None or self.corrected >= 0.05:
            return "no difference shown"
        return f"{self.first if self.difference.mean > 0 else self.second} is higher"


@dataclass(frozen=True)
class Comparison:
    """All rows, and the tests between them.

    Args:
        rows: in the order of their names.
        tests: differences, with corrected p.
        pairs: says which pairs are tested.
    """

    rows: list[Row]
    tests: list[PairedTest]
    pairs: str


@dataclass(frozen=True)
class Setting:
    """A key of config.yaml in which runs differ.

    Args:
        key: with dots.
        values: each value as text, and the methods that have it; a method whose seeds differ is named
            with its seeds.
        own: it has one value, and some methods do not know it.
    """

    key: str
    values: list[tuple[str, list[str]]]
    own: bool


def rows(runs: Sequence[Run]) -> list[Row]:
    """One row for each place and method."""
    grouped: dict[tuple[str, str], list[Run]] = {}
    for run in runs:
        grouped.setdefault((run.place, run.method), []).append(run)
    found = []
    for (place, method), own in grouped.items():
        seconds = [run.at("provenance", "seconds") for run in own]
        found.append(
            Row(
                place=place,
                method=method,
                runs=own,
                scores={
                    score: interval([run.at(*keys) for run in own])
                    for score, keys in SCORES.items()
                },
                bytes_per_task=own[0].at("bytes_per_task", "measured"),
                bytes_held=own[0].at("bytes_held", "inference"),
                seconds=None if None in seconds else fmean(seconds),
            )
        )
    return found


def compare(
    runs: Sequence[Run], wanted: Sequence[tuple[str, str]] = (), reference: str | None = None
) -> Comparison:
    """Rows and paired tests.

    Args:
        runs: all of them.
        wanted: pairs of methods that a grid names.
        reference: the method that each other one is compared with, instead.

    Raises:
        ConfigurationError: there is no such reference.
    """
    found = rows(runs)
    methods = list(dict.fromkeys(row.method for row in found))
    if reference is not None and reference not in methods:
        raise ConfigurationError(
            f"Expected --reference to be a method of these runs, but got {reference!r}."
            f"{did_you_mean(reference, methods)} They have {', '.join(methods)}."
        )
    pairs: list[tuple[Row, Row]] = []
    left_out = []
    for place in dict.fromkeys(row.place for row in found):
        here = {row.method: row for row in found if row.place == place}
        if reference is not None:
            pairs += [
                (row, here[reference])
                for row in here.values()
                if reference in here and row.method != reference
            ]
        elif wanted:
            pairs += [(here[a], here[b]) for a, b in wanted if a in here and b in here]
        elif len(here) <= MOST_COMPARED:
            pairs += combinations(here.values(), 2)
        else:
            left_out.append(f"{place} ({len(here)})")
    differences = [
        (first, second, score, difference)
        for first, second in pairs
        for score in TESTED
        if (difference := paired(_by_seed(first, score), _by_seed(second, score))) is not None
    ]
    corrected = holm([difference.p for *_, difference in differences])
    if reference is not None:
        which = f"each method against {reference}"
    elif wanted:
        which = "the pairs that the grid names"
    else:
        which = "every pair of methods of an experiment"
    if left_out:
        which += (
            f"; not in {', '.join(left_out)}, which has more than {MOST_COMPARED} methods: name one "
            "to compare the others with by --reference"
        )
    return Comparison(
        found,
        [
            PairedTest(first.place, first.method, second.method, score, difference, p)
            for (first, second, score, difference), p in zip(differences, corrected, strict=True)
        ],
        which,
    )


def differing_settings(found: Sequence[Row]) -> list[Setting]:
    """The keys that not all runs have with one value, in the order of config.yaml.

    A method whose runs have no config.yaml is left out: its settings are not known.
    """
    known = [(row, [run for run in row.runs if run.settings is not None]) for row in found]
    label = _labels(found)
    keys = dict.fromkeys(key for _, runs in known for run in runs for key in run.settings or ())
    settings = []
    for key in keys:
        if key in _NOT_SETTINGS:
            continue
        values: dict[str, list[str]] = {}
        for row, runs in known:
            own: dict[str, list[int]] = {}
            for run in runs:
                own.setdefault(_text(run.settings or {}, key), []).append(run.seed)
            for value, seeds in own.items():
                which = f" (seed {', '.join(map(str, seeds))})" if len(own) > 1 else ""
                values.setdefault(value, []).append(label(row) + which)
        if len(values) > 1:
            absent = values.pop(_ABSENT, None)
            order = [*values.items(), *([(_ABSENT, absent)] if absent else [])]
            settings.append(Setting(key, order, own=len(values) == 1))
    return settings


_ABSENT = "not set"


def _text(settings: Mapping[str, Any], key: str) -> str:
    if key not in settings:
        return _ABSENT
    value = settings[key]
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _labels(found: Sequence[Row]) -> Callable[[Row], str]:
    """A row's name: its method, with its place where there are several."""
    if len({row.place for row in found}) == 1:
        return lambda row: row.method
    return lambda row: f"{row.place}: {row.method}"


def _by_seed(row: Row, score: str) -> dict[int, float]:
    values = {run.seed: run.at(*SCORES[score]) for run in row.runs}
    return {seed: value for seed, value in values.items() if value is not None}
