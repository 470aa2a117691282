"""What a finished run leaves in its folder.

::

    <runs>/<experiment>/<method>/seed_<n>/
    ├── results.json          every figure of the run: schema.Results has its keys
    ├── accuracy_matrix.csv   header after_task,task_1,task_2,...; one row per measured moment
    │                         (0: before training, k: after the k-th task); an empty cell was not
    │                         measured
    ├── task_metrics.csv      after_task,task,<name>,...; one row per measured moment and task, of metrics
    │                         that are single numbers; there only where the module has `metrics`
    ├── gates.csv             gate,after,epoch,task_accuracy,...; one row per gate and measured moment, means
    │                         over the tasks learned by then; there only where the run has gates
    ├── figures/              accuracy_over_stream and accuracy_matrix, each as .png and .svg; with gates
    │                         also gates_over_stream and gate_calibration
    └── config.yaml  metrics.csv  checkpoints/     written elsewhere while the run goes on

results.json is written last: a folder that has one holds a finished run. Two equal runs write equal
bytes but for ``provenance``, which holds all that may differ between them. Accuracies are fractions
of 1; null stands where one was not measured or does not exist (one task knows no forgetting).
"""

import csv
import json
import math
from collections.abc import Mapping, Sequence
from io import StringIO
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, cast

from bpn_lightning.errors import ConfigurationError, ResultsError
from bpn_lightning.files.untrusted import read_text
from bpn_lightning.files.writing import csv_text, write_atomically
from bpn_lightning.run.gates import gate_results, gates_csv
from bpn_lightning.run.identity import setup_name
from bpn_lightning.run.schema import (
    MAX_TASKS,
    SCHEMA_VERSION,
    ClassAccuracy,
    Conditions,
    FrontRecord,
    Provenance,
    Results,
    Validation,
    read_schema,
)

if TYPE_CHECKING:  # reading a result needs no torch; writing one imports it below
    from matplotlib.figure import Figure
    from torch import Tensor

    from bpn_lightning.costs import Bytes
    from bpn_lightning.metrics.accuracy_matrix import AccuracyMatrix
    from bpn_lightning.metrics.gate_scores import GateScores
    from bpn_lightning.metrics.scores import ClassCounts
    from bpn_lightning.metrics.settling import Unsettled
    from bpn_lightning.tasks import Task

__all__ = ["read_matrix_csv", "read_matrix_rows", "read_results", "write_results"]

_RESULTS = "results.json"
_MATRIX = "accuracy_matrix.csv"
_TASK_METRICS = "task_metrics.csv"
_OVER_STREAM = "figures/accuracy_over_stream"
_HEATMAP = "figures/accuracy_matrix"
_GATES = "gates.csv"
_GATES_OVER_STREAM = "figures/gates_over_stream"
_CALIBRATION = "figures/gate_calibration"


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
    conditions: Conditions | None = None,
    class_counts: Mapping[str, "ClassCounts"] | None = None,
    validation: Sequence[float | None] = (),
    unsettled: Sequence["Unsettled"] = (),
    metrics: Sequence[Mapping[str, Any]] = (),
    gate_scores: Sequence["GateScores"] = (),
    front: FrontRecord | None = None,
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
        bytes_held: what the strategies hold in the end, in addition to the network's weights.
        provenance: what may differ between equal runs, see :mod:`bpn_lightning.run.provenance`.
        conditions: of a comparison with other runs; None leaves them out.
        class_counts: test samples and correct answers by class, for each score that has them.
        validation: accuracies on held-out samples, one per task; empty where nothing is held out.
        unsettled: tasks that lost accuracy in their last epoch.
        metrics: what the module's ``task_metrics`` are.
        gate_scores: what the module's ``gate_scores`` are.
        front: the run's, if it has one.
        config: the text of config.yaml; None where somebody else writes that file.
        extra: more results, of types that JSON knows; NaN becomes null.

    Returns:
        The path of results.json.

    Raises:
        ConfigurationError: there is not one task per column of the matrix.
        ResultsError: a file cannot be written.
    """
    from bpn_lightning.run.drawing import save_figure

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
        "by_class": {key: _by_class(counts, tasks) for key, counts in (class_counts or {}).items()},
        "validation": _validation(validation) if validation else None,
        "front": front,
        "gates": gate_results(gate_scores),
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
    if conditions is not None:
        results["conditions"] = conditions
    texts = {
        "config.yaml": config,
        _MATRIX: _matrix_csv(matrix.accuracy),
        _TASK_METRICS: _metrics_csv(metrics) if metrics else None,
        _GATES: gates_csv(results["gates"]) if gate_scores else None,
        _RESULTS: _json(results),  # last: see above
    }
    pictures = _pictures(results, matrix.accuracy, curve)
    try:
        (folder / "figures").mkdir(parents=True, exist_ok=True)
        for name, figure in pictures.items():
            save_figure(figure, folder / name)
        for name, text in texts.items():
            if text is not None:
                write_atomically(folder / name, text.encode())
    except OSError as error:
        raise ResultsError(
            f"Expected to write the run's results into {folder}, but got: {error}. Make room or "
            "give write access, then resume the run from its last checkpoint."
        ) from error
    return folder / _RESULTS


def _pictures(
    results: Results, accuracy: "Tensor", curve: Sequence[Mapping[str, Any]]
) -> dict[str, "Figure"]:
    """By their paths without a suffix."""
    from bpn_lightning.run.figures import (
        accuracy_curves,
        accuracy_heatmap,
        gate_calibration,
        gates_over_stream,
    )

    gates, front = results["gates"], results["front"]
    setup = setup_name(results["method"], gates, front and front["name"])
    title = f"{results['experiment']} · {setup} · seed {results['seed']}"
    epochs = [task["epochs"] for task in results["tasks"]]
    trained = any(epochs)  # and not gates alone
    pictures = {
        _OVER_STREAM: accuracy_curves(
            accuracy,
            curve=curve if trained else None,
            epochs_per_task=epochs if trained else None,
            title=title,
        ),
        _HEATMAP: accuracy_heatmap(accuracy, title=title),
    }
    if gates:
        pictures[_GATES_OVER_STREAM] = gates_over_stream(gates, title=title)
        pictures[_CALIBRATION] = gate_calibration(gates, title=title)
    return pictures


def read_results(path: Path) -> Results:
    """Read a results.json, or the one of a run's folder, and check it against its schema.

    Raises:
        ResultsError: it is missing, is no JSON, has another version, lacks a key or holds a value of
            another type; names the file and the key.
    """
    path = path / _RESULTS if path.is_dir() else path
    what, remedy = "the results.json of a finished run", "Run again with --overwrite true."
    return cast(Results, read_schema(path, Results, SCHEMA_VERSION, what, remedy))


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


def _header(tasks: int) -> list[str]:
    return ["after_task", *(f"task_{task + 1}" for task in range(tasks))]


def _matrix_csv(accuracy: "Tensor") -> str:
    """The measured rows."""
    measured = [
        [moment, *row]
        for moment, row in enumerate(accuracy.tolist())
        if not all(map(math.isnan, row))
    ]
    return csv_text([_header(accuracy.shape[1]), *measured])


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


def _by_class(counts: "ClassCounts", tasks: Sequence["Task"]) -> ClassAccuracy:
    """Recalls, and their mean, of the classes that have samples."""
    names: list[dict[str, None]] = [{} for _ in counts["samples"]]
    # Counts are of the past's tasks alone where a continuation was interrupted.
    for task in tasks[: len(counts["tasks"])]:
        for column, name in zip(range(*task.columns), task.class_names, strict=True):
            names[column][name] = None
    pairs = zip(counts["right"], counts["samples"], strict=True)
    recalls = [right / samples if samples else None for right, samples in pairs]
    known = [recall for recall in recalls if recall is not None]
    return {
        "samples_per_task": counts["tasks"],
        "classes": [" / ".join(of_column) for of_column in names],
        "samples": counts["samples"],
        "per_class": recalls,
        "balanced": fmean(known) if known else None,
    }


def _validation(per_task: Sequence[float | None]) -> Validation:
    known = [value for value in per_task if value is not None]
    return {
        "average": fmean(known) if len(known) == len(per_task) else None,
        "per_task": list(per_task),
    }


def _metrics_csv(measured: Sequence[Mapping[str, Any]]) -> str:
    """Those that are single numbers; an empty cell is not a number."""
    names = dict.fromkeys(
        name
        for one in measured
        for name, value in one["values"].items()
        if isinstance(value, int | float)
    )
    rows = [
        [one["after"], one["task"] + 1, *(one["values"].get(name) for name in names)]
        for one in measured
    ]
    return csv_text([["after_task", "task", *names], *rows])


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
