"""Additional metrics of torchmetrics per task."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from bpn_lightning.errors import ConfigurationError

__all__ = ["Metrics", "TaskMetrics", "named_metrics"]

Metrics = dict[str, Metric] | list[Metric]
"""A dictionary by their names in results, or a list, in which the names are those of the classes."""


def named_metrics(metrics: Metrics | None) -> dict[str, Metric]:
    """Metrics by name.

    Raises:
        ConfigurationError: one of them is not a metric, or two have the same name.
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
                f"Expected the names of metrics to be words, but got {name!r:.80}. They are used in "
                "results and tables."
            )
    twice = [name for name, count in Counter(name for name, _ in items).items() if count > 1]
    if twice:
        raise ConfigurationError(
            f"Expected metrics to have unique names, but got {twice[0]} twice. Pass a dictionary."
        )
    return dict(items)


class TaskMetrics:
    """A copy of each metric per task, updated in one pass over the test data.

    A metric gets ``(probabilities, targets)`` of a batch, ``(batch, num_classes)`` and ``(batch,)``,
    over all classes of the stream; masked classes have probability 0. One metric with the stream's
    ``num_classes`` is therefore valid for every task and mask. torchmetrics reduces it over processes.

    Args:
        metrics: by name; they are copied, not changed.
    """

    def __init__(self, metrics: Mapping[str, Metric]) -> None:
        self._metrics = metrics
        self._of_task: dict[int, dict[str, Metric]] = {}

    def update(self, task: int, logits: Tensor, targets: Tensor) -> None:
        """Add a batch of a task's samples, which may be empty.

        Args:
            task: the task ID.
            logits: ``(batch, num_classes)``, -inf for masked classes.
            targets: ``(batch,)`` int64.
        """
        if task not in self._of_task:
            self._of_task[task] = {
                name: _fresh(metric).to(logits.device) for name, metric in self._metrics.items()
            }
        if not len(targets):  # torchmetrics does not support empty batches
            return
        probabilities = logits.float().softmax(1)
        for metric in self._of_task[task].values():
            metric.update(probabilities, targets)

    def compute(self) -> dict[int, dict[str, Any]]:
        """The values by task and name, numbers or lists; the same on every process."""
        return {
            task: {name: _plain(metric.compute()) for name, metric in metrics.items()}
            for task, metrics in self._of_task.items()
        }

    def check(self, num_classes: int, batches: Iterable[int], processes: int) -> None:
        """Evaluate every metric on a few artificial predictions.

        Args:
            num_classes: of the stream.
            batches: number of samples of each task's first test batch, over all processes.
            processes: their number; torchmetrics can only concatenate lists that are not empty.

        Raises:
            ConfigurationError: names the metric and its error, or the task that is too small.
        """
        small = next((n for n, size in enumerate(batches) if size < processes), None)
        if small is not None:
            raise ConfigurationError(
                f"Expected every process to have test samples of every task when metrics are set, but task "
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
            except Exception as error:  # a custom metric may raise any exception here
                reason = " ".join(str(error).split())
                raise ConfigurationError(
                    f"Expected metrics.{name} to take probabilities (batch, {num_classes}) and targets "
                    f"(batch,) int64, but {type(metric).__name__} raised {type(error).__name__}: {reason}. "
                    f"Set num_classes={num_classes}, or use a multiclass metric."
                ) from error
            if value is None:
                raise ConfigurationError(
                    f"Expected metrics.{name} to return numbers, but {type(metric).__name__} returned "
                    f"{type(trial.compute()).__name__}. Use one whose value is a tensor."
                )


def _fresh(metric: Metric) -> Metric:
    """A reset copy."""
    copy = metric.clone()
    copy.reset()
    return copy


def _plain(value: Any) -> Any:
    """Convert a metric's value to numbers and lists; None for other types."""
    if isinstance(value, Tensor):
        return value.tolist()
    if isinstance(value, Mapping):
        return {str(key): _plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    return value if isinstance(value, int | float) else None
