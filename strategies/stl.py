"""Single-task learning: a separate network for each task."""

import random
from typing import ClassVar

import numpy as np
import torch
from torch.optim import Optimizer

from bpn_lightning.costs import DeclaredBytes, HeldTensors, tensor_bytes
from bpn_lightning.errors import ConfigurationError
from bpn_lightning.host import ContinualHost
from bpn_lightning.nn.weight_bank import WeightBank
from bpn_lightning.random_state import seeded_generator
from bpn_lightning.strategies.base import ContinualStrategy
from bpn_lightning.tasks import ContinualStream, Task

__all__ = ["IndependentNetworks"]


class IndependentNetworks(ContinualStrategy):
    r"""One independent network per task, all with the same initialization: :math:`f(x; \theta_t)`.

    STL in Wen et al. Nothing is shared and nothing is forgotten, so backward transfer is exactly 0, and
    a network depends neither on the previous tasks nor on their number: each task starts with the
    initial weights, a new optimizer, and global generators (dropout) seeded from the stream's seed and
    the task ID. The first task uses the generators as they are: it is plain training.

    The paper does not specify the initialization; here it is the same for all networks, so that they
    differ only in their data.

    State:
        in the module: a set of weights and buffers for each learned task, 4 P bytes each, and the
        initial ones, which are used for tasks that are not learned yet.

    Raises:
        ConfigurationError: the stream keeps the optimizer's state from task to task.
    """

    exclusive: ClassVar[bool] = True
    needs_task_id: ClassVar[bool] = True
    needs_trainable_core: ClassVar[bool] = True

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Drop the reference to the module's weight bank."""
        self.bank: WeightBank | None = None

    def configure(self, host: ContinualHost, stream: ContinualStream) -> None:
        """Attach a weight bank to the module."""
        self.bank = host.network.attach_weight_bank()

    def check(self, host: ContinualHost, optimizer: Optimizer) -> None:
        """Refuse to carry optimizer state, such as momentum, from one network to the next."""
        if host.stream.reset_optimizer != "always":
            raise ConfigurationError(
                "Expected reset_optimizer to be 'always' if each task has its own network, but got "
                f"{host.stream.reset_optimizer!r}. Set it to 'always'."
            )

    def on_stream_start(self, host: ContinualHost, stream: ContinualStream) -> None:
        """Store the initial weights of all networks."""
        self._bank.begin()

    def on_task_start(self, host: ContinualHost, task: Task) -> None:
        """Restore the initial weights and seed the generators."""
        self._bank.start(task.id)
        if task.id > 0:
            _fork_generators(host.stream.seed, task.id, host.global_rank)

    def on_task_end(self, host: ContinualHost, task: Task) -> None:
        """Store the task's network."""
        self._bank.freeze()

    def held_tensors(self, host: ContinualHost) -> HeldTensors:
        """The initial weights, and the networks of the learned tasks."""
        learned = self._bank.learned.values()
        return HeldTensors(
            training=self._bank.beginning.values(),
            inference=[tensor for weights in learned for tensor in weights.values()],
        )

    def declared_bytes(self, host: ContinualHost) -> DeclaredBytes:
        """Inference: 4 P and the buffers for each learned task; training: one set more."""
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
    """Seed the global generators independently of earlier tasks."""
    start = seeded_generator("independent networks", seed, task_id, rank).initial_seed()
    torch.manual_seed(start)  # on every device
    random.seed(start)
    np.random.seed(start % 2**32)
