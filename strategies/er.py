"""Experience replay."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch

from bpn_lightning.functional.replay import Chosen, reservoir
from bpn_lightning.host import ContinualHost
from bpn_lightning.memory import TaskSlice
from bpn_lightning.random_state import seeded_generator
from bpn_lightning.strategies.replay import ReplayStrategy
from bpn_lightning.tasks import Batch, Task

__all__ = ["ExperienceReplay"]


class ExperienceReplay(ReplayStrategy):
    r"""Experience replay (ER): each update is made on a batch and as many samples of a memory.

    .. math:: \frac{1}{|B \cup R|} \sum_{i \in B \cup R} \ell(x_i, y_i), \qquad |R| = |B|

    Algorithm 1 of Chaudhry et al. (2019), https://arxiv.org/abs/1902.10486, with its reservoir:
    each of the n samples seen so far is one of the k in the memory with the probability k / n.

    Differs from the paper: the memory takes a task's samples when the task ends, and not while it is
    learned, so that only those of past tasks are replayed, and a task may have several epochs; R goes
    through the memory in random orders, instead of being drawn again for each update.

    With ``mask="task"`` the head rows of past tasks are trained by their samples.

    Args:
        memory_size: k, samples of all tasks together; 0 is fine-tuning.

    State:
        the samples as the stream stores them, images as uint8, and their labels: per sample the bytes of
        an input plus 8; the number of training samples of each task. Nothing for inference.

    Raises:
        ConfigurationError: memory_size is no whole number of at least 0.
    """

    null_arguments: ClassVar[Mapping[str, Any] | None] = {"memory_size": 0}

    def __init__(self, memory_size: int = 200) -> None:
        super().__init__(memory_size)

    def reset(self) -> None:
        """Empty the memory."""
        super().reset()
        self.seen: list[int] = []  # training samples of each task

    def training_batch(self, host: ContinualHost, batch: Batch) -> Batch:
        """The batch and, of the memory, as many samples."""
        if not len(self.memory):
            return batch
        drawn = self.order(host, self.draws, batch.global_size, "samples")
        self.draws += len(drawn)
        part = self.own_part(batch, drawn)
        old = self.samples(host, drawn[part])
        tasks = torch.as_tensor(batch.task, device=batch.targets.device)
        return Batch(
            inputs=torch.cat((batch.inputs, old.inputs)),
            targets=torch.cat((batch.targets, old.targets)),
            task=torch.cat((tasks.expand(len(batch.targets)), torch.as_tensor(old.task))),
            global_size=batch.global_size + len(drawn),
            start=batch.start + part.start,
        )

    def on_task_end(self, host: ContinualHost, task: Task) -> None:
        """Let the reservoir see the task."""
        if self.memory_size:
            self.refill(host, task)

    def choose(self, host: ContinualHost, task: Task, own: TaskSlice) -> Chosen:
        """A step of the reservoir for each sample of the task."""
        generator = seeded_generator("reservoir", host.stream.seed, task.id)
        new, before = len(own.targets), sum(self.seen)
        chosen = reservoir(len(self.memory), before, new, self.memory_size, generator)
        self.seen = [*self.seen, new]
        return chosen

    def forget(self, host: ContinualHost, task: Task) -> list[str]:
        """Delete the task's samples, as if it had never been seen."""
        super().forget(host, task)
        if task.id < len(self.seen):
            self.seen[task.id] = 0
        return []

    def state_dict(self) -> dict[str, Any]:
        """The memory, and the number of samples that it was drawn from."""
        return {**super().state_dict(), "seen": list(self.seen)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the memory."""
        super().load_state_dict(state_dict)
        self.seen = [int(number) for number in state_dict["seen"]]
