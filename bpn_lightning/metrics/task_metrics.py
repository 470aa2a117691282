"""Metrics of torchmetrics on each task's answers, beside the accuracy."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from bpn_lightning.errors import ConfigurationError

__all__ = ["Metrics", "TaskMetrics", "named_metrics"]

Metrics = dict[str, Metric] | list[Metric]
"""By the names that results give them, or a list, in which a metric has the name of its class."""


def named_metrics(metrics: Metrics | None) -> dict[str, Metric]:
    """Metrics by name.

    Raises:
        ConfigurationError: something else is among them, or two have one name.
    """
    items: Sequence[tuple[Any, Any]]
    if isinstance(metrics, Mapping):
        items = list(metrics.items())
    elif isinstance(metrics, list | tuple):
        items = [(type(metric).__name__, metric) for metric in metrics]
    elif metrics is None:
        items = []
    else:
        raise ConfigurationError(
            "Expected metrics to be a dictionary or a list of torchmetrics' metrics, but got "
            f"{type(metrics).__name__}. Put it into a list: [{type(metrics).__name__}(...)]."
        )
    for name, metric in items:
        if not isinstance(metric, Metric):
            raise ConfigurationError(
                f"Expected metrics to hold metrics of torchmetrics, but got {metric!r:.80}. Pass an "
                "object, such as torchmetrics.classification.MulticlassF1Score(num_classes=10)."
            )
        if not isinstance(name, str) or not name or not name.isprintable():
            raise ConfigurationError(
                f"Expected the names of metrics to be words, but got {name!r:.80}. They stand in results "
                "and tables."
            )
    twice = [name for name, count in Counter(name for name, _ in items).items() if count > 1]
    if twice:
        raise ConfigurationError(
            f"Expected metrics to have names of their own, but got {twice[0]} twice. Pass a dictionary."
        )
    return dict(items)


class TaskMetrics:
    """A copy of each metric for every task, in one pass over their answers.

    A metric sees ``(probabilities, targets)`` of whole batches, ``(batch, num_classes)`` and
    ``(batch,)``: of all classes of the stream, 0 for those that the mask leaves out. So one metric with
    ``num_classes`` of the stream does for every task and mask. Its own means make one value of what
    several processes saw.

    Args:
        metrics: by name; they stay as they are.
    """

    def __init__(self, metrics: Mapping[str, Metric]) -> None:
        self._metrics = metrics
        self._of_task: dict[int, dict[str, Metric]] = {}

    def update(self, task: int, logits: Tensor, targets: Tensor) -> None:
        """Add a batch of a task's samples, which may be empty.

        Args:
            task: its number.
            logits: ``(batch, num_classes)``, -inf for what the mask leaves out.
            targets: ``(batch,)`` int64.
        """
        if task not in self._of_task:
            self._of_task[task] = {
                name: _fresh(metric).to(logits.device) for name, metric in self._metrics.items()
            }
        if not len(targets):  # which torchmetrics cannot count
            return
        probabilities = logits.float().softmax(1)
        for metric in self._of_task[task].values():
            metric.update(probabilities, targets)

    def compute(self) -> dict[int, dict[str, Any]]:
        """By task and name: numbers, and lists of them; every process gets the same."""
        return {
            task: {name: _plain(metric.compute()) for name, metric in metrics.items()}
            for task, metrics in self._of_task.items()
        }

    def check(self, num_classes: int, batches: Iterable[int], processes: int) -> None:
        """Try every metric on a few made-up answers.

        Args:
            num_classes: of the stream.
            batches: samples of each task's first test batch, over all processes.
            processes: how many; torchmetrics joins lists only where each of them has something.

        Raises:
            ConfigurationError: names the metric and what it said, or the task that is too small.
        """
        small = next((n for n, size in enumerate(batches) if size < processes), None)
        if small is not None:
            raise ConfigurationError(
                f"Expected every process to have test samples of every task where metrics are set, but task "
                f"{small} has none for some of the {processes}. Use fewer processes, or a larger "
                "eval_batch_size."
            )
        targets = torch.arange(num_classes)
        for name, metric in self._metrics.items():
            try:
                trial = _fresh(metric).cpu()
                trial.sync_on_compute = False
                trial.update(torch.eye(num_classes), targets)
                value = _plain(trial.compute())
            except Exception as error:  # it may be anybody's
                said = " ".join(str(error).split())
                raise ConfigurationError(
                    f"Expected metrics.{name} to take probabilities (batch, {num_classes}) and targets "
                    f"(batch,) int64, but {type(metric).__name__} raised {type(error).__name__}: {said}. "
                    f"Give it num_classes={num_classes}, or take one for several classes."
                ) from error
            if value is None:
                raise ConfigurationError(
                    f"Expected metrics.{name} to give numbers, but {type(metric).__name__} gave "
                    f"{type(trial.compute()).__name__}. Take one whose value is a tensor."
                )


def _fresh(metric: Metric) -> Metric:
    """A copy that has seen nothing."""
    copy = metric.clone()
    copy.reset()
    return copy


def _plain(value: Any) -> Any:
    """Numbers and lists of what a metric computed; None where it is something else."""
    if isinstance(value, Tensor):
        return value.tolist()
    if isinstance(value, Mapping):
        return {str(key): _plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    return value if isinstance(value, int | float) else None
