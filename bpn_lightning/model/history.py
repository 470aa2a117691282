"""What a module has measured over its stream, and the metrics that loggers get of it."""

from collections.abc import Iterable, Mapping
from math import isnan
from statistics import fmean
from typing import Any, Literal, cast

from lightning.pytorch.loggers import Logger
from torch import Tensor

from bpn_lightning.costs import bytes_held, bytes_per_task
from bpn_lightning.errors import ConfigurationError
from bpn_lightning.metrics.gate_scores import GateScores
from bpn_lightning.metrics.scores import ClassCounts
from bpn_lightning.metrics.settling import Settling
from bpn_lightning.model.host import Host

__all__ = ["History", "log_metrics", "per_task", "stream_metrics"]


class History:
    """The curve of accuracies, the metrics of each task, and whether tasks settled.

    Args:
        evaluate_every: whether the curve has a point after every ``task``, which the accuracy matrix
            holds, or after every ``epoch``.

    Attributes:
        settling: compares a task's last two epochs.
        metrics: dictionaries with ``after`` (tasks learned by then), ``task`` (the one that was tested)
            and ``values`` (by name: a number, or for the newest moment also lists of numbers).

        gate_scores: what gates answered, in the order of moments; see
            :class:`~bpn_lightning.metrics.gate_scores.GateScores`.
        class_counts: test samples and correct answers by class after the last task learned, for ``accuracy`` and
            ``accuracy_task_agnostic``, as far as they were measured.
        validation: accuracies on the held-out parts at the stream's end, None where not measured; empty where
            nothing is held out.
        overtaken: of each learned task, the fraction of its test samples that were last answered with a
            class of a later task, None where not measured; empty where no core is frozen.

    State: plain values.

    Raises:
        ConfigurationError: evaluate_every is something else.
    """

    def __init__(self, evaluate_every: Literal["task", "epoch"]) -> None:
        if evaluate_every not in ("task", "epoch"):
            raise ConfigurationError(
                f"Expected evaluate_every to be 'task' or 'epoch', but got {evaluate_every!r}."
            )
        self.evaluate_every = evaluate_every
        self.settling = Settling()
        self.metrics: list[dict[str, Any]] = []
        self.gate_scores: list[GateScores] = []
        self.class_counts: dict[str, ClassCounts] = {}
        self.validation: list[float | None] = []
        self.overtaken: list[float | None] = []
        self._points: list[dict[str, Any]] = []  # only what the matrix lacks

    def add_point(self, accuracy: Tensor, task: int, epoch: int) -> None:
        """Add accuracies ``(tasks,)`` after so many epochs to the curve, once for each epoch."""
        new = not self._points or self._points[-1]["epoch"] < epoch
        if self.evaluate_every == "epoch" and new:
            self._points.append(_point(accuracy, task, epoch))

    def add_metrics(self, after: int, values: Mapping[int, Mapping[str, Any]]) -> None:
        """Add each task's metrics by name, after so many learned tasks; once for each moment."""
        earlier = [one for one in self.metrics if one["after"] != after]
        self.metrics = [{**one, "values": _numbers(one["values"])} for one in earlier]
        self.metrics += [{"after": after, "task": t, "values": v} for t, v in values.items()]

    def add_gate_scores(self, epoch: int, found: list[GateScores]) -> None:
        """Add what gates answered after so many epochs; once for each moment."""
        moments = {(one["after"], epoch) for one in found}
        earlier = [one for one in self.gate_scores if (one["after"], one["epoch"]) not in moments]
        self.gate_scores = earlier + found

    def curve(self, host: Host) -> list[dict[str, Any]]:
        """Dictionaries with ``epoch``, ``task`` and ``accuracy``; see ``ContinualModule.curve``."""
        network = host.network
        if self.evaluate_every == "epoch" or network.opened < 0:
            return self._points
        schedule, rows = host.cursor.schedule, network.accuracy_matrix.accuracy
        ends = [0, *(schedule.last_epoch(task) + 1 for task in range(network.closed + 1))]
        return [_point(rows[k], max(k - 1, 0), epoch) for k, epoch in enumerate(ends)]

    def state_dict(self, right: int) -> dict[str, Any]:
        """What a checkpoint keeps.

        Args:
            right: answers of all processes that were right; see ``Settling.state``.
        """
        return {
            "curve": [dict(point) for point in self._points],
            "metrics": [dict(one) for one in self.metrics],
            "gate_scores": [dict(one) for one in self.gate_scores],
            "class_counts": {key: dict(counts) for key, counts in self.class_counts.items()},
            "validation": list(self.validation),
            "overtaken": list(self.overtaken),
            "settling": self.settling.state(right),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over :meth:`state_dict`."""
        self._points = [dict(point) for point in state["curve"]]
        self.metrics = [dict(one) for one in state["metrics"]]
        self.gate_scores = [cast(GateScores, dict(one)) for one in state.get("gate_scores", ())]
        self.class_counts = {
            key: cast(ClassCounts, dict(one)) for key, one in state.get("class_counts", {}).items()
        }
        self.validation = list(state.get("validation", ()))
        self.overtaken = list(state.get("overtaken", ()))
        self.settling.load(state["settling"])


def stream_metrics(
    host: Host,
    current_only: bool,
    gate_scores: Iterable[GateScores] = (),
    overtaken: Iterable[float | None] = (),
) -> dict[str, float]:
    """What is known between two tasks; figures that do not exist yet are left out.

    Before training that is the accuracy on every task, so that a file has all its columns at once: a
    new one with every task would rewrite it again and again.

    Args:
        host: of the network whose tasks are learned.
        current_only: whether each task is tested right after it is learned, and no other is.
        gate_scores: of all moments.
        overtaken: see :class:`History`.
    """
    network = host.network
    learned, matrix = network.closed + 1, network.accuracy_matrix
    row = matrix.accuracy[learned]
    metrics: dict[str, float] = {"stream/tasks_learned": learned}
    if not current_only:
        metrics |= per_task("accuracy", row[: learned or None])
    elif learned:
        metrics["accuracy/current"] = float(row[network.closed])
    if learned and (not current_only or learned == len(network.tasks)):
        figures = {name: float(value) for name, value in matrix.compute().items()}
        names = ("average", "bwt", "fwt", "forgetting")
        metrics |= {f"accuracy/{name}": figures[name] for name in names}
        metrics["accuracy_after_learning/average"] = figures["after_learning"]
        metrics["accuracy_task_agnostic/average"] = figures["task_agnostic"]
    if learned and not current_only:
        metrics |= per_task("accuracy_task_agnostic", matrix.task_agnostic[:learned])
    if learned:
        held = bytes_held(host.strategies, host)._asdict()
        stored = bytes_per_task(host.strategies, host)
        metrics |= {f"bytes_held/{name}": value for name, value in held.items()}
        metrics |= {f"bytes_per_task/{name}": value for name, value in stored.items()}
    old = [value for value in [*overtaken][:-1] if value is not None]
    if old:
        metrics["overtaken/average"] = fmean(old)
    for one in gate_scores:
        if one["after"] == learned:
            metrics |= gate_metrics(one)
    return {name: value for name, value in metrics.items() if not isnan(value)}


def gate_metrics(scores: GateScores) -> dict[str, float]:
    """``accuracy_gate/<name>/...`` of one moment: means over the tasks that were tested."""
    lists = {
        "task": scores["task_accuracy"],
        "end_to_end": scores["mixture"],
        "own_class": scores["own_class"],
    }
    known = {key: [x for x in values or () if x is not None] for key, values in lists.items()}
    prefix = f"accuracy_gate/{scores['gate']}"
    return {f"{prefix}/{key}": fmean(values) for key, values in known.items() if values}


def per_task(prefix: str, values: Tensor) -> dict[str, float]:
    """``prefix/task_1`` and so on, of values ``(tasks,)``."""
    return {f"{prefix}/task_{k}": value for k, value in enumerate(values.tolist(), start=1)}


def log_metrics(loggers: Iterable[Logger], metrics: Mapping[str, float], step: int) -> None:
    """Hand metrics to every logger."""
    for logger in loggers:
        logger.log_metrics(dict(metrics), step=step)


def _numbers(values: Mapping[str, Any]) -> dict[str, Any]:
    """Those that are single numbers: lists are kept of the newest moment only."""
    return {name: value for name, value in values.items() if isinstance(value, int | float)}


def _point(accuracy: Tensor, task: int, epoch: int) -> dict[str, Any]:
    values = [None if isnan(value) else value for value in accuracy.tolist()]
    return {"epoch": epoch, "task": task, "accuracy": values}
