"""A memory of samples of past tasks: for any strategy that replays.

A strategy holds an :class:`EpisodicMemory`, calls its ``store`` when a task ends, and passes the result of
``batch`` to the host's ``prepare``. Call its ``state_dict`` and ``load_state_dict`` in the strategy's, and
its ``to`` in ``move_state``.
"""

from collections.abc import Mapping, Sequence
from functools import reduce
from math import prod
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from bpn_lightning.errors import ConfigurationError
from bpn_lightning.host import ContinualHost
from bpn_lightning.random_state import seeded_generator
from bpn_lightning.tasks import Batch, Task

__all__ = [
    "EpisodicMemory",
    "MemoryPer",
    "TaskSlice",
    "balanced",
    "check_memory_size",
    "draw",
    "gather",
    "memory_bytes",
    "num_processes",
    "read_slice",
    "stored_dtype",
]

MemoryPer = Literal["task", "class"]


class EpisodicMemory:
    """Samples of past tasks, as their stream stores them.

    State:
        ``inputs`` ``(samples, *input_shape)``, uint8 for images, and ``targets`` ``(samples,)`` int64,
        in the order of the tasks; ``sizes``, the number of samples of each task. Per sample the bytes of
        an input plus 8.
    """

    def __init__(self) -> None:
        self.inputs = torch.empty(0, dtype=torch.uint8)
        self.targets = torch.empty(0, dtype=torch.int64)
        self.sizes: list[int] = []

    def __len__(self) -> int:
        return len(self.targets)

    def add(self, inputs: Tensor, targets: Tensor) -> None:
        """Append a task's samples, which are on the device of the memory."""
        if self.sizes:
            inputs = torch.cat((self.inputs, inputs))
            targets = torch.cat((self.targets, targets))
        self.sizes.append(len(targets) - len(self))
        self.inputs, self.targets = inputs, targets

    def store(
        self,
        host: ContinualHost,
        task: Task,
        size: int,
        per: MemoryPer,
        key: Sequence[int | str] = ("memory",),
    ) -> None:
        """Draw samples of a finished task and append them, the same in every process.

        Args:
            host: the module.
            task: the task; all previous ones are in the memory.
            size: number of samples, of the task or of each class.
            per: which of the two, ``task`` or ``class``.
            key: additional seed of the draw; the stream's seed, the task and the class are always used.
        """
        own = read_slice(host, task.id)
        drawn = draw(own.targets, size, per, (*key, host.stream.seed, task.id))
        inputs = gather(host, task.id, own, drawn)
        self.add(inputs, own.targets[drawn].to(inputs.device))

    def select(self, indices: Tensor) -> None:
        """Keep these samples alone, in this order.

        Args:
            indices: ``(samples,)`` int64, on any device; those of a task before those of the next.
        """
        self.sizes = self.tasks()[indices.cpu()].bincount(minlength=len(self.sizes)).tolist()
        indices = indices.to(self.targets.device)
        self.inputs, self.targets = self.inputs[indices], self.targets[indices]

    def forget(self, task_id: int) -> None:
        """Delete the samples of a task; the IDs of the others stay."""
        self.select((self.tasks() != task_id).nonzero().flatten())

    def batch(self, indices: Tensor) -> Batch:
        """Raw samples with their task IDs, for the host's ``prepare``.

        Args:
            indices: ``(batch,)`` int64, on any device.
        """
        tasks = self.tasks()[indices.cpu()].to(self.targets.device)
        indices = indices.to(self.targets.device)
        inputs, targets = (
            self.inputs.index_select(0, indices),
            self.targets.index_select(0, indices),
        )
        return Batch(inputs, targets, tasks, len(indices))

    def tasks(self) -> Tensor:
        """The task ID of each sample, ``(samples,)`` int64 on the CPU."""
        sizes = torch.tensor(self.sizes, dtype=torch.int64)
        return torch.arange(len(sizes)).repeat_interleave(sizes)

    def state_dict(self) -> dict[str, Any]:
        """The state to save in a checkpoint."""
        return {"inputs": self.inputs, "targets": self.targets, "sizes": list(self.sizes)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the result of :meth:`state_dict`."""
        self.inputs, self.targets = state["inputs"], state["targets"]
        self.sizes = list(state["sizes"])

    def to(self, device: torch.device) -> None:
        """Move to a device."""
        self.inputs, self.targets = self.inputs.to(device), self.targets.to(device)


def balanced(available: Sequence[int], total: int) -> list[int]:
    """Distribute a number of samples over classes as evenly as possible.

    >>> balanced([9, 9, 2], 10)
    [4, 4, 2]
    """
    counts = [0] * len(available)
    for done, index in enumerate(sorted(range(len(available)), key=available.__getitem__)):
        counts[index] = min(available[index], total // (len(available) - done))
        total -= counts[index]
    return counts


def draw(targets: Tensor, size: int, per: MemoryPer, key: Sequence[int | str]) -> Tensor:
    """Draw samples of a task for the memory, with a separate generator per class.

    Args:
        targets: ``(samples,)``, of the whole task.
        size: number of samples to draw, in total or per class; at most the number available.
        per: which of the two, ``task`` or ``class``.
        key: seed of the generators; the class is always used in addition.

    Returns:
        ``(drawn,)``, their indices in ascending order.
    """
    classes = sorted(set(targets.tolist()))
    indices = [(targets == one).nonzero().flatten() for one in classes]
    numbers = [size] * len(classes)
    if per == "task":
        numbers = balanced([len(found) for found in indices], size)
    drawn = [
        found[torch.randperm(len(found), generator=seeded_generator(*key, one))[:number]]
        for one, found, number in zip(classes, indices, numbers, strict=True)
    ]
    return torch.cat(drawn).sort().values


class TaskSlice(NamedTuple):
    """This process's shard of a task, and the labels of the whole task.

    Attributes:
        indices: for each batch of the loader, the indices of its samples within the task.
        targets: ``(samples of the task,)``, over all processes.
    """

    indices: list[Tensor]
    targets: Tensor


def read_slice(host: ContinualHost, task_id: int) -> TaskSlice:
    """Index a task's training samples in an order that does not depend on the number of processes.

    Samples are ordered by batch and, within a batch, by process; as processes read slices of a global
    batch, this is the order of a single process.
    """
    own = [batch.targets.cpu() for batch in host.stream.loader(task_id, "train")]
    sizes = torch.zeros(len(own), num_processes(host), dtype=torch.int64)
    sizes[:, host.global_rank] = torch.tensor([len(part) for part in own], dtype=torch.int64)
    sizes = host.all_reduce(sizes.to(host.device)).cpu()
    starts = (sizes.flatten().cumsum(0) - sizes.flatten()).view_as(sizes)
    first = starts[:, host.global_rank].tolist()
    indices = [start + torch.arange(len(part)) for start, part in zip(first, own, strict=True)]
    targets = torch.zeros(int(sizes.sum()), dtype=torch.int64)
    for index, part in zip(indices, own, strict=True):
        targets[index] = part
    return TaskSlice(indices, host.all_reduce(targets.to(host.device)).cpu())


def gather(host: ContinualHost, task_id: int, own: TaskSlice, drawn: Tensor) -> Tensor:
    """The raw inputs of drawn samples, on the host's device, the same in every process.

    Args:
        host: the module.
        task_id: ID of the task.
        own: the result of :func:`read_slice`.
        drawn: ``(samples,)``, indices within the task.

    Returns:
        ``(samples, *input_shape)``, as the stream stores them.
    """
    slots = torch.full((len(own.targets),), -1)
    slots[drawn] = torch.arange(len(drawn))
    gathered = torch.empty(0, dtype=torch.uint8)
    for index, batch in zip(own.indices, host.stream.loader(task_id, "train"), strict=True):
        if not len(gathered):
            gathered = batch.inputs.new_zeros(len(drawn), *batch.inputs.shape[1:])
        mine = slots[index]
        gathered[mine[mine >= 0]] = batch.inputs[mine >= 0]
    return host.all_reduce(gathered.to(host.device))


def stored_dtype(host: ContinualHost, tasks: Sequence[Task]) -> torch.dtype:
    """The common dtype of the stored inputs of some tasks: uint8 for images."""
    samples = (
        next(iter(host.stream.loader(task.id, "train", max_samples=1))).inputs for task in tasks
    )
    return reduce(torch.promote_types, (sample.dtype for sample in samples))


def num_processes(host: ContinualHost) -> int:
    """The number of training processes."""
    return int(host.all_reduce(torch.ones((), device=host.device)))


def memory_bytes(host: ContinualHost, samples: int, dtype: torch.dtype) -> int:
    """Bytes of a memory with this number of samples, from the shape and stored dtype of an input."""
    return samples * (prod(host.stream.input_shape) * dtype.itemsize + 8)


def check_memory_size(
    host: ContinualHost, size: int, per: MemoryPer, argument: str = "memory_size"
) -> None:
    """Refuse, before training, a memory that is larger than a task or class.

    Args:
        host: the module.
        size: samples per task, or per class.
        per: which of the two, ``task`` or ``class``.
        argument: the strategy's name for ``size``.

    Raises:
        ConfigurationError: names the task, or its rarest class, and its number of samples.
    """
    for task in host.network.tasks[host.network.closed + 1 :]:
        targets = read_slice(host, task.id).targets
        available, whose = len(targets), f"task {task.id}"
        if per == "class":
            counts = {column: int((targets == column).sum()) for column in range(*task.columns)}
            rarest = min(counts, key=lambda column: counts[column])
            label = task.class_names[rarest - task.columns[0]]
            available, whose = counts[rarest], f"class {label!r} in task {task.id}"
        if size > available:
            raise ConfigurationError(
                f"Expected {argument} to be at most the {available} training samples of {whose}, but "
                f"got {size}. Lower it to {available} or less."
            )
