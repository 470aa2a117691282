"""Layers that behave differently for each task, and the context in which networks are measured."""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["BiasUnits", "SwitchableLinear", "TaskModule", "WeightBank", "evaluation_mode", "taken_input"]


class TaskModule(nn.Module):
    """A part of a network that holds something for every task and uses one task's at a time.

    The module that owns the network calls :meth:`switch` on each of them; nothing else does.

    Args:
        num_tasks: tasks of the stream.
    """

    #: Whether the samples of one batch may each have a task of their own.
    per_sample: ClassVar[bool] = True

    def __init__(self, num_tasks: int) -> None:
        super().__init__()
        self.num_tasks = num_tasks
        self.active: int | Tensor = 0

    def switch(self, task: int | Tensor) -> None:
        """Use this task from now on.

        Args:
            task: a task id, or ``(batch,)`` int64, one task id for each sample of the next forward.
        """
        self.active = task


class BiasUnits(TaskModule):
    r"""The bias units of one layer: :math:`\mathrm{BIAS}_t = M_t W_t` while task t is learned.

    Wen et al., section V. One pair M, W serves all tasks; :meth:`freeze` keeps the product.

    Args:
        num_tasks: T, tasks of the stream.
        rank: H, the width of the factorisation.
        out_features: K, outputs of the layer.

    State:
        M ``(1, H)`` and W ``(H, K)``, parameters; ``bank`` ``(T, K)``, the frozen biases, 4 K bytes for
        each task; which task is live, if any.
    """

    bank: Tensor

    def __init__(self, num_tasks: int, rank: int, out_features: int) -> None:
        super().__init__(num_tasks)
        self.M = nn.Parameter(torch.zeros(1, rank))
        self.W = nn.Parameter(torch.zeros(rank, out_features))
        self.register_buffer("bank", torch.zeros(num_tasks, out_features))
        self.live: int | None = None

    def start(self, task_id: int, m: Tensor, w: Tensor) -> None:
        """Make a task live, with these values of M and W, written in place."""
        with torch.no_grad():
            self.M.copy_(m)
            self.W.copy_(w)
        self.live = task_id

    def freeze(self) -> None:
        """Keep the live task's product in the bank; no task is live afterwards."""
        if self.live is not None:
            with torch.no_grad():
                self.bank[self.live] = self.product()
            self.live = None

    def product(self) -> Tensor:
        """M W, shape ``(K,)``."""
        return (self.M @ self.W)[0]

    def forward(self) -> Tensor:
        """The bias of the active task: ``(K,)``, or ``(batch, K)`` when every sample has its own."""
        if isinstance(self.active, Tensor):
            biases = self.bank[self.active]
            if self.live is None:
                return biases
            return torch.where((self.active == self.live)[:, None], self.product(), biases)
        return self.product() if self.active == self.live else self.bank[self.active]

    def get_extra_state(self) -> dict[str, int | None]:
        """Which task is live."""
        return {"live": self.live}

    def set_extra_state(self, state: dict[str, int | None]) -> None:
        """Take over which task was live."""
        self.live = state["live"]


class WeightBank(TaskModule):
    """A whole set of weights for every task, of which one is in the network at a time.

    A task that was never started has the weights of the beginning.

    Args:
        num_tasks: tasks of the stream.
        network: whose parameters and buffers below ``parts`` are exchanged, in place.
        parts: names of its children.

    State:
        the weights of each learned task and of the beginning, as plain tensors: buffers would be sent
        to all processes at every forward.
    """

    per_sample = False

    def __init__(self, num_tasks: int, network: nn.Module, parts: tuple[str, ...]) -> None:
        super().__init__(num_tasks)
        self._network = (network,)  # in a tuple, for it contains this module and not the reverse
        self.parts = parts
        self.beginning: dict[str, Tensor] = {}
        self.learned: dict[int, dict[str, Tensor]] = {}
        self.live: int | None = None
        self.inside = 0  # whose weights the network has

    def begin(self) -> None:
        """Keep the network's weights as those that every task begins with."""
        self.beginning = self._copy()

    def start(self, task_id: int) -> None:
        """Make a task live, with the weights of the beginning."""
        self._write(self.beginning)
        self.live = self.inside = task_id

    def freeze(self) -> None:
        """Keep the live task's weights; no task is live afterwards."""
        if self.live is not None:
            self.learned[self.live] = self._copy()
            self.live = None

    def switch(self, task: int | Tensor) -> None:
        """Exchange the weights of the network.

        Raises:
            TypeError: samples have tasks of their own; the network answers those group by group.
        """
        if isinstance(task, Tensor):
            raise TypeError("A set of weights serves a whole batch.")
        super().switch(task)
        if task == self.inside or not self.beginning:
            return
        if self.inside == self.live:
            self.learned[self.live] = self._copy()
        self._write(self.learned.get(task, self.beginning))
        if task == self.live:
            del self.learned[task]
        self.inside = task

    def _tensors(self) -> dict[str, Tensor]:
        children = [(part, getattr(self._network[0], part)) for part in self.parts]
        return {
            f"{part}.{name}": tensor
            for part, child in children
            for name, tensor in chain(child.named_parameters(), child.named_buffers())
        }

    def _copy(self) -> dict[str, Tensor]:
        return {name: tensor.detach().clone() for name, tensor in self._tensors().items()}

    def _write(self, values: dict[str, Tensor]) -> None:
        with torch.no_grad():
            for name, tensor in self._tensors().items():
                tensor.copy_(values[name])

    def get_extra_state(self) -> dict[str, Any]:
        """All sets of weights, and which one the network has."""
        return {
            "beginning": self.beginning,
            "learned": dict(self.learned),
            "live": self.live,
            "inside": self.inside,
        }

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Take over what :meth:`get_extra_state` gave; the network's weights are loaded beside it."""
        for name, value in state.items():
            setattr(self, name, value)


class SwitchableLinear(nn.Linear):
    r"""A linear layer with bias units: :math:`y = W x + b + \mathrm{BIAS}_t` (Eq. 1 of Wen et al.).

    :meth:`convert` turns an ``nn.Linear`` into one in place, so its parameters, its name and every
    reference to it stay what they were.
    """

    bias_units: BiasUnits

    @staticmethod
    def convert(layer: nn.Linear, bias_units: BiasUnits) -> "SwitchableLinear":
        """Give a linear layer bias units."""
        layer.__class__ = SwitchableLinear
        assert isinstance(layer, SwitchableLinear)
        layer.bias_units = bias_units.to(layer.weight.device)
        return layer

    def taken(self, input: Tensor) -> Tensor:
        """What the weights see of an input."""
        return input

    def forward(self, input: Tensor) -> Tensor:
        """``(batch, ..., in)`` to ``(batch, ..., out)``."""
        shift: Tensor = self.bias_units()
        if shift.dim() == 1:
            # Adding two vectors of K before the product is cheaper than adding to a batch after it.
            bias = shift if self.bias is None else self.bias + shift
            return F.linear(input, self.weight, bias)
        middle = (1,) * (input.dim() - 2)
        output: Tensor = F.linear(input, self.weight, self.bias)
        return output + shift.reshape(shift.shape[0], *middle, shift.shape[1])


def taken_input(layer: nn.Module, input: Tensor) -> Tensor:
    """What a layer's weights see of an input: the input itself, but for keyed layers."""
    return layer.taken(input) if isinstance(layer, SwitchableLinear) else input


@contextmanager
def evaluation_mode(module: nn.Module) -> Iterator[None]:
    """Put every part of a module into ``eval()`` and give each its own flag back afterwards."""
    flags = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, training in flags:
            part.training = training
