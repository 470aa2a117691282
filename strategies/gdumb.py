"""GDumb: greedy sampler and dumb learner."""

from collections.abc import Collection
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from bpn_lightning.costs import DeclaredBytes, tensor_bytes
from bpn_lightning.errors import ConfigurationError
from bpn_lightning.functional.replay import Chosen, greedy_balanced
from bpn_lightning.host import ContinualHost
from bpn_lightning.memory import TaskSlice
from bpn_lightning.nn.head import without_rows
from bpn_lightning.random_state import seeded_generator
from bpn_lightning.strategies.replay import ReplayStrategy, check_exemplars
from bpn_lightning.tasks import Batch, ContinualStream, Task

__all__ = ["GDumb"]


class GDumb(ReplayStrategy):
    r"""GDumb: a network trained from scratch on a class-balanced memory, and on nothing else.

    .. math:: \min_\theta \sum_{(x, y) \in M} \ell(f_\theta(x), y)

    Prabhu, Torr, Dokania (2020), https://www.robots.ox.ac.uk/~tvg/publications/2020/gdumb.pdf: a question
    to every other method, as nothing is learned continually. The memory M is that of their Algorithm 1,
    balanced to within one sample where classes have enough of them. When a task begins, M takes the
    task's samples, the network gets its initial weights back, and the task's epochs train it on M.

    Differs from the paper: a fit is as long as the task's other methods are trained for, with the
    module's optimizer and schedule: an update has as many samples of M as the stream's batch has, in
    random orders. The paper trains for 256 epochs of M by SGD with warm restarts, and with CutMix. Every
    fit begins with the same weights. The paper leaves out other tasks' classes at the test alone, where
    the task is given; ``mask="task"`` also does in training.

    Args:
        memory_size: samples of all tasks together, at least one of each class of each task.

    State:
        the samples as the stream stores them, images as uint8, and their labels: per sample the bytes of
        an input plus 8; the initial weights and buffers, 4 bytes per number. Nothing for inference.

    Raises:
        ConfigurationError: memory_size is too small, or the stream keeps the optimizer's state.
    """

    exclusive: ClassVar[bool] = True
    plain_first_task: ClassVar[bool] = False
    needs_trainable_core: ClassVar[bool] = True
    weights_in_state: ClassVar[Collection[str]] = ("initial",)

    def __init__(self, memory_size: int = 200) -> None:
        super().__init__(memory_size)

    def reset(self) -> None:
        """Empty the memory."""
        super().reset()
        self.initial: dict[str, Tensor] = {}

    def check(self, host: ContinualHost, optimizer: Optimizer) -> None:
        """Refuse a memory without room for each class, and an optimizer that continues."""
        check_exemplars(host, self.memory_size)
        if host.stream.reset_optimizer != "always":
            raise ConfigurationError(
                "Expected reset_optimizer to be 'always' if each task trains from scratch, but got "
                f"{host.stream.reset_optimizer!r}. Set it to 'always'."
            )

    def on_stream_start(self, host: ContinualHost, stream: ContinualStream) -> None:
        """Store the initial weights."""
        self.initial = {name: value.clone() for name, value in _weights(host).items()}

    def on_task_start(self, host: ContinualHost, task: Task) -> None:
        """Let the memory see the task, and begin from scratch."""
        self.refill(host, task)
        with torch.no_grad():
            for name, value in _weights(host).items():
                value.copy_(self.initial[name])

    def choose(self, host: ContinualHost, task: Task, own: TaskSlice) -> Chosen:
        """The greedy sampler."""
        generator = seeded_generator("greedy sampler", host.stream.seed, task.id)
        held, new = self.memory.targets.tolist(), own.targets.tolist()
        return greedy_balanced(held, new, self.memory_size, generator)

    def training_batch(self, host: ContinualHost, batch: Batch) -> Batch:
        """As many samples of the memory, in the place of the stream's."""
        drawn = self.order(host, self.draws, batch.global_size, "samples")
        self.draws += len(drawn)
        old = self.samples(host, drawn[self.own_part(batch, drawn)])
        return old._replace(global_size=batch.global_size, start=batch.start)

    def forget(self, host: ContinualHost, task: Task) -> list[str]:
        """Delete the task's samples; the network forgets it with the next task, which starts from scratch."""
        super().forget(host, task)
        rows = host.network.structure.freed_columns(task.id)
        self.initial = without_rows(self.initial, rows)
        return []

    def training_state(self) -> str:
        """The samples, and what a fit begins with."""
        return "memory and initial weights"

    def state_dict(self) -> dict[str, Any]:
        """The memory, and the initial weights."""
        return {**super().state_dict(), "initial": self.initial}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the memory, and the initial weights."""
        super().load_state_dict(state_dict)
        self.initial = dict(state_dict["initial"])

    def move_state(self, host: ContinualHost) -> None:
        """Move the memory and the initial weights to the host's device."""
        super().move_state(host)
        self.initial = {name: value.to(host.device) for name, value in self.initial.items()}

    def declared_bytes(self, host: ContinualHost) -> DeclaredBytes:
        """The memory, and a copy of the network's weights and buffers."""
        declared = super().declared_bytes(host)
        copied = tensor_bytes(_weights(host).values())
        return declared._replace(training=declared.training + copied)


def _weights(host: ContinualHost) -> dict[str, Tensor]:
    """Parameters and buffers of the network, by name."""
    state = host.network.state_dict()
    return {n: value for n, value in state.items() if n.startswith(("backbone.", "head."))}
