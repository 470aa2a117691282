"""A finished run as one typed record, read from its folder."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from bpn_lightning.cli.config_files import read_yaml
from bpn_lightning.errors import ConfigurationError, ResultsError
from bpn_lightning.metrics.scores import BINS
from bpn_lightning.run.gates import GATE_ACCURACIES
from bpn_lightning.run.identity import CLASS_ORDER, SEED_ORDER, flatten, named_value, setup_name
from bpn_lightning.run.moments import Moments, Row, moments, tasks_learned
from bpn_lightning.run.results import read_matrix_rows, read_results
from bpn_lightning.run.scenarios import SCENARIOS, scenarios
from bpn_lightning.run.schema import MAX_TASKS
from bpn_lightning.run.tuning import STREAMS

__all__ = ["MAX_COUNT", "RunRecord", "check_curve", "check_record", "read_run"]

MAX_COUNT = 10**15
"""Of bytes, seconds and epochs."""

MAX_NAME = 1000
"""Characters of an experiment and of a method."""

_ROUNDING = 1e-6  # of an accuracy that is a sum

# What comparisons count with.
_NUMBERS = (
    *(("accuracy", key) for key in ("average", "first_task", "forgetting", "bwt")),
    *(("accuracy_task_agnostic", key) for key in ("average", "first_task")),
    ("accuracy_after_learning", "average"),
    ("bytes_per_task", "measured"),
    ("bytes_held", "inference"),
    ("provenance", "seconds"),
)


@dataclass(frozen=True)
class RunRecord:
    """A run that has results.

    Args:
        experiment: its name.
        method: its name, as ``--method`` takes it.
        seed: its seed.
        results: as :class:`bpn_lightning.run.schema.Results`, as far as a cells.json keeps them.
        matrix: ``(tasks + 1, tasks)``; row 0 before training, None where not measured.
        epochs: of each task's own training.
        task_names: a text for each task; "task 1" and so on where none is known.
        curve: accuracies at finer moments, ``{epoch, task, accuracy}``; may be empty.
        label: what sets runs of one experiment apart that learn other streams, or "".
        variant: varied keys and their values.
        note: other settings in which runs of one method differ, or "".
        settings: of config.yaml, by dotted keys; None where they are not known.
        probes: what they saw after each task, by their names.
        source: where it was read, for people.
        incomplete: parts of the folder that could not be read, "matrix", "settings" or "curve", and
            why.
    """

    experiment: str
    method: str
    seed: int
    results: Mapping[str, Any]
    matrix: Sequence[Row]
    epochs: Sequence[int]
    task_names: Sequence[str] = ()
    curve: Sequence[Mapping[str, Any]] = ()
    label: str = ""
    variant: Mapping[str, Any] = field(default_factory=dict)
    note: str = ""
    settings: Mapping[str, Any] | None = None
    probes: Mapping[str, Any] = field(default_factory=dict)
    source: str = ""
    incomplete: Mapping[str, str] = field(default_factory=dict)

    @property
    def place(self) -> str:
        """The experiment, with its label: what has a table of its own."""
        return ", ".join(filter(None, [self.experiment, self.label]))

    @property
    def setup(self) -> str:
        """The method with what sets it apart; runs of one place and setup differ by their seed."""
        named = setup_name(self.method, self.gates, self.at("front", "name"))
        return ", ".join([named, *self.variation])

    @property
    def variation(self) -> list[str]:
        """What sets it apart from runs of the same method, gates and front."""
        varied = ("{} {}".format(*named_value(*pair)) for pair in self.variant.items())
        return [*varied, *filter(None, [self.note])]

    @property
    def gates(self) -> Mapping[str, Any]:
        """What its gates gave, by their names."""
        return self.results.get("gates") or {}

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.place}, {self.setup}, seed {self.seed}"

    @property
    def tasks(self) -> int:
        """Of the stream."""
        return len(self.matrix) - 1

    @property
    def learned(self) -> int:
        """How many of them were learned."""
        return tasks_learned(self.matrix)

    @property
    def triangle(self) -> list[list[float | None]]:
        """Row k has the accuracies on tasks 1 to k + 1 after task k + 1."""
        return [list(row[:moment]) for moment, row in enumerate(self.matrix) if moment]

    @property
    def moments(self) -> Moments:
        """Accuracies over the stream; tasks are counted where the epochs of some are not known."""
        return moments(self.matrix, self.curve, self.epochs if all(self.epochs) else None)

    def at(self, *keys: str) -> Any:
        """A value of the results by its keys; None where a part of the way is null or not kept."""
        value: Any = self.results
        for key in keys:
            value = None if value is None else value.get(key)
        return value


def read_run(folder: Path) -> RunRecord:
    """Read the folder of a finished run.

    A matrix, settings or a curve that cannot be read are named in ``incomplete``; the last row of the
    matrix is in results.json, too.

    Raises:
        ResultsError: there is no results.json of this version, or it holds what no run can give.
    """
    results = cast(dict[str, Any], read_results(folder))
    tasks = results["tasks"]
    if not 0 < len(tasks) <= MAX_TASKS:
        raise ResultsError(
            f"Expected {folder}/results.json to be of a stream of tasks, {MAX_TASKS:,} at most, but got "
            f"{len(tasks) or 'none'}."
        )
    incomplete: dict[str, str] = {}
    try:
        matrix = _read_matrix(folder, len(tasks))
    except ResultsError as error:
        incomplete["matrix"], matrix = str(error), _last_row_only(results)
    try:
        settings = flatten(read_yaml(folder / "config.yaml"))
    except ConfigurationError as error:
        incomplete["settings"], settings = f"Its settings are not known. {error}", None
    try:
        curve = check_curve(results["extra"].get("curve") or [], len(tasks))
    except (KeyError, TypeError, ValueError) as error:  # `extra` has no schema
        incomplete["curve"], curve = f"extra.curve cannot be read: {error!r}.", []
    record = RunRecord(
        experiment=results["experiment"],
        method=results["method"],
        seed=results["seed"],
        results=results,
        matrix=matrix,
        epochs=[task["epochs"] for task in tasks],
        task_names=[_task_name(task["id"], task["classes"]) for task in tasks],
        curve=curve,
        settings=settings,
        incomplete=incomplete,
    )
    if "conditions" not in results and settings is not None:
        results["conditions"] = _from_settings(settings, results)
    try:
        return check_record(record)
    except ValueError as error:
        raise ResultsError(
            f"Expected {folder}/results.json to hold what a run can give, but {error}."
        ) from error


def check_record(record: RunRecord) -> RunRecord:
    """The record, which can be counted with.

    Raises:
        ValueError: it holds what no run can give, or no mean can be taken of; says what.
    """
    for keys in _NUMBERS:
        value, accuracy = record.at(*keys), keys[0].startswith("accuracy")
        low, high = (-1, 1) if accuracy else (0, MAX_COUNT)
        if not _is_between(value, low, high):
            raise ValueError(f"{'.'.join(keys)} is {value!r:.80}")
    _check_accuracies(record.matrix)
    _check_accuracies(point["accuracy"] for point in record.curve)
    _check_accuracies([[record.at("validation", "average")]])
    _check_gates(record)
    _check_conditions(record)
    for name in (record.experiment, record.method, *record.gates):
        if len(name) > MAX_NAME:
            raise ValueError(f"a name has {len(name):,} characters")
    return record


def check_curve(points: Any, tasks: int) -> list[dict[str, Any]]:
    """The points of a curve, each with an epoch, a task and an accuracy for each task.

    Raises:
        KeyError, TypeError, ValueError: they are something else.
    """
    for point in points:
        if not isinstance(point["task"], int) or point["task"] not in range(tasks):
            raise ValueError(f"a point is of task {point['task']!r:.80}")
        if point["epoch"] is None or not _is_between(point["epoch"], 0, MAX_COUNT):
            raise ValueError(f"a point is of epoch {point['epoch']!r:.80}")
        if len(point["accuracy"]) != tasks:
            raise ValueError(f"a point has no accuracy for each of the {tasks} tasks")
    return list(points)


def _check_gates(record: RunRecord) -> None:
    """Refuse what the tables and pictures of gates cannot be made of."""
    for name, gate in record.gates.items():
        bins, moments = gate["calibration"], gate["over_stream"]
        values = [gate[key]["average"] for key in GATE_ACCURACIES if gate[key] is not None]
        values += [moment[key] for moment in moments for key in (*GATE_ACCURACIES, "rejection")]
        if bins is not None:
            values += [bins["error"], *bins["confidence"], *bins["accuracy"]]
            empty = [count == 0 for count in bins["counts"]]
            lists = (bins["confidence"], bins["accuracy"])
            if len(empty) != BINS or any([one is None for one in of] != empty for of in lists):
                raise ValueError(f"the bins of gate {name!r:.80} are not {BINS} that fit together")
            if not all(_is_between(count, 0, MAX_COUNT) for count in bins["counts"]):
                raise ValueError(f"a bin of gate {name!r:.80} has {bins['counts']!r:.80} samples")
        _check_accuracies([values])
        counts = [gate["bytes_held"], gate["bytes_per_task"]]
        if not all(_is_between(count, 0, MAX_COUNT) for count in counts):
            raise ValueError(f"the bytes of gate {name!r:.80} are {counts!r:.80}")
        if any(not 0 < moment["after"] <= record.tasks for moment in moments):
            raise ValueError(f"a moment of gate {name!r:.80} is after no task of the stream")


def _from_settings(settings: Mapping[str, Any], results: Mapping[str, Any]) -> dict[str, Any]:
    """The conditions that the settings of an earlier release's run tell."""
    found: dict[str, Any] = {}
    if "model.mask" in settings:
        given = bool(settings.get("data.init_args.task_id_at_inference", True))
        agnostic = results["accuracy_task_agnostic"] is not None
        found["scenarios"] = scenarios(settings["model.mask"], given, agnostic)
    if str(settings.get("data.class_path")).endswith("PermutedMNIST"):
        found["order"] = "seed"
    elif CLASS_ORDER in settings:
        found["order"] = "seed" if settings[CLASS_ORDER] == SEED_ORDER else "fixed"
    return found


def _check_conditions(record: RunRecord) -> None:
    """Refuse conditions, and counts of samples, that no run can have."""
    for one in (record.at("conditions", "scenarios") or {}).values():
        if one is not None and one["name"] not in SCENARIOS:
            raise ValueError(f"a scenario is {one['name']!r:.80}")
    updates, order = record.at("conditions", "updates"), record.at("conditions", "order")
    if record.at("conditions", "split") not in (None, "test", "val"):
        raise ValueError(f"its accuracies are of {record.at('conditions', 'split')!r:.80}")
    if not _is_between(updates, 0, MAX_COUNT) or order not in (None, "fixed", "seed"):
        raise ValueError(f"its updates and order are {updates!r:.80} and {order!r:.80}")
    if (tuned := record.at("conditions", "tuned")) is not None and not (
        tuned["stream"] in STREAMS and _is_between(tuned["trials"], 0, MAX_COUNT)
    ):
        raise ValueError(f"conditions.tuned is {tuned!r:.80}")
    if len(record.at("conditions", "tuned_for") or "") > MAX_NAME:
        raise ValueError("conditions.tuned_for is too long")
    for key, one in (record.at("by_class") or {}).items():
        _check_accuracies([[*one["per_class"], one["balanced"]]])
        counts = [*one["samples"], *one["samples_per_task"]]
        lengths = {len(one[part]) for part in ("classes", "samples", "per_class")}
        whole = all(_is_between(count, 0, MAX_COUNT) for count in counts)
        if not whole or len(lengths) > 1 or len(one["samples_per_task"]) != record.tasks:
            raise ValueError(f"by_class.{key!s:.80} does not fit together")


def _check_accuracies(rows: Iterable[Iterable[Any]]) -> None:
    for value in (value for row in rows for value in row):
        if not _is_between(value, 0, 1):
            raise ValueError(f"an accuracy is {value!r:.80}")


def _is_between(value: Any, low: float, high: float) -> bool:
    """Whether a value is a number in a range, or was not measured; sums of accuracies are rounded."""
    if value is None:
        return True
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and low - _ROUNDING <= value <= high + _ROUNDING


def _read_matrix(folder: Path, tasks: int) -> list[Row]:
    matrix = read_matrix_rows(folder)
    if len(matrix) != tasks + 1:
        raise ResultsError(
            f"Expected {folder}/accuracy_matrix.csv to have a column for each of the {tasks} tasks of "
            f"results.json, but got {len(matrix) - 1}."
        )
    return [[None if math.isnan(value) else value for value in row] for row in matrix]


def _last_row_only(results: Mapping[str, Any]) -> list[Row]:
    tasks, learned = len(results["tasks"]), len(results["tasks_learned"])
    matrix: list[Row] = [[None] * tasks for _ in range(tasks + 1)]
    last = results["accuracy"]["per_task"]
    if learned and len(last) == tasks:
        matrix[learned] = list(last)
    return matrix


def _task_name(task: int, classes: Sequence[str]) -> str:
    shown = ", ".join(classes)
    if len(shown) > 60:
        shown = f"{shown[:45]}..., {len(classes)} classes"
    return f"task {task + 1}" + (f" ({shown})" if shown else "")
