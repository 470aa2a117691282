"""The base of methods that replay: a memory of a fixed size, and what is drawn from it."""

from abc import abstractmethod
from collections.abc import Sequence
from math import prod
from typing import Any

from torch import Tensor

from bpn_lightning.costs import DeclaredBytes
from bpn_lightning.errors import ConfigurationError
from bpn_lightning.functional.replay import Chosen, replay_order
from bpn_lightning.host import ContinualHost
from bpn_lightning.memory import (
    EpisodicMemory,
    TaskSlice,
    gather,
    memory_bytes,
    read_slice,
    stored_dtype,
)
from bpn_lightning.strategies.base import ContinualStrategy
from bpn_lightning.tasks import Batch, Task

__all__ = ["ReplayStrategy", "check_exemplars"]


class ReplayStrategy(ContinualStrategy):
    """Trains on samples of past tasks, which a memory of a fixed size keeps.

    The memory is filled from a whole task at once (:meth:`choose`, :meth:`refill`), and the draws follow
    from the stream's seed: both are the same on any number of processes. Replayed samples are not
    augmented, and each is answered in the mode of its task.

    Args:
        memory_size: samples that the memory holds, of all tasks together.

    State:
        the samples as the stream stores them, images as uint8, and their labels: per sample the bytes of
        an input plus 8. Nothing for inference.

    Raises:
        ConfigurationError: memory_size is no whole number of at least 0.
    """

    def __init__(self, memory_size: int) -> None:
        if type(memory_size) is not int or memory_size < 0:
            raise ConfigurationError(
                f"Expected memory_size to be a whole number of at least 0, but got {memory_size!r}. "
                "It is the number of samples of all tasks together."
            )
        self.memory_size = memory_size
        self.reset()

    def reset(self) -> None:
        """Empty the memory."""
        self.memory = EpisodicMemory()
        self.draws = 0  # samples, over all processes, since the memory last changed

    def replayed_tasks(self, task: Task) -> Sequence[int]:
        """All tasks before it."""
        return range(task.id)

    # --- the memory ------------------------------------------------------------------------------

    @abstractmethod
    def choose(self, host: ContinualHost, task: Task, own: TaskSlice) -> Chosen:
        """Which samples of the memory stay, and which of a task are added; the same in every process.

        Args:
            host: the module.
            task: the task.
            own: its labels, and the indices of this process's samples.
        """

    def refill(self, host: ContinualHost, task: Task) -> Chosen:
        """Put samples of a task into the memory, in the place of others.

        Returns:
            The result of :meth:`choose`.
        """
        own = read_slice(host, task.id)
        chosen = self.choose(host, task, own)
        inputs = gather(host, task.id, own, chosen.drawn)
        self.memory.select(chosen.kept)
        self.memory.add(inputs, own.targets[chosen.drawn].to(inputs.device))
        self.draws = 0
        return chosen

    def forget(self, host: ContinualHost, task: Task) -> Sequence[str]:
        """Delete the task's samples; their places are free for those of tasks to come."""
        self.memory.forget(task.id)
        self.draws = 0
        return []

    # --- what is drawn from it -------------------------------------------------------------------

    def order(self, host: ContinualHost, first: int, number: int, purpose: str) -> Tensor:
        """Indices ``(number,)`` of samples, of a sequence in which each comes once before any comes again.

        Args:
            host: the module.
            first: position in the sequence.
            number: how many.
            purpose: sequences of different purposes are independent.
        """
        key = (self.state_key, purpose, host.stream.seed, host.network.opened)
        return replay_order(len(self.memory), first, number, key)

    @staticmethod
    def own_part(batch: Batch, drawn: Tensor) -> slice:
        """Which of the samples drawn for a batch are those of this process."""
        first, stop = batch.start, batch.start + len(batch.targets)
        return slice(
            first * len(drawn) // batch.global_size, stop * len(drawn) // batch.global_size
        )

    def samples(self, host: ContinualHost, indices: Tensor) -> Batch:
        """Samples of the memory as the network takes them, with their task IDs ``(batch,)``."""
        return host.prepare(self.memory.batch(indices))

    # --- state and costs -------------------------------------------------------------------------

    def training_state(self) -> str:
        """The samples of past tasks."""
        return "memory"

    def state_dict(self) -> dict[str, Any]:
        """The memory, and the number of samples drawn from it."""
        return {"memory": self.memory.state_dict(), "draws": self.draws}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the memory."""
        self.memory.load_state_dict(state_dict["memory"])
        self.draws = int(state_dict["draws"])

    def move_state(self, host: ContinualHost) -> None:
        """Move the memory to the host's device."""
        self.memory.to(host.device)

    def declared_bytes(self, host: ContinualHost) -> DeclaredBytes:
        """The samples in the memory, which are not needed for inference.

        Per task, the whole memory's bytes divided by the number of tasks: it does not grow with them. As
        the paper counts memories, three bytes per value of an image.
        """
        tasks = host.network.tasks
        stored = self.memory.inputs.dtype
        dtype = stored_dtype(host, tasks[:1]) if host.stream.has_data(0) else stored
        in_paper = self.memory_size * prod(host.stream.input_shape) * 3
        return DeclaredBytes(
            training=memory_bytes(host, sum(self.memory.sizes), stored),
            per_task=memory_bytes(host, self.memory_size, dtype) // len(tasks),
            per_task_in_paper=in_paper // len(tasks),
        )


def check_exemplars(host: ContinualHost, memory_size: int) -> None:
    """Refuse, before training, a memory that cannot hold a sample of each class of each task.

    Raises:
        ConfigurationError: names the number of classes.
    """
    classes = sum(task.num_classes for task in host.network.tasks)
    if memory_size < classes:
        raise ConfigurationError(
            f"Expected memory_size to be at least 1 sample of each of the {classes} classes of all tasks, "
            f"but got {memory_size}. Raise it to {classes} or more."
        )
