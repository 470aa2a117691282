"""What a finished run leaves in its folder.

::

    <runs>/<experiment>/<method>/seed_<n>/
    ├── results.json          every figure of the run: class Results is its schema
    ├── accuracy_matrix.csv   header after_task,task_1,task_2,...; one row per measured moment
    │                         (0: before training, k: after the k-th task); an empty cell was not
    │                         measured
    ├── task_metrics.csv      after_task,task,<name>,...; one row per measured moment and task, of metrics
    │                         that are single numbers; there only where the module has `metrics`
    ├── figures/              accuracy_over_stream and accuracy_matrix, each as .png and .svg
    └── config.yaml  metrics.csv  checkpoints/     written elsewhere while the run goes on

results.json is written last: a folder that has one holds a finished run. Two equal runs write equal
bytes but for ``provenance``, which holds all that may differ between them. Accuracies are fractions
of 1; null stands where one was not measured or does not exist (one task knows no forgetting).
"""

import csv
import json
import math
import os
import platform
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime, timezone
from importlib import metadata
from io import StringIO
from pathlib import Path
from types import NoneType, UnionType
from typing import (
    TYPE_CHECKING,
    Any,
    TypedDict,
    Union,
    cast,
    get_args,
    get_origin,
    get_type_hints,
    is_typeddict,
)

from bpn_lightning.errors import ConfigurationError, ResultsError
from bpn_lightning.files import write_atomically
from bpn_lightning.metrics.scores import AfterLearning, TaskAgnostic
from bpn_lightning.untrusted import read_json, read_text

if TYPE_CHECKING:  # reading a result needs no torch; writing one imports it below
    from torch import Tensor

    from bpn_lightning.costs import Bytes
    from bpn_lightning.metrics.accuracy_matrix import AccuracyMatrix
    from bpn_lightning.metrics.settling import Unsettled
    from bpn_lightning.tasks import Task

__all__ = [
    "SCHEMA_VERSION",
    "Accuracy",
    "BytesPerTask",
    "Host",
    "Provenance",
    "Results",
    "TaskRecord",
    "UnsettledTask",
    "collect_provenance",
    "read_matrix_csv",
    "read_matrix_rows",
    "read_results",
    "read_schema",
    "violations",
    "write_results",
]

SCHEMA_VERSION = 2
"""Goes up when a key of results.json is renamed, removed or changes its meaning."""


MAX_TASKS = 2000
"""Of a table that is read; a row for each moment makes it 4,000,000 accuracies."""


class Accuracy(TypedDict):
    """Accuracies after the last task learned, where the task id is given (the task oracle)."""

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
    """Epochs planned for its own training; early stopping may have ended it before."""


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


class Provenance(TypedDict):
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


class Results(TypedDict):
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


_RESULTS = "results.json"
_MATRIX = "accuracy_matrix.csv"
_TASK_METRICS = "task_metrics.csv"
_OVER_STREAM = "figures/accuracy_over_stream"
_HEATMAP = "figures/accuracy_matrix"

_PACKAGES = ("torch", "lightning", "torchvision", "torchmetrics", "bpn_lightning")


def write_results(
    folder: Path,
    *,
    experiment: str,
    method: str,
    seed: int,
    matrix: "AccuracyMatrix",
    curve: Sequence[Mapping[str, Any]],
    tasks: Sequence["Task"],
    bytes_per_task: Mapping[str, int | None],
    bytes_held: "Bytes",
    provenance: Provenance,
    unsettled: Sequence["Unsettled"] = (),
    metrics: Sequence[Mapping[str, Any]] = (),
    config: str | None = None,
    extra: Mapping[str, Any] | None = None,
) -> Path:
    """Write a run's matrix, pictures and figures; in DDP, on one process only.

    Args:
        folder: the run's own; made where it is missing.
        experiment: name of the experiment.
        method: name of the method.
        seed: the run's seed.
        matrix: accuracies of every task at every moment.
        curve: accuracies at finer moments, for the picture; may be empty.
        tasks: the stream's tasks.
        bytes_per_task: what a task adds to what is stored, ``measured`` and by the ``paper``.
        bytes_held: what the strategies hold in the end, beside the network's weights.
        provenance: what may differ between equal runs, see :func:`collect_provenance`.
        unsettled: tasks that lost accuracy in their last epoch.
        metrics: what the module's ``task_metrics`` are.
        config: the text of config.yaml; None where somebody else writes that file.
        extra: more results, of types that JSON knows; NaN becomes null.

    Returns:
        The path of results.json.

    Raises:
        ConfigurationError: there is not one task per column of the matrix.
        ResultsError: a file cannot be written.
    """
    from bpn_lightning.run.figures import accuracy_curves, accuracy_heatmap, save_figure

    if len(tasks) != matrix.num_tasks:
        raise ConfigurationError(
            f"Expected tasks to be as many as the {matrix.num_tasks} columns of the matrix, "
            f"but got {len(tasks)}."
        )
    summary = matrix.summary()
    learned = matrix.tasks_learned
    results: Results = {
        "schema_version": SCHEMA_VERSION,
        "experiment": experiment,
        "method": method,
        "seed": seed,
        "tasks": [
            {"id": task.id, "classes": list(task.class_names), "epochs": task.epochs}
            for task in tasks
        ],
        "tasks_learned": [task.id for task in tasks[:learned]],
        "tasks_not_learned": [task.id for task in tasks[learned:]],
        "accuracy": {
            "average": summary["average"],
            "first_task": summary["first_task"],
            "per_task": summary["per_task"],
            "bwt": summary["bwt"],
            "fwt": summary["fwt"],
            "forgetting": summary["forgetting"],
        },
        "accuracy_task_agnostic": summary["task_agnostic"],
        "accuracy_after_learning": summary["after_learning"],
        "unsettled_tasks": [
            {"id": one.task, "split": one.split, "before": one.before, "after": one.after}
            for one in unsettled
        ],
        "metrics": _final_metrics(metrics, len(tasks), learned),
        "bytes_per_task": {
            "measured": bytes_per_task["measured"],
            "paper": bytes_per_task["paper"],
        },
        "bytes_held": {
            "training": bytes_held.training,
            "inference": bytes_held.inference,
        },
        "extra": dict(extra or {}),
        "provenance": provenance,
    }
    title = f"{experiment} · {method} · seed {seed}"
    epochs = [task.epochs for task in tasks]
    over_stream = accuracy_curves(matrix.accuracy, curve=curve, epochs_per_task=epochs, title=title)
    try:
        (folder / "figures").mkdir(parents=True, exist_ok=True)
        if config is not None:
            write_atomically(folder / "config.yaml", config.encode())
        write_atomically(folder / _MATRIX, _matrix_csv(matrix.accuracy).encode())
        if metrics:
            write_atomically(folder / _TASK_METRICS, _metrics_csv(metrics).encode())
        save_figure(over_stream, folder / _OVER_STREAM)
        save_figure(accuracy_heatmap(matrix.accuracy, title=title), folder / _HEATMAP)
        write_atomically(folder / _RESULTS, _json(results).encode())
    except OSError as error:
        raise ResultsError(
            f"Expected to write the run's results into {folder}, but got: {error}. Make room or "
            "give write access, then resume the run from its last checkpoint."
        ) from error
    return folder / _RESULTS


def read_results(path: Path) -> Results:
    """Read a results.json, or the one of a run's folder, and check it against its schema.

    Raises:
        ResultsError: it is missing, is no JSON, has another version, lacks a key or holds a value of
            another type; names the file and the key.
    """
    path = path / _RESULTS if path.is_dir() else path
    what, remedy = "the results.json of a finished run", "Run again with --overwrite true."
    return cast(Results, read_schema(path, Results, SCHEMA_VERSION, what, remedy))


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


def read_matrix_csv(path: Path) -> "Tensor":
    """Read an accuracy_matrix.csv, or the one of a run's folder.

    Returns:
        ``(tasks + 1, tasks)`` float64, NaN where not measured.

    Raises:
        ResultsError: it is missing or is no such table; names the file and the line.
    """
    import torch

    return torch.tensor(read_matrix_rows(path), dtype=torch.float64)


def read_matrix_rows(path: Path) -> list[list[float]]:
    """The same as plain numbers: a row for each moment, an entry for each task.

    Raises:
        ResultsError: it is missing or is no such table; names the file and the line.
    """
    path = path / _MATRIX if path.is_dir() else path
    try:
        table = list(csv.reader(StringIO(read_text(path))))
    except (OSError, ValueError, csv.Error) as error:
        raise ResultsError(
            f"Expected {path} to be the accuracy matrix of a run, but got: {error}."
        ) from error
    header = table[0] if table else []
    tasks = len(header) - 1
    if tasks < 1 or header != _header(tasks):
        raise ResultsError(
            f"Expected {path} to begin with after_task,task_1,task_2,..., but got "
            f"{','.join(header)[:80]!r}."
        )
    if tasks > MAX_TASKS:
        raise ResultsError(
            f"Expected {path} to have at most {MAX_TASKS:,} tasks, but got {tasks:,}. Remove the run."
        )
    matrix = [[math.nan] * tasks for _ in range(tasks + 1)]
    for line, row in enumerate(table[1:], start=2):
        try:
            moment, *accuracies = (float(cell) if cell else math.nan for cell in row)
            if moment not in range(tasks + 1) or len(accuracies) != tasks:
                raise ValueError(f"{','.join(row)[:80]!r}")
        except ValueError as error:
            raise ResultsError(
                f"Expected line {line} of {path} to hold a moment from 0 to {tasks} and {tasks} "
                f"accuracies, but got: {str(error)[:200]}."
            ) from error
        matrix[int(moment)] = accuracies
    return matrix


def collect_provenance(seconds: float) -> Provenance:
    """What this process knows of the circumstances of its run.

    Args:
        seconds: wall time of the run.
    """
    import torch

    versions: dict[str, str | None] = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "seconds": round(seconds, 3),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": versions,
        "commit": _commit(Path(__file__).resolve()),
        "host": {
            "name": platform.node(),
            "platform": platform.platform(),
            "cpu": _cpu(),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
            "threads": torch.get_num_threads(),
        },
    }


def _header(tasks: int) -> list[str]:
    return ["after_task", *(f"task_{task + 1}" for task in range(tasks))]


def _matrix_csv(accuracy: "Tensor") -> str:
    """The measured rows, each number by its repr, so that reading gives the very same one."""
    text = StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(_header(accuracy.shape[1]))
    for moment, row in enumerate(accuracy.tolist()):
        if not all(map(math.isnan, row)):
            writer.writerow([moment, *("" if math.isnan(x) else repr(x) for x in row)])
    return text.getvalue()


def _final_metrics(
    measured: Sequence[Mapping[str, Any]], tasks: int, learned: int
) -> dict[str, list[Any]]:
    """By name, a value for each task as it was after the last learned one."""
    last = {one["task"]: one["values"] for one in measured if one["after"] == learned}
    names = dict.fromkeys(name for values in last.values() for name in values)
    return {
        name: [last.get(task, {}).get(name) if task < learned else None for task in range(tasks)]
        for name in names
    }


def _metrics_csv(measured: Sequence[Mapping[str, Any]]) -> str:
    """Those that are single numbers, each by its repr; an empty cell is not a number."""
    names = dict.fromkeys(
        name
        for one in measured
        for name, value in one["values"].items()
        if isinstance(value, int | float)
    )
    text = StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["after_task", "task", *names])
    for one in measured:
        values = [one["values"].get(name, math.nan) for name in names]
        cells = ["" if math.isnan(value) else repr(value) for value in values]
        writer.writerow([one["after"], one["task"] + 1, *cells])
    return text.getvalue()


def _json(results: Results) -> str:
    return json.dumps(_without_nan(results), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def _without_nan(value: Any) -> Any:
    """The same with null for NaN and infinities, which JSON does not know."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    return value


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
            if name not in value:
                yield inner, "there", "nothing"
            else:
                yield from violations(value[name], hint, inner)
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
        if not isinstance(value, allowed) or isinstance(value, bool):
            yield key, f"of type {expected.__name__}", shown


def _commit(source: Path) -> str | None:
    """The commit of the checkout that tracks a file, or None; never an error."""
    # Inside a git hook these variables point at another repository.
    environment = {k: v for k, v in os.environ.items() if not k.startswith("GIT_")}

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "--no-optional-locks", *arguments],
            cwd=source.parent,
            env=environment,
            capture_output=True,
            text=True,
            check=True,
            timeout=30,
        ).stdout.strip()

    try:
        # A wheel may lie inside somebody else's checkout, whose commit says nothing about it.
        git("ls-files", "--error-unmatch", source.name)
        return git("describe", "--always", "--abbrev=40", "--exclude=*", "--dirty")
    except (OSError, subprocess.SubprocessError):
        return None


def _cpu() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass  # not Linux
    return platform.processor() or platform.machine()
