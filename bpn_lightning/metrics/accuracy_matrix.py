r"""The accuracy matrix of a stream, and measures of forgetting and transfer.

All measures are computed from the accuracy matrix :math:`R` of shape ``(tasks + 1, tasks)``:
:math:`R_{i,j}` is the accuracy on task j's test set after training on tasks 1 to i, a fraction of 1;
row 0 is the untrained network. In formulas tasks are numbered from 1, so :math:`R_{i,j}` is
``matrix[i, j - 1]``.

NaN means "not measured". Any result that depends on an unmeasured entry is NaN: means are never taken
over fewer tasks. If a stream ended after n of its T tasks, later rows are unmeasured, and it is evaluated
as the stream of its first n tasks (:func:`learned_part`).

The functions take a tensor and return a tensor; :class:`AccuracyMatrix` holds the matrix of a run.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchmetrics import Metric

from bpn_lightning.checks import check_positive_int
from bpn_lightning.errors import ConfigurationError
from bpn_lightning.metrics.scores import AfterLearning, Summary, TaskAgnostic

__all__ = [
    "AccuracyMatrix",
    "AfterLearning",
    "Summary",
    "TaskAgnostic",
    "accuracy_after_learning",
    "average_accuracy",
    "backward_transfer",
    "forgetting",
    "forward_transfer",
    "intransigence",
    "learned_part",
    "retention",
    "tasks_learned",
]


def tasks_learned(matrix: Tensor) -> int:
    """The number of tasks learned, from the last measured row.

    Args:
        matrix: ``(tasks + 1, tasks)``, accuracies, NaN where not measured.

    >>> nan = float("nan")
    >>> tasks_learned(torch.tensor([[0.5, 0.5], [0.9, 0.4], [nan, nan]]))
    1
    """
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] + 1:
        raise ConfigurationError(
            "Expected matrix to be of shape (tasks + 1, tasks), with the row before training first, "
            f"but got {tuple(matrix.shape)}."
        )
    measured = (~matrix.isnan()).any(dim=1).nonzero()
    return int(measured[-1]) if len(measured) else 0


def learned_part(matrix: Tensor) -> Tensor:
    """The matrix up to the last measured row, and of the tasks learned by then.

    Args:
        matrix: ``(tasks + 1, tasks)``, accuracies, NaN where not measured.

    Returns:
        ``(n + 1, n)`` for n tasks learned; the complete matrix after the last task.

    >>> nan = float("nan")
    >>> learned_part(torch.tensor([[0.5, 0.5], [0.9, 0.4], [nan, nan]]))
    tensor([[0.5000],
            [0.9000]])
    """
    n = tasks_learned(matrix)
    return matrix[: n + 1, :n]


def average_accuracy(matrix: Tensor) -> Tensor:
    r"""Mean accuracy over the tasks learned, after the last of them.

    .. math:: \mathrm{ACC} = \frac{1}{T} \sum_{j=1}^{T} R_{T,j}

    Lopez-Paz & Ranzato (2017), https://arxiv.org/abs/1706.08840, Sec. 2.

    Args:
        matrix: ``(tasks + 1, tasks)``, accuracies, NaN where not measured.

    >>> average_accuracy(torch.tensor([[0.5, 0.5], [0.9, 0.4], [0.5, 1.0]]))
    tensor(0.7500)
    """
    return learned_part(matrix)[-1].mean()


def retention(matrix: Tensor, task_id: int = 0) -> Tensor:
    r"""Accuracy on one task after the last task: :math:`R_{T,k}`, for task 1 by default.

    The measure of Table I of Wen et al., "Beneficial Perturbation Network for designing general
    adaptive artificial intelligence systems". It does not depend on how well later tasks were learned:
    report it with :func:`average_accuracy` and :func:`accuracy_after_learning`.

    Args:
        matrix: ``(tasks + 1, tasks)``, accuracies, NaN where not measured.
        task_id: the task, from 0; NaN for one that was not learned.

    >>> retention(torch.tensor([[0.5, 0.5], [0.9, 0.4], [0.5, 1.0]]))
    tensor(0.5000)
    """
    last = learned_part(matrix)[-1]
    return last[task_id] if task_id < len(last) else last.new_full((), torch.nan)


def accuracy_after_learning(matrix: Tensor) -> Tensor:
    r"""Accuracy on each task right after training on it: :math:`R_{j,j}`.

    Args:
        matrix: ``(tasks + 1, tasks)``, accuracies, NaN where not measured.

    Returns:
        ``(n,)`` for n tasks learned.

    >>> accuracy_after_learning(torch.tensor([[0.5, 0.5], [0.9, 0.4], [0.5, 1.0]]))
    tensor([0.9000, 1.0000])
    """
    return learned_part(matrix)[1:].diagonal()


def backward_transfer(matrix: Tensor) -> Tensor:
    r"""Mean change in accuracy on earlier tasks due to later ones; negative for forgetting.

    .. math:: \mathrm{BWT} = \frac{1}{T-1} \sum_{j=1}^{T-1} \left( R_{T,j} - R_{j,j} \right)

    Lopez-Paz & Ranzato (2017), https://arxiv.org/abs/1706.08840, Sec. 2. NaN for a single task.

    Args:
        matrix: ``(tasks + 1, tasks)``, accuracies, NaN where not measured.

    >>> backward_transfer(torch.tensor([[0.5, 0.5], [0.9, 0.4], [0.5, 1.0]]))
    tensor(-0.4000)
    """
    learned = learned_part(matrix)
    return (learned[-1] - learned[1:].diagonal())[:-1].mean()


def forward_transfer(matrix: Tensor) -> Tensor:
    r"""Mean gain in accuracy on each task, before training on it, due to the previous tasks.

    .. math:: \mathrm{FWT} = \frac{1}{T-1} \sum_{j=2}^{T} \left( R_{j-1,j} - b_j \right)

    Lopez-Paz & Ranzato (2017), https://arxiv.org/abs/1706.08840, Sec. 2. The baseline :math:`b_j` is
    the accuracy of the same network before training (row 0). NaN for a single task, and if accuracies
    on future tasks were not measured.

    Args:
        matrix: ``(tasks + 1, tasks)``, accuracies, NaN where not measured.

    >>> forward_transfer(torch.tensor([[0.5, 0.5], [0.9, 0.75], [0.5, 1.0]]))
    tensor(0.2500)
    """
    learned = learned_part(matrix)
    return (learned.diagonal() - learned[0])[1:].mean()


def forgetting(matrix: Tensor) -> Tensor:
    r"""Mean drop from each task's best accuracy so far, over all tasks but the last.

    .. math:: F = \frac{1}{T-1} \sum_{j=1}^{T-1} \left(
        \max_{l \in \{1, \dots, T-1\}} R_{l,j} - R_{T,j} \right)

    Chaudhry et al. (2018), https://arxiv.org/abs/1801.10112, Sec. 3. NaN for a single task.
    Accuracies before a task was learned are used if measured; those after it have to be measured.

    Args:
        matrix: ``(tasks + 1, tasks)``, accuracies, NaN where not measured.

    >>> forgetting(torch.tensor([[0.5, 0.5], [0.75, 0.4], [0.5, 1.0]]))
    tensor(0.2500)
    """
    learned = learned_part(matrix)
    if learned.shape[1] < 2:
        return learned.new_full((), torch.nan)
    earlier = learned[1:-1, :-1]
    not_yet_learned = torch.ones_like(earlier, dtype=torch.bool).triu(1)
    best = earlier.masked_fill(not_yet_learned & earlier.isnan(), -torch.inf).amax(dim=0)
    return (best - learned[-1, :-1]).mean()


def intransigence(matrix: Tensor, reference: Tensor) -> Tensor:
    r"""Mean deficit in accuracy right after learning a task, compared with a reference.

    .. math:: I = \frac{1}{T} \sum_{j=1}^{T} \left( a^*_j - R_{j,j} \right)

    Chaudhry et al. (2018), https://arxiv.org/abs/1801.10112, Sec. 3, whose reference is trained
    jointly on tasks 1 to j. One network per task is a stricter one; report which one is used.

    Args:
        matrix: ``(tasks + 1, tasks)``, accuracies, NaN where not measured.
        reference: ``(tasks,)``, the reference's accuracy on each task.

    >>> matrix = torch.tensor([[0.5, 0.5], [0.75, 0.5], [0.5, 0.5]])
    >>> intransigence(matrix, torch.tensor([1.0, 1.0]))
    tensor(0.3750)
    """
    if reference.shape != matrix.shape[1:]:
        raise ConfigurationError(
            f"Expected reference to hold one accuracy for each of the {matrix.shape[1]} tasks, "
            f"but got the shape {tuple(reference.shape)}."
        )
    learned = accuracy_after_learning(matrix)
    return (reference[: len(learned)].to(learned) - learned).mean()


class AccuracyMatrix(Metric):
    """The accuracy matrix of a stream as a torchmetrics metric.

    Rows are accuracies over the complete test sets, already reduced over processes. Computing therefore
    needs no communication, and any process can do it alone.

    Differs from other metrics: the matrix stays on the CPU and in float64 when the module is moved to
    another device or dtype. It is small and written once per task; half precision would round it to
    three digits, and some devices do not support float64. It is part of the ``state_dict``, so a resumed
    stream keeps its rows. Log the result of :meth:`compute`, not the metric itself: Lightning resets
    logged metrics.

    Args:
        num_tasks: number of tasks of the stream.

    State:
        ``accuracy`` ``(num_tasks + 1, num_tasks)`` float64: row 0 before training, row k after k tasks,
        NaN where not measured; ``task_agnostic`` ``(num_tasks,)`` float64, NaN until it is set; ``samples`` and
        ``task_agnostic_samples`` ``(num_tasks,)`` float64: test samples that they were measured with last, NaN
        where not known.

    Raises:
        ConfigurationError: ``num_tasks`` is below 1.

    >>> matrix = AccuracyMatrix(num_tasks=2)
    >>> matrix.update(0, [0.5, 0.5])
    >>> matrix.update(1, [0.75, 0.75])
    >>> matrix.update(2, [0.5, 1.0])
    >>> summary = matrix.summary()
    >>> summary["average"], summary["bwt"], summary["fwt"]
    (0.75, -0.25, 0.25)
    """

    full_state_update = True
    accuracy: Tensor
    task_agnostic: Tensor
    samples: Tensor
    task_agnostic_samples: Tensor

    def __init__(self, num_tasks: int) -> None:
        check_positive_int("num_tasks", num_tasks)
        # A cached result would be stale after load_state_dict and update_task_agnostic.
        super().__init__(sync_on_compute=False, compute_with_cache=False)
        self.num_tasks = num_tasks
        for name, shape in {
            "accuracy": (num_tasks + 1, num_tasks),
            "task_agnostic": (num_tasks,),
            "samples": (num_tasks,),
            "task_agnostic_samples": (num_tasks,),
        }.items():
            nothing = torch.full(shape, torch.nan, dtype=torch.float64, device="cpu")
            self.add_state(name, nothing, dist_reduce_fx=_of_first_process, persistent=True)

    def update(
        self,
        row: int,
        accuracies: Tensor | Sequence[float],
        samples: Sequence[int | None] | None = None,
    ) -> None:
        """Set one row.

        Args:
            row: number of tasks learned; 0 is before training.
            accuracies: ``(num_tasks,)``, fractions of 1; NaN for tasks that were not measured.
            samples: ``num_tasks`` numbers of test samples, 0 or None where a task was not tested now.

        Raises:
            ConfigurationError: the row does not exist, or accuracies are not ``num_tasks`` fractions.
        """
        if not 0 <= row <= self.num_tasks:
            raise ConfigurationError(
                f"Expected row to be from 0, before training, to num_tasks = {self.num_tasks}, "
                f"but got {row}."
            )
        self.accuracy[row] = self._checked(accuracies)
        _count(self.samples, samples)

    def update_task_agnostic(
        self, accuracies: Tensor | Sequence[float], samples: Sequence[int | None] | None = None
    ) -> None:
        """Set the accuracies without a given task ID (class-incremental).

        Args:
            accuracies: ``(num_tasks,)``, fractions of 1; NaN for tasks that were not measured.
            samples: as of :meth:`update`.

        Raises:
            ConfigurationError: accuracies are not ``num_tasks`` fractions.
        """
        self.task_agnostic[:] = self._checked(accuracies)
        _count(self.task_agnostic_samples, samples)

    def grown(self, num_tasks: int) -> "AccuracyMatrix":
        """The matrix of a stream that goes on: what it holds, and NaN for new tasks."""
        larger = AccuracyMatrix(num_tasks)
        tasks = self.num_tasks
        larger.accuracy[: tasks + 1, :tasks] = self.accuracy
        for name in ("task_agnostic", "samples", "task_agnostic_samples"):
            getattr(larger, name)[:tasks] = getattr(self, name)
        return larger

    def compute(self) -> dict[str, Tensor]:
        """The measures of the stream so far as scalars, for ``log_dict``; NaN if unknown."""
        return {
            "average": average_accuracy(self.accuracy),
            "first_task": retention(self.accuracy),
            "after_learning": accuracy_after_learning(self.accuracy).mean(),
            "bwt": backward_transfer(self.accuracy),
            "fwt": forward_transfer(self.accuracy),
            "forgetting": forgetting(self.accuracy),
            "task_agnostic": self.task_agnostic[: self.tasks_learned].mean(),
        }

    def summary(self) -> Summary:
        """The measures of the stream so far as plain numbers; None if unknown.

        Lists have ``num_tasks`` entries, None for tasks that were not learned; each average is the mean
        of the numbers in its list.
        """
        learned = learned_part(self.accuracy)
        blind = self.task_agnostic
        return {
            "average": _number(average_accuracy(self.accuracy)),
            "first_task": _number(retention(self.accuracy)),
            "per_task": self._per_task(learned[-1]),
            "bwt": _number(backward_transfer(self.accuracy)),
            "fwt": _number(forward_transfer(self.accuracy)),
            "forgetting": _number(forgetting(self.accuracy)),
            "after_learning": {
                "average": _number(accuracy_after_learning(self.accuracy).mean()),
                "per_task": self._per_task(accuracy_after_learning(self.accuracy)),
            },
            "task_agnostic": None
            if blind.isnan().all()
            else {
                "average": _number(blind[: self.tasks_learned].mean()),
                "first_task": _number(blind[0]),
                "per_task": self._per_task(blind[: self.tasks_learned]),
            },
        }

    def intransigence(self, reference: Tensor | Sequence[float]) -> float | None:
        """:func:`intransigence` with ``(num_tasks,)`` accuracies of a reference."""
        return _number(intransigence(self.accuracy, self._checked(reference)))

    @property
    def tasks_learned(self) -> int:
        """The number of tasks learned, from the last measured row."""
        return tasks_learned(self.accuracy)

    @property
    def update_called(self) -> bool:
        """Whether anything has been measured, including before resuming."""
        return not bool(self.accuracy.isnan().all())

    def _per_task(self, values: Tensor) -> list[float | None]:
        missing: list[float | None] = [None] * (self.num_tasks - len(values))
        return [_number(value) for value in values] + missing

    def _checked(self, accuracies: Tensor | Sequence[float]) -> Tensor:
        # In two steps, because not every device supports float64.
        values = accuracies.detach().cpu() if isinstance(accuracies, Tensor) else accuracies
        values = torch.as_tensor(values, dtype=torch.float64, device="cpu")
        if values.shape != (self.num_tasks,):
            raise ConfigurationError(
                f"Expected accuracies to hold one value for each of the {self.num_tasks} tasks, "
                f"but got the shape {tuple(values.shape)}. Use NaN for tasks that were not measured."
            )
        outside = values[(values < 0) | (values > 1)]
        if len(outside):
            raise ConfigurationError(
                "Expected accuracies to be fractions from 0 to 1, "
                f"but got {outside[0].item():g}. Divide percentages by 100."
            )
        return values

    def _apply(
        self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = ""
    ) -> "AccuracyMatrix":
        # torchmetrics preserves the dtype in .half() but not in .to(dtype), which bf16-true calls.
        return self

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        # torchmetrics accepts any shape, dtype and device, and shares memory with the checkpoint.
        for name in self._defaults:
            state, saved = getattr(self, name), state_dict.get(prefix + name)
            if saved is None:
                if not name.endswith("samples"):  # which are not known of every checkpoint
                    missing_keys.append(prefix + name)
            elif saved.shape != state.shape:
                del state_dict[prefix + name]
                error_msgs.append(
                    f"Expected {prefix}{name} to be of shape {tuple(state.shape)}, but got "
                    f"{tuple(saved.shape)}: the checkpoint is of a stream of another length."
                )
            else:
                state_dict[prefix + name] = saved.to("cpu", torch.float64, copy=True)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )


def _of_first_process(stacked: Tensor) -> Tensor:
    """Reduce by selecting the first process: all have the same values, which must not be summed."""
    return stacked[0]


def _count(held: Tensor, samples: Sequence[int | None] | None) -> None:
    """Take over the numbers of samples of the tasks that were tested."""
    if samples is not None:
        now = torch.from_numpy(np.array(samples, dtype=float))  # None becomes NaN
        held[:] = torch.where(now > 0, now, held)


def _number(value: Tensor) -> float | None:
    return None if value.isnan() else float(value)
