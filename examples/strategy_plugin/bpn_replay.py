"""Experience replay, a strategy of its own package for bpn_lightning."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from bpn_lightning.costs import DeclaredBytes
from bpn_lightning.errors import ConfigurationError
from bpn_lightning.host import ContinualHost
from bpn_lightning.memory import EpisodicMemory, check_memory_size, memory_bytes
from bpn_lightning.random_state import seeded_generator
from bpn_lightning.strategies import ContinualStrategy
from bpn_lightning.tasks import Batch, Task

__all__ = ["Replay"]


class Replay(ContinualStrategy):
    r"""Experience replay: each update also trains on some samples of every past class.

    .. math:: \frac{1}{|B|} \sum_{i \in B} \ell_i + \frac{1}{|B|} \sum_{j \in R} \ell_j, \qquad |R| = |B|

    B is the batch, R as many samples of the memory, each answered in its own task's mode. ER of
    Chaudhry et al. (2019), https://arxiv.org/abs/1902.10486.

    Differs from the paper: the memory is drawn when a task ends and not while it is learned; replay goes
    through the memory in random order, all of it before any sample comes again.

    Args:
        size: samples of each class; 0 is fine-tuning.

    State:
        memory: inputs as the stream stores them, and targets: the bytes of an input plus 8 for each
        sample, in every process; nothing that is needed after training.

    Raises:
        ConfigurationError: size is negative, or a class has fewer training samples.
    """

    null_arguments: ClassVar[Mapping[str, Any] | None] = {"size": 0}

    def __init__(self, size: int = 10) -> None:
        if size < 0:
            raise ConfigurationError(
                f"Expected size to be 0 or a number of samples per class, but got {size}. "
                "0 is fine-tuning."
            )
        self.size = size
        self.reset()

    def reset(self) -> None:
        """Empty the memory: a fit that begins has replayed nothing."""
        self.memory = EpisodicMemory()
        self.replayed = 0  # samples since the memory last grew, over all processes

    def check(self, host: ContinualHost, optimizer: Optimizer) -> None:
        """Refuse before training what a later task could not give."""
        if self.size:
            check_memory_size(host, self.size, "class", "size")

    def on_task_end(self, host: ContinualHost, task: Task) -> None:
        """Keep samples of each class, drawn by a generator of its own."""
        if self.size:
            self.memory.store(host, task, self.size, "class", key=("replay memory",))
            self.replayed = 0

    def forget(self, host: ContinualHost, task: Task) -> Sequence[str]:
        """Delete the task's samples: nothing of it stays."""
        self.memory.forget(task.id)
        return []

    def loss_terms(self, host: ContinualHost, batch: Batch, logits: Tensor) -> dict[str, Tensor]:
        """The loss of this process's slice of R; the module divides the sum over all by the batch."""
        if not self.memory or host.phase.trains != "network":
            return {}
        rows = self._next(host, batch.global_size)[batch.start :][: len(batch.targets)]
        old = host.prepare(self.memory.batch(rows))
        replayed = host.network(old.inputs, task=old.task)
        return {"replay": host.losses(replayed, old.targets, old.task)}

    def _next(self, host: ContinualHost, number: int) -> Tensor:
        """The next rows of an endless sequence of random orders, however it is cut into batches."""
        size, first = len(self.memory), self.replayed
        self.replayed += number
        rounds = range(first // size, (self.replayed - 1) // size + 1)
        key = ("replay order", host.stream.seed, host.network.opened)
        orders = [torch.randperm(size, generator=seeded_generator(*key, one)) for one in rounds]
        return torch.cat(orders)[first % size :][:number]

    def declared_bytes(self, host: ContinualHost) -> DeclaredBytes:
        """The memory after the task that was opened last, by its shape and the type of what is stored."""
        network = host.network
        learned = network.structure.known(range(network.opened + 1))
        samples = self.size * sum(network.tasks[task].num_classes for task in learned)
        return DeclaredBytes(memory_bytes(host, samples, self.memory.inputs.dtype))

    def state_dict(self) -> dict[str, Any]:
        """The memory, and how far replay has come."""
        return {"memory": self.memory.state_dict(), "replayed": self.replayed}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what :meth:`state_dict` gave."""
        self.memory.load_state_dict(state_dict["memory"])
        self.replayed = state_dict["replayed"]

    def move_state(self, host: ContinualHost) -> None:
        """Move the memory to the host's device."""
        self.memory.to(host.device)
