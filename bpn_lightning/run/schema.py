"""The keys and types of results.json, and of any JSON that is read by a typed dictionary.

Accuracies are fractions of 1; null stands where one was not measured or does not exist (one task knows
no forgetting).
"""

from collections.abc import Iterator
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, TypedDict, Union, cast, get_args, get_origin, get_type_hints, is_typeddict

from bpn_lightning.errors import ResultsError
from bpn_lightning.files.untrusted import read_json
from bpn_lightning.metrics.scores import AfterLearning, Calibration, TaskAgnostic

__all__ = [
    "MAX_TASKS",
    "SCHEMA_VERSION",
    "Accuracy",
    "BytesHeld",
    "BytesPerTask",
    "ClassAccuracy",
    "Conditions",
    "Continues",
    "FrontRecord",
    "GateAccuracy",
    "GateMoment",
    "GateResults",
    "Host",
    "Provenance",
    "Results",
    "Scenario",
    "Scenarios",
    "TaskRecord",
    "Tuned",
    "UnsettledTask",
    "Validation",
    "read_schema",
    "violations",
]

SCHEMA_VERSION = 3
"""Goes up when a key of results.json is renamed, removed or changes its meaning."""


MAX_TASKS = 2000
"""Of a table that is read; a row for each moment makes it 4,000,000 accuracies."""


class Accuracy(TypedDict):
    """Accuracies after the last task learned, where the task ID is given."""

    average: float | None
    """Mean over the tasks learned: ACC."""
    first_task: float | None
    """What is left of task 1."""
    per_task: list[float | None]
    """One per task of the stream; null for tasks that were not learned."""
    bwt: float | None
    """Backward transfer; negative where tasks were forgotten."""
    fwt: float | None
    """Forward transfer, against the untrained network."""
    forgetting: float | None
    """Mean fall from each task's best moment."""


class BytesHeld(TypedDict):
    """What the strategies hold when the last task is learned."""

    training: int
    """Bytes, everything that they need to go on learning."""
    inference: int
    """Bytes of these that are needed to use what was learned."""


class BytesPerTask(TypedDict):
    """What one task adds to what is stored for use after training; null where it is not known."""

    measured: int | None
    """Bytes of the network that was built."""
    paper: int | None
    """Bytes by the paper's formula."""


class TaskRecord(TypedDict):
    """One task of the stream, in the order of learning."""

    id: int
    """From 0; the column task_1 of accuracy_matrix.csv is task 0."""
    classes: list[str]
    epochs: int
    """Epochs planned for its own training; early stopping may have ended it before. 0: no network was
    trained, and the accuracies are those of the first gate's own class."""


class UnsettledTask(TypedDict):
    """A task whose accuracy fell by more than 0.1 in the last epoch of its own training."""

    id: int
    """From 0."""
    split: str
    """What was counted: "train", as answered in the updates themselves, or "val"."""
    before: float
    """In its last epoch but one."""
    after: float
    """In its last epoch."""


class Host(TypedDict):
    """The machine of a run."""

    name: str
    platform: str
    cpu: str
    gpu: str | None
    threads: int
    """CPU threads of one process."""


class Continues(TypedDict):
    """The run that learned the tasks before."""

    run: str
    """Experiment, method, gates, front and seed."""
    tasks: int
    """How many it and those before it had learned."""
    date: str | None
    """When it ended; null where its results were not there."""
    results_sha256: str | None
    """Of its results.json, in hexadecimal digits."""


class PretrainedRecord(TypedDict):
    """Where the weights of a network come from."""

    library: str
    version: str
    name: str
    """Of the network in the library."""
    weights: str
    """Their ID in the library or the package that has them, or the name of a file."""
    sha256: str
    """Of the weights' names, types, shapes and bits, in hexadecimal digits."""


class _Continued(TypedDict, total=False):
    continues: Continues
    """Missing in a run that began with its first task."""
    pretrained: list[PretrainedRecord]
    """Missing in a run whose networks began with random weights."""


class Provenance(_Continued):
    """What may differ between equal runs."""

    seconds: float
    """Wall time of the run."""
    date: str
    """When it ended: ISO 8601, UTC."""
    versions: dict[str, str | None]
    """Of Python and of the packages that decide the numbers."""
    commit: str | None
    """Of the checkout that the package is installed from, with "-dirty" where tracked files differ
    from it; null for an installed wheel."""
    host: Host


class FrontRecord(TypedDict):
    """The fixed feature extractor before network and gates."""

    name: str
    bytes: int
    """Of its tensors, which all tasks share."""


class GateAccuracy(TypedDict):
    """Accuracies of a gate after the last task learned."""

    average: float | None
    """Mean over the tasks learned."""
    per_task: list[float | None]
    """One per task of the stream; null for tasks that were not learned."""


class GateMoment(TypedDict):
    """Averages of a gate over the tasks learned by some moment of the stream."""

    after: int
    """Tasks learned by then."""
    epoch: int
    """Epochs of the stream done by then."""
    task_accuracy: float | None
    end_to_end: float | None
    mixture: float | None
    own_class: float | None
    own_class_task_given: float | None
    calibration_error: float | None
    rejection: float | None
    """Area under the ROC curve by which the largest task score tells learned tasks from others."""


class GateResults(TypedDict):
    """What one gate gave: the task ID is not given, unless a key says so."""

    task_accuracy: GateAccuracy
    """Whose task is named."""
    end_to_end: GateAccuracy
    """Whose class is named by the mode of the likeliest task."""
    mixture: GateAccuracy
    """Whose class is named by p(task) p(class | task) over the likeliest ``modes`` tasks."""
    modes: int
    own_class: GateAccuracy | None
    """Whose class is that of the gate's likeliest row; null where rows stand for tasks."""
    own_class_task_given: GateAccuracy | None
    """The same among the rows of the sample's task."""
    calibration: Calibration | None
    over_stream: list[GateMoment]
    bytes_held: int
    """For use after the last task."""
    bytes_per_task: int
    """Of these, what one task adds."""


class Scenario(TypedDict):
    """What an accuracy is of, after van de Ven & Tolias (2019); see :mod:`bpn_lightning.run.scenarios`."""

    name: str
    """"task-incremental", "domain-incremental" or "class-incremental"."""
    task_id_given: bool
    """Whether the method was given the task ID of each test sample."""


class Scenarios(TypedDict):
    """Of the accuracies of these names."""

    accuracy: Scenario
    accuracy_task_agnostic: Scenario | None
    """Null where it was not measured."""


class Tuned(TypedDict):
    """Where tuned values come from; see :mod:`bpn_lightning.run.tuning`."""

    sha256: str
    """Of the tuning.json, in hexadecimal digits."""
    keys: list[str]
    """Whose values were searched."""
    trials: int
    seeds: list[int]
    sampler: str
    score: str
    stream: str
    """How the tuning stream differs: "other classes", "another order", "other draws", "the same tasks"; or
    "shared classes" where the run has learned some of the classes that values were tuned on."""


class Conditions(TypedDict, total=False):
    """What runs need to have alike, or to vary, before their accuracies are compared.

    Of runs of earlier releases, some are known from their settings.
    """

    scenarios: Scenarios
    order: str
    """"seed" where the seed draws what tasks are made of, their classes or transforms; else "fixed"."""
    tuned_for: str | None
    """The experiment that the method's values were tuned for; null for defaults and given values."""
    tuned: Tuned
    """Missing where no record of a search is given."""
    split: str
    """What the accuracies are measured on: "test", or "val" for the held-out part of the training samples."""
    updates: int
    """Steps of the optimizer over the stream; of a run that continues from an export, its own."""


class ClassAccuracy(TypedDict):
    """Test samples, and accuracies by class over the tasks learned together."""

    samples_per_task: list[int]
    """One per task of the stream; 0 where it was not tested."""
    classes: list[str]
    """By column of the head; the names of several tasks that share a column are joined."""
    samples: list[int]
    """Of each class."""
    per_class: list[float | None]
    """The recall of each class; null for one without samples."""
    balanced: float | None
    """Their mean."""


class Validation(TypedDict):
    """Accuracies on held-out training samples after the last task, where the task ID is given."""

    average: float | None
    """Mean over all tasks."""
    per_task: list[float | None]


class _Added(TypedDict, total=False):
    """Keys that results of earlier releases lack."""

    conditions: Conditions
    by_class: dict[str, ClassAccuracy]
    """For "accuracy" and "accuracy_task_agnostic", as far as they were measured."""
    validation: Validation | None
    """Null where nothing was held out."""


class Results(_Added):
    """The schema of results.json."""

    schema_version: int
    experiment: str
    method: str
    seed: int
    tasks: list[TaskRecord]
    tasks_learned: list[int]
    """Ids of the tasks that were learned to their end."""
    tasks_not_learned: list[int]
    """Ids of the others; empty unless the stream ended early."""
    accuracy: Accuracy
    accuracy_task_agnostic: TaskAgnostic | None
    """The same without any task id (class-incremental); null where it was not measured."""
    front: FrontRecord | None
    """Null for a run without one."""
    gates: dict[str, GateResults]
    """By the gates' names, in their order."""
    accuracy_after_learning: AfterLearning
    """On each task at the moment when it had just been learned, with its id."""
    unsettled_tasks: list[UnsettledTask]
    """Tasks whose last epoch took away what the one before had; their scores are a matter of chance."""
    metrics: dict[str, list[Any]]
    """By name, of the module's ``metrics``: for every task what it came to after the last learned task, a
    number or lists of numbers; null for tasks that were not learned."""
    bytes_per_task: BytesPerTask
    bytes_held: BytesHeld
    """Beside the network's own weights, after the last learned task, from the strategies' tensors."""
    extra: dict[str, Any]
    """Whatever else a caller wants to keep."""
    provenance: Provenance


def read_schema(path: Path, schema: type, version: int, what: str, remedy: str) -> dict[str, Any]:
    """Read a JSON file that has the keys of a typed dictionary.

    Args:
        path: of the file.
        schema: the typed dictionary.
        version: that its ``schema_version`` has to be.
        what: the file should be, for messages.
        remedy: for messages.

    Raises:
        ResultsError: it is missing, is no JSON, has another version, lacks a key or holds a value of
            another type; names the file and the key.
    """
    try:
        found = read_json(path)
    except (OSError, ValueError) as error:
        raise ResultsError(
            f"Expected {path} to be {what}, JSON in UTF-8, but got: {error}. {remedy}"
        ) from error
    here = found.get("schema_version") if isinstance(found, dict) else None
    if here != version:
        raise ResultsError(
            f"Expected schema_version of {path} to be {version}, but got {here!r}. Read it with the "
            f"release of bpn_lightning that wrote it. {remedy}"
        )
    for key, rule, value in violations(found, schema, ""):
        raise ResultsError(f"Expected {key} of {path} to be {rule}, but got {value}. {remedy}")
    return cast("dict[str, Any]", found)


def violations(value: Any, expected: Any, key: str) -> Iterator[tuple[str, str, str]]:
    """Where a value out of JSON is not what a type says: key, rule and what was found instead."""
    origin, arguments = get_origin(expected), get_args(expected)
    shown = f"{value!r:.80}"
    if origin in (Union, UnionType):
        if not (value is None and NoneType in arguments):
            (other,) = (argument for argument in arguments if argument is not NoneType)
            for where, rule, found in violations(value, other, key):
                yield where, f"{rule} or null" if where == key else rule, found
    elif is_typeddict(expected):
        if not isinstance(value, dict):
            yield key or "the whole", "an object", shown
            return
        for name, hint in get_type_hints(expected).items():
            inner = f"{key}.{name}" if key else name
            if name in value:
                yield from violations(value[name], hint, inner)
            elif name in expected.__required_keys__:
                yield inner, "there", "nothing"
    elif origin is list:
        if not isinstance(value, list):
            yield key, "a list", shown
            return
        for index, item in enumerate(value):
            yield from violations(item, arguments[0], f"{key}[{index}]")
    elif origin is dict:
        if not isinstance(value, dict):
            yield key, "an object", shown
            return
        for name, item in value.items():
            yield from violations(item, arguments[1], f"{key}.{name}")
    elif expected is not Any:
        allowed = (int, float) if expected is float else expected
        if not isinstance(value, allowed) or (isinstance(value, bool) and expected is not bool):
            yield key, f"of type {expected.__name__}", shown
