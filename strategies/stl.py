"""Single-task learning: a network of its own for every task."""

import random
from typing import ClassVar

import numpy as np
import torch
from torch.optim import Optimizer

from bpn_lightning.costs import DeclaredBytes, HeldTensors, tensor_bytes
from bpn_lightning.errors import ConfigurationError
from bpn_lightning.host import ContinualHost
from bpn_lightning.nn.layers import WeightBank
from bpn_lightning.random_state import seeded_generator
from bpn_lightning.strategies.base import ContinualStrategy
from bpn_lightning.tasks import ContinualStream, Task

__all__ = ["IndependentNetworks"]


class IndependentNetworks(ContinualStrategy):
    r"""One independent network per task, all of them from the same start: :math:`f(x; \theta_t)`.

    STL in Wen et al. Nothing is forgotten and nothing is shared, so backward transfer is exactly 0, and
    a network depends neither on the tasks before its own nor on their number: a task begins with the
    weights of the beginning, a fresh optimizer, and global generators (dropout) seeded from the
    stream's seed and its own id. The first task goes on with the generators as they are: it is plain
    training.

    Differs from the paper, which is silent: the networks start alike, so that they differ in their data
    alone.

    State:
        in the module: a set of weights and buffers for every learned task, 4 P bytes each, and those of
        the beginning, which tasks to come are answered with.

    Raises:
        ConfigurationError: the stream keeps the optimizer's state from task to task.
    """

    exclusive: ClassVar[bool] = True
    needs_task_id: ClassVar[bool] = True

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Let go of the module that has the networks."""
        self.bank: WeightBank | None = None

    def configure(self, host: ContinualHost, stream: ContinualStream) -> None:
        """Give the module room for whole sets of weights."""
        self.bank = host.network.attach_weight_bank()

    def check(self, host: ContinualHost, optimizer: Optimizer) -> None:
        """Refuse an optimizer that would hand one network's momentum to the next."""
        if host.stream.reset_optimizer != "always":
            raise ConfigurationError(
                "Expected reset_optimizer to be 'always' where every task has a network of its own, but "
                f"got {host.stream.reset_optimizer!r}. Set it to 'always'."
            )

    def on_stream_start(self, host: ContinualHost, stream: ContinualStream) -> None:
        """Keep the weights that every network begins with."""
        self._bank.begin()

    def on_task_start(self, host: ContinualHost, task: Task) -> None:
        """Begin anew."""
        self._bank.start(task.id)
        if task.id > 0:
            _fork_generators(host.stream.seed, task.id, host.global_rank)

    def on_task_end(self, host: ContinualHost, task: Task) -> None:
        """Keep the task's network."""
        self._bank.freeze()

    def held_tensors(self, host: ContinualHost) -> HeldTensors:
        """The weights of the beginning, and the networks of the learned tasks."""
        learned = self._bank.learned.values()
        return HeldTensors(
            training=self._bank.beginning.values(),
            inference=[tensor for weights in learned for tensor in weights.values()],
        )

    def declared_bytes(self, host: ContinualHost) -> DeclaredBytes:
        """Inference: 4 P and the buffers for each learned task; training: once more."""
        network = host.network
        parts = [network.get_submodule(name) for name in self._bank.parts]
        one = sum(tensor_bytes([*part.parameters(), *part.buffers()]) for part in parts)
        learned = (host.network.opened + 1) * one
        return DeclaredBytes(learned + one, learned, one, one)

    @property
    def _bank(self) -> WeightBank:
        assert self.bank is not None
        return self.bank


def _fork_generators(seed: int, task_id: int, rank: int) -> None:
    """Seed the global generators, as if nothing had been drawn before this task."""
    start = seeded_generator("independent networks", seed, task_id, rank).initial_seed()
    torch.manual_seed(start)  # of every device
    random.seed(start)
    np.random.seed(start % 2**32)
