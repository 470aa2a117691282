"""The data in plain words: what they show, and what they do not."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from bpn_lightning.analysis.claims import not_comparable, scenarios_of
from bpn_lightning.analysis.comparison import Comparison, MethodRow
from bpn_lightning.analysis.gates import GateRow, gate_rows
from bpn_lightning.analysis.record import RunRecord
from bpn_lightning.analysis.statistics import Interval
from bpn_lightning.report.reading import Found

__all__ = ["Summary", "summarize"]

_MOST_NAMED = 6

_ALL = {"None", "0.0", "0", "True", "False"}  # values that take nothing away


@dataclass(frozen=True)
class Summary:
    """Sentences.

    Args:
        shown: what the numbers say.
        not_shown: what they leave open, or what to keep in mind when reading them.
    """

    shown: list[str]
    not_shown: list[str]


def summarize(found: Found, comparison: Comparison) -> Summary:
    """Sentences about what was found; every number in them is in a table of the page."""
    if not found.runs:
        return Summary([], ["No run here has results."])
    return Summary(
        list(_shown(found.runs, comparison)),
        list(_not_shown(found, comparison)),
    )


def _shown(runs: Sequence[RunRecord], comparison: Comparison) -> Iterator[str]:
    rows = comparison.rows
    methods = list(dict.fromkeys(row.name for row in rows))
    places = list(dict.fromkeys(row.place for row in rows))
    yield (
        f"{_count(len(runs), 'run')} of {_count(len(methods), 'method')} on "
        f"{_some(places)}, {_seeds(rows)}."
    )
    for place in places:
        here = [row for row in rows if row.place == place]
        tasks = sorted({run.tasks for row in here for run in row.records})
        prefix = f"{place}, a stream of {' or '.join(map(str, tasks))} tasks: "
        if len(here) == 1:
            yield prefix + _one(here[0])
        else:
            yield prefix + _several(here)
        yield from _gates(place, gate_rows(here))
    scenarios = scenarios_of(rows)
    if scenarios:
        yield scenarios
    yield from _tests(comparison)


def _one(row: MethodRow) -> str:
    text = f"{row.name} has an ACC (mean over the tasks learned) of {_value(row, 'average')}"
    text += " with the task ID given"
    if row.scores["average_task_agnostic"] is not None:
        text += f", and of {_value(row, 'average_task_agnostic')} without it"
    text += f". Right after learning it was {_value(row, 'after_learning')}"
    text += f"; of task 1, {_value(row, 'first_task')} is left"
    return f"{text}."


def _several(rows: Sequence[MethodRow]) -> str:
    given = _highest(rows, "average")
    agnostic = _highest(rows, "average_task_agnostic")
    parts = []
    if given:
        parts.append(f"with the task ID given, the highest mean ACC is {given}")
    if agnostic:
        parts.append(f"with the task ID not given, it is {agnostic}")
    return ("; ".join(parts) or "no method has an ACC over all of its seeds") + "."


def _gates(place: str, rows: Sequence[GateRow]) -> Iterator[str]:
    """What names the task best, and what then names the class."""
    words = {
        "task_accuracy": "the likeliest task is right for",
        "mixture": "gate and modes are right for",
        "own_class": "the gate's own class, without any network, for",
    }
    values = {key: [(row.average(key), row.name) for row in rows] for key in words}
    best = {key: _largest(of) for key, of in values.items()}
    parts = [f"{words[key]} {value}" for key, value in best.items() if value]
    if parts:
        yield f"{place}, fractions of the images with the best gate: {'; '.join(parts)}."
    gains = [(gain.mean - (gain.half or 0), row.name) for row in rows if (gain := row.gain())]
    if gains:
        above = [name for lowest, name in gains if lowest > 0]
        yield (
            f"{place}: gate and modes are above the gate's own class, the interval of the difference "
            f"included, for {len(above)} of {_count(len(gains), 'gate')}"
            + (f": {'; '.join(above)}." if above else ".")
        )


def _tests(comparison: Comparison) -> Iterator[str]:
    tested: dict[str, list[float]] = {}
    for test in comparison.tests:
        if test.corrected is not None:
            tested.setdefault(test.place, []).append(test.corrected)
    if not tested:
        return
    one = len(tested) == 1
    found = (
        f"{sum(p < 0.05 for p in values)} of {len(values)}" + ("" if one else f" on {place}")
        for place, values in tested.items()
    )
    yield (
        f"Of the tested differences between methods, {', '.join(found)} are significant at 5 % after "
        "Holm's correction. Of the others none is shown, which does not show that there is none."
    )


def _not_shown(found: Found, comparison: Comparison) -> Iterator[str]:
    rows, runs = comparison.rows, found.runs
    name = _namer(rows)
    unmeasured = [row for row in rows if row.scores["average_task_agnostic"] is None]
    start = (
        "Task ID given:" if len(unmeasured) < len(rows) else "Every mean here is with the task ID:"
    )
    yield (
        f"{start} the network is told which task each image is from, which is much easier than "
        "class-incremental learning. Compare methods without the task ID, too."
    )
    missing = not_comparable(rows)
    if missing:
        yield missing
    reasons: dict[str, list[str]] = {}
    for row in unmeasured:
        reasons.setdefault(_why_unmeasured(row), []).append(name(row))
    for reason, methods in reasons.items():
        yield f"Without the task ID there is no mean for {_some(methods)}: {reason}."
    single = [row for row in rows if len(row.records) == 1]
    if len(single) == len(rows):
        yield "One seed only: no value has an interval, and no difference is tested."
    elif single:
        yield f"One seed only, hence no interval: {_some(map(name, single))}."
    few = [row for row in rows if len(row.records) == 2]
    if few:
        yield f"Two seeds only, whose intervals are very wide: {_some(map(name, few))}."
    for place, group in groupby(rows, key=lambda row: row.place):
        here = list(group)
        if len({tuple(row.seeds) for row in here}) > 1:
            yield (
                f"{place}: not all methods have the same seeds. Tests pair the seeds that both "
                "have; means are over each method's own."
            )
    short = [run for run in runs if run.learned < run.tasks]
    if short:
        ends = (f"{run.name} ({run.learned} of {run.tasks})" for run in short)
        yield (
            f"Not all tasks were learned in {_some(ends)}: their scores are over the tasks learned, "
            "and not comparable with those of whole streams."
        )
    unsettled = [_unsettled(run) for run in runs if run.at("unsettled_tasks")]
    if unsettled:
        yield (
            f"Training had not settled in {_some(unsettled)}: accuracy fell by more than 0.1 in the last "
            "epoch of those tasks, and with another number of epochs it might be another."
        )
    yield from _subsets(rows, name)
    mixed = [row for row in rows if len({str(_of_method(run)) for run in row.records}) > 1]
    if mixed:
        yield (
            f"The seeds of {_some(map(name, mixed))} do not share all their settings, though all that "
            "decide what is computed: see the settings below."
        )
    unknown = sum(run.settings is None for run in runs)
    if unknown:
        yield f"The settings of {_count(unknown, 'run')} were not kept, so differences may be hidden."
    yield from _origins(runs)
    if found.problems:
        states: dict[str, int] = {}
        for problem in found.problems:
            states[problem.state] = states.get(problem.state, 0) + 1
        counted = ", ".join(f"{n} {state}" for state, n in states.items())
        yield f"Not shown, or not whole: {counted}. They are named under “Left out”."


def _unsettled(run: RunRecord) -> str:
    tasks = [f"{one['id'] + 1}" for one in run.at("unsettled_tasks")]
    return f"{run.name} (task{'s' if len(tasks) > 1 else ''} {_some(tasks)})"


def _why_unmeasured(row: MethodRow) -> str:
    """Why there is no mean of the scores without the task ID."""
    if any(run.at("accuracy_task_agnostic", "average") is not None for run in row.records):
        return "not all seeds have a value"
    if any(run.learned < run.tasks for run in row.records):
        return "it is measured at the end of the stream, which was not reached"
    settings = row.records[0].settings or {}
    if settings.get("model.mask") == "task":
        return "every task has outputs of its own, which cannot be chosen without it"
    if settings.get("model.task_agnostic") is False:
        return "it was not asked for (model.task_agnostic false)"
    return "not measured, or every task has outputs of its own, which cannot be chosen without it"


def _subsets(rows: Sequence[MethodRow], name: Callable[[MethodRow], str]) -> Iterator[str]:
    """Settings by which less than all data was used; one sentence for each."""
    words = {
        "data.init_args.train_samples": "The number of training samples is set, perhaps below all",
        "data.init_args.test_samples": "The number of test samples is set, perhaps below all",
        "data.init_args.validation_fraction": "Part of the training images was held out",
        "trainer.limit_train_batches": "Trained on part of each epoch's batches",
        "model.task_agnostic": "Without the task ID, tested on so many samples of each task",
    }
    for key, sentence in words.items():
        values: dict[str, list[str]] = {}
        for row in rows:
            found = {str((run.settings or {}).get(key)) for run in row.records} - _ALL
            for value in sorted(found):
                values.setdefault(value, []).append(name(row))
        for value, methods in values.items():
            everywhere = len(methods) == len(rows)
            where = "in all runs" if everywhere else f"in {_some(methods)}"
            yield f"{sentence} ({key} {value}) {where}."


def _origins(runs: Sequence[RunRecord]) -> Iterator[str]:
    commits = {run.at("provenance", "commit") for run in runs}
    versions = {str(run.at("provenance", "versions")) for run in runs}
    if len(commits) > 1 or len(versions) > 1:
        yield (
            "The runs are not of one state of the software (commits or versions differ): see "
            "provenance."
        )
    dirty = sum(str(commit).endswith("-dirty") for commit in commits)
    if dirty:
        yield (
            "Some runs are of a checkout with changes that were not committed (-dirty): their "
            "commit does not say what ran."
        )


def _of_method(run: RunRecord) -> dict[str, Any]:
    """Settings that all seeds of a method should share."""
    return {
        key: value
        for key, value in (run.settings or {}).items()
        if key not in ("seed_everything", "data.init_args.seed")
    }


def _highest(rows: Sequence[MethodRow], score: str) -> str:
    """The methods of the highest mean; all of them where it is shared."""
    return _largest([(row.scores[score], row.name) for row in rows])


def _largest(values: Sequence[tuple[Interval | None, str]]) -> str:
    """The largest mean, with the names that have it; "" where none is known."""
    known = [(value, name) for value, name in values if value is not None]
    if not known:
        return ""
    top = max(value.mean for value, _ in known)
    best = [(value, name) for value, name in known if top - value.mean < 5e-4]
    return f"{best[0][0].text()} ({_some(name for _, name in best)})"


def _value(row: MethodRow, score: str) -> str:
    value = row.scores[score]
    return "an unknown value" if value is None else value.text()


def _seeds(rows: Sequence[MethodRow]) -> str:
    numbers = sorted({len(row.records) for row in rows})
    if numbers == [1]:
        return "one seed each" if len(rows) > 1 else f"seed {rows[0].seeds[0]}"
    each = " each" if len(rows) > 1 else ""
    if len(numbers) == 1:
        return f"{numbers[0]} seeds{each}, with 95 % intervals of Student's t over them"
    return (
        f"{numbers[0]} to {numbers[-1]} seeds{each}, with 95 % intervals of Student's t over them"
    )


def _namer(rows: Sequence[MethodRow]) -> Callable[[MethodRow], str]:
    if len({row.place for row in rows}) == 1:
        return lambda row: row.name
    return lambda row: f"{row.name} ({row.place})"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _some(names: Iterable[str]) -> str:
    """``a, b and 3 more``."""
    listed = list(names)
    if len(listed) > _MOST_NAMED:
        return f"{', '.join(listed[:_MOST_NAMED])} and {len(listed) - _MOST_NAMED} more"
    return " and ".join(filter(None, [", ".join(listed[:-1]), listed[-1]])) if listed else ""
