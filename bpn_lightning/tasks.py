"""A stream's tasks, their schedule over epochs, and what is asked of a stream.

Everything above leans on this file; it leans on little but torch.
"""

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from bpn_lightning.errors import CheckpointError
from bpn_lightning.preparation import Preparation, first_preparations

__all__ = [
    "Batch",
    "ContinualStream",
    "Mask",
    "Order",
    "Past",
    "Phase",
    "Position",
    "Schedule",
    "Sized",
    "Split",
    "Task",
    "TrainingEpoch",
    "dry_inputs",
    "named_dtype",
]

Split = Literal["train", "val", "test"]
Mask = Literal["all", "seen", "task", "shared"]
Order = Literal["fixed", "seed"]
"""Whether what tasks are made of, their classes or transforms, is drawn by the seed of their stream."""


@dataclass(frozen=True)
class Task:
    """One task of a stream.

    Args:
        id: place in the stream, from 0.
        columns: ``(start, stop)``, the columns of the head that hold this task's classes. Disjoint
            between tasks in class-incremental streams, the same in domain-incremental ones.
        class_names: one name per column.
        epochs: epochs of its own training phase.
    """

    id: int
    columns: tuple[int, int]
    class_names: tuple[str, ...]
    epochs: int

    @property
    def num_classes(self) -> int:
        """How many classes this task has."""
        return self.columns[1] - self.columns[0]

    @property
    def name(self) -> str:
        """The names of its classes in one line."""
        return ", ".join(self.class_names)


@dataclass(frozen=True)
class Past:
    """What a stream that goes on knows of the tasks that are learned.

    Args:
        tasks: in order.
        preparations: of their inputs, in order.
        seed: of their stream.
        shared: whether all tasks share their columns, also those to come.
        learned: how many of the tasks are learned to their end.
    """

    tasks: tuple[Task, ...]
    preparations: tuple[Preparation, ...]
    seed: int
    shared: bool
    learned: int

    def first(self, tasks: int) -> "Past":
        """The past of its first tasks alone."""
        return replace(
            self,
            tasks=self.tasks[:tasks],
            preparations=tuple(first_preparations(self.preparations, tasks)),
            learned=min(self.learned, tasks),
        )

    @property
    def first_column(self) -> int:
        """The column of the next new class."""
        return 0 if self.shared else max(task.columns[1] for task in self.tasks)


@dataclass(frozen=True)
class Phase:
    """A stretch of a task's epochs with one purpose; ``"train"`` is the task's own training.

    Args:
        name: for logs and checkpoints.
        epochs: its length, before early stopping.
        trains: ``network``: everything; ``head``: only the rows of the head for this task's own
            classes; ``strategy``: nothing of the network, but what the strategy that declared the
            phase owns, by its own loss and optimizer.
    """

    name: str
    epochs: int
    trains: Literal["network", "head", "strategy"] = "network"


class Batch(NamedTuple):
    """What loaders yield: a slice of a global batch.

    Attributes:
        inputs: ``(batch, *input_shape)``; from a loader as the stream stores them, images as uint8; of
            the stream's ``input_dtype`` once prepared.
        targets: ``(batch,)`` int64, columns of the head.
        task: the task id that all samples share, or ``(batch,)`` int64, one id per sample.
        global_size: samples in the whole batch over all processes; losses are divided by it.
        augmentation: ``(batch, draws)`` int64, the random numbers that the stream's ``prepare`` may
            augment these samples with; None from loaders that do not augment, and once prepared.
        start: the place in the whole batch of the first of these samples.
        samples: ``(batch,)`` int64, the place of each in the stream's ``loader`` of its own task; None
            where they are augmented.
    """

    inputs: Tensor
    targets: Tensor
    task: "int | Tensor"
    global_size: int
    augmentation: "Tensor | None" = None
    start: int = 0
    samples: "Tensor | None" = None


class Position(NamedTuple):
    """Where in the stream an epoch lies."""

    task: int
    phase: str
    epoch: int
    """Epochs of this task that came before, over all its phases."""


class TrainingEpoch(NamedTuple):
    """What a stream's train loader is of.

    Attributes:
        task: the task that is learned.
        epoch: epochs of this task that came before, over all its phases.
        tasks: those whose data are trained on.
    """

    task: int
    epoch: int
    tasks: Sequence[int]


@dataclass
class Schedule:
    """Maps the epochs of one fit to tasks and phases.

    Args:
        phases: the phases of each task, in order.

    The only state is ``lengths``: how many epochs each phase has, planned at first and lowered when
    early stopping ends a phase.

    >>> schedule = Schedule([[Phase("train", 2)], [Phase("warm_up", 1), Phase("train", 2)]])
    >>> schedule.total
    5
    >>> schedule.locate(3)
    Position(task=1, phase='train', epoch=1)
    >>> schedule.end_phase(3)
    >>> schedule.total
    4
    """

    phases: Sequence[Sequence[Phase]]
    lengths: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self._flat = [(task, phase) for task, ps in enumerate(self.phases) for phase in ps]
        self._firsts = list(accumulate((len(ps) for ps in self.phases), initial=0))
        self._set_lengths([phase.epochs for _, phase in self._flat])

    def _set_lengths(self, lengths: list[int]) -> None:
        self.lengths = lengths
        self._ends = list(accumulate(lengths, initial=0))  # of what lies before each phase

    @property
    def total(self) -> int:
        """Epochs of the whole stream."""
        return self._ends[-1]

    def locate(self, epoch: int) -> Position:
        """Task, phase and epoch within the task of a global epoch; past the end, the last one's."""
        task, phase = self._flat[self._index(epoch)]
        return Position(task, phase.name, epoch - self._ends[self._firsts[task]])

    def phase(self, task: int, name: str) -> Phase:
        """The phase of a task by its name."""
        return next(phase for phase in self.phases[task] if phase.name == name)

    def last_epoch(self, task: int) -> int:
        """The global epoch after which the task is learned."""
        return self._ends[self._firsts[task + 1]] - 1

    def lengths_of(self, task: int) -> dict[str, int]:
        """Epochs of each phase of a task by its name, as many as are planned by now."""
        own = self.lengths[self._firsts[task] : self._firsts[task + 1]]
        return dict(zip((phase.name for phase in self.phases[task]), own, strict=True))

    def phase_epochs(self, epoch: int) -> range:
        """The global epochs of the phase that ``epoch`` lies in."""
        index = self._index(epoch)
        return range(self._ends[index], self._ends[index + 1])

    def end_phase(self, epoch: int) -> None:
        """Let the phase of ``epoch`` end with it; saying so twice changes nothing."""
        index = self._index(epoch)
        shorter = epoch + 1 - self._ends[index]
        self._set_lengths([*self.lengths[:index], shorter, *self.lengths[index + 1 :]])

    def load_lengths(self, lengths: Sequence[int], tasks: int | None = None) -> None:
        """Take the lengths of a saved schedule.

        Args:
            lengths: of the phases of its tasks.
            tasks: how many it had, if these are the first ones only; the others keep their lengths.

        Raises:
            CheckpointError: it had other phases.
        """
        whole = [phase.epochs for _, phase in self._flat]
        planned = whole[: self._firsts[len(self.phases) if tasks is None else tasks]]
        lengths = [int(n) for n in lengths]
        if len(lengths) != len(planned) or any(
            n > p for n, p in zip(lengths, planned, strict=False)
        ):
            raise CheckpointError(
                f"Expected a checkpoint of a stream with phases of {planned} epochs, but got one with "
                f"{lengths}. Resume with the configuration that wrote it, or start a new run."
            )
        self._set_lengths(lengths + whole[len(planned) :])

    def _index(self, epoch: int) -> int:
        return min(bisect_right(self._ends, epoch, lo=1), len(self._flat)) - 1


class ContinualStream(Protocol):
    """What the module and the strategies ask of a stream (after its ``setup``)."""

    tasks: list[Task]
    num_classes: int
    input_shape: tuple[int, ...]
    input_dtype: torch.dtype
    seed: int
    reset_optimizer: Literal["always", "never"]
    has_validation: bool
    task_id_at_inference: bool

    def has_data(self, task_id: int) -> bool:
        """Whether there are samples of a task to measure its accuracy; of a past one there may be none."""

    def loader(
        self,
        task_id: int,
        split: Split,
        batch_size: int | None = None,
        max_samples: int | None = None,
    ) -> Iterable[Batch]:
        """Every sample of this process's share once, or of a draw of so many, in order and as it is."""

    def prepare(self, batch: Batch, augment: bool = False) -> Batch:
        """Raw images to normalized floats, on the device that they lie on."""

    def preparations(self) -> list[Preparation]:
        """The same without augmentation, as what a module keeps of all tasks in order."""


def named_dtype(name: str) -> torch.dtype:
    """The dtype of prepared inputs by its name in a file, ``torch.float32`` or ``torch.int64``.

    Raises:
        KeyError: it is none of the two.
    """
    return {str(dtype): dtype for dtype in (torch.float32, torch.int64)}[name]


class Sized(Protocol):
    """What says the shape and the dtype of a network's input: a stream, or a network's structure."""

    input_shape: tuple[int, ...]
    input_dtype: torch.dtype


def dry_inputs(sized: Sized, count: int, device: torch.device) -> Tensor:
    """Inputs for a dry forward, which finds shapes: zeros, of a stream of tokens the token 0.

    Args:
        sized: a network's structure, or the stream of one without a front.
        count: how many samples.
        device: where the network lies.

    Returns:
        ``(count, *input_shape)`` of ``input_dtype``.
    """
    return torch.zeros(count, *sized.input_shape, dtype=sized.input_dtype, device=device)
