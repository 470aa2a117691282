"""Samples of past tasks, kept as their stream stores them: for any strategy that replays.

A strategy holds an :class:`EpisodicMemory`, calls its ``store`` when a task ends, and has what ``batch`` gives
prepared by the stream. Its ``state_dict`` and ``load_state_dict`` belong into the strategy's, its ``to`` into ``move_state``.
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
        ``inputs`` ``(samples, *input_shape)``, uint8 of images, and ``targets`` ``(samples,)`` int64,
        those of task 0 first; ``sizes``, samples of each task. Bytes of an input plus 8 for each sample.
    """

    def __init__(self) -> None:
        self.inputs = torch.empty(0, dtype=torch.uint8)
        self.targets = torch.empty(0, dtype=torch.int64)
        self.sizes: list[int] = []

    def __len__(self) -> int:
        return len(self.targets)

    def add(self, inputs: Tensor, targets: Tensor) -> None:
        """Add a task's samples, on the device that the memory lies on."""
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
        """Draw samples of a task that was learned and add them, the same in every process.

        Args:
            host: the module.
            task: the tasks before it are in the memory.
            size: how many samples, of the task or of each class.
            per: which of the two, ``task`` or ``class``.
            key: what the draw is seeded with, next to the stream's seed, the task and the class.
        """
        own = read_slice(host, task.id)
        drawn = draw(own.targets, size, per, (*key, host.stream.seed, task.id))
        inputs = gather(host, task.id, own, drawn)
        self.add(inputs, own.targets[drawn].to(inputs.device))

    def batch(self, indices: Tensor) -> Batch:
        """Some samples, raw, each with its task: for the stream's ``prepare``.

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
        """The task of each sample, ``(samples,)`` int64 on the CPU."""
        return torch.arange(len(self.sizes)).repeat_interleave(torch.tensor(self.sizes))

    def state_dict(self) -> dict[str, Any]:
        """Everything that a restart needs."""
        return {"inputs": self.inputs, "targets": self.targets, "sizes": list(self.sizes)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what :meth:`state_dict` gave."""
        self.inputs, self.targets = state["inputs"], state["targets"]
        self.sizes = list(state["sizes"])

    def to(self, device: torch.device) -> None:
        """Move to a device."""
        self.inputs, self.targets = self.inputs.to(device), self.targets.to(device)


def balanced(available: Sequence[int], total: int) -> list[int]:
    """Divide a number of samples over classes as evenly as they allow.

    >>> balanced([9, 9, 2], 10)
    [4, 4, 2]
    """
    shares = [0] * len(available)
    for left, index in enumerate(sorted(range(len(available)), key=available.__getitem__)):
        shares[index] = min(available[index], total // (len(available) - left))
        total -= shares[index]
    return shares


def draw(targets: Tensor, size: int, per: MemoryPer, key: Sequence[int | str]) -> Tensor:
    """Draw samples of a task for its memory, each class by a generator of its own.

    Args:
        targets: ``(samples,)``, of the whole task.
        size: how many to draw, altogether or of each class; at most as many as there are.
        per: which of the two, ``task`` or ``class``.
        key: what the generators are seeded with, next to the class.

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
    """What this process reads of a task, and the whole task's labels.

    Attributes:
        indices: for each batch of the loader, where its samples stand in the task.
        targets: ``(samples of the task,)``, over all processes.
    """

    indices: list[Tensor]
    targets: Tensor


def read_slice(host: ContinualHost, task_id: int) -> TaskSlice:
    """Number a task's training samples in one order, whichever process reads them.

    That is the order of the batches and, within one, of the processes, which for slices of a global
    batch is that of a single process.
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
        task_id: whose samples.
        own: of :func:`read_slice`.
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
    """The type that holds the inputs of some tasks as their streams store them: uint8 of images."""
    samples = (
        next(iter(host.stream.loader(task.id, "train", max_samples=1))).inputs for task in tasks
    )
    return reduce(torch.promote_types, (sample.dtype for sample in samples))


def num_processes(host: ContinualHost) -> int:
    """How many processes learn together."""
    return int(host.all_reduce(torch.ones((), device=host.device)))


def memory_bytes(host: ContinualHost, samples: int, dtype: torch.dtype) -> int:
    """Bytes of a memory of so many samples, from the shape of an input and its type as it is stored."""
    return samples * (prod(host.stream.input_shape) * dtype.itemsize + 8)


def check_memory_size(
    host: ContinualHost, size: int, per: MemoryPer, argument: str = "memory_size"
) -> None:
    """Refuse before training what a task could not give.

    Args:
        host: the module.
        size: samples of each task, or of each class.
        per: which of the two, ``task`` or ``class``.
        argument: what the strategy calls ``size``.

    Raises:
        ConfigurationError: names the task, or its rarest class, and how many samples it has.
    """
    for task in host.network.tasks:
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
