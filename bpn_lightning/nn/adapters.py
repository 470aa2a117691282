"""What a layer has for each task, trained by the optimizer: a scale per output, or a low-rank product."""

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bpn_lightning.nn.layers import TaskModule

__all__ = ["Adapter", "AttentionLowRank", "ConvLowRank", "LowRank", "Scales"]


class Adapter(TaskModule):
    """Parameters of the task in training, and a bank with those of every learned task.

    With parameters of 0, as those of tasks that were not learned, a layer is what it is without.

    Args:
        num_tasks: T, number of tasks of the stream.
        shapes: of the parameters, by name.

    State:
        a parameter of each name, and a buffer ``<name>_bank`` with T of them; the task in training, if any.
    """

    def __init__(self, num_tasks: int, shapes: Mapping[str, Sequence[int]]) -> None:
        super().__init__(num_tasks)
        self.names = tuple(shapes)
        self.live: int | None = None
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.zeros(*shape)))
            self.register_buffer(f"{name}_bank", torch.zeros(num_tasks, *shape))

    def start(self, task_id: int, values: Mapping[str, Tensor]) -> None:
        """Start training a task, with these values, copied in place; 0 where none is given."""
        with torch.no_grad():
            for name in self.names:
                parameter = self.get_parameter(name)
                parameter.copy_(values[name]) if name in values else parameter.zero_()
        self.live = task_id

    def freeze(self) -> None:
        """Store the parameters of the task in training in the bank, and end its training."""
        if self.live is not None:
            for name in self.names:
                self.get_buffer(f"{name}_bank")[self.live] = self.get_parameter(name).detach()
            self.live = None

    def task_state(self, task_id: int) -> dict[str, Tensor]:
        """A task's row of each bank, also of the one in training."""
        if task_id != self.live:
            return super().task_state(task_id)
        return {f"{name}_bank": self.get_parameter(name).detach() for name in self.names}

    def forget(self, task_id: int) -> None:
        """Overwrite what a task has; the parameters are still those of the task trained last."""
        super().forget(task_id)
        if self.live is None:
            with torch.no_grad():
                for name in self.names:
                    self.get_parameter(name).zero_()

    def current(self, name: str) -> Tensor:
        """The active task's: ``(1, ...)``, or ``(batch, ...)`` with one task ID per sample."""
        own, bank = self.get_parameter(name)[None], self.get_buffer(f"{name}_bank")
        if isinstance(self.active, Tensor):
            found = bank[self.active]
            if self.live is None:
                return found
            here = (self.active == self.live).view(-1, *(1,) * (found.dim() - 1))
            return torch.where(here, own, found)
        return own if self.active == self.live else bank[self.active, None]

    def forward(self, layer: Any, input: Tensor, output: Tensor) -> Tensor:
        """The output of a layer in the active task's mode.

        Args:
            layer: a switchable layer, whose ``aligned(values, output)`` lets ``(batch, K)`` numbers
                broadcast over its output.
            input: of the layer.
            output: of the layer, without a mode.
        """
        raise NotImplementedError

    def project(self, index: int, input: Tensor, output: Tensor) -> Tensor:
        """The same of one of the four projections of attention: queries, keys, values and output.

        Args:
            index: which.
            input: ``(length, batch, E)``, or ``(length, E)``.
            output: of the projection, likewise.
        """
        raise NotImplementedError

    def get_extra_state(self) -> dict[str, Any]:
        """The task in training."""
        return {"live": self.live}

    def set_extra_state(self, state: Mapping[str, Any]) -> None:
        """Restore the task in training."""
        self.live = state["live"]


class Scales(Adapter):
    r"""A factor for each output of a layer: :math:`y = (1 + s_t) \odot (W x + b)`.

    Args:
        num_tasks: T, number of tasks of the stream.
        out_features: K, outputs, channels or features of the layer.

    State:
        ``scale`` ``(K,)``, a parameter, and ``scale_bank`` ``(T, K)``: what is added to 1, 4 K bytes per task.
    """

    def __init__(self, num_tasks: int, out_features: int) -> None:
        super().__init__(num_tasks, {"scale": (out_features,)})

    def forward(self, layer: Any, input: Tensor, output: Tensor) -> Tensor:
        """The output times the factors."""
        factors = (1 + self.current("scale")).to(output.dtype)
        scaled: Tensor = output * layer.aligned(factors, output)
        return scaled

    def project(self, index: int, input: Tensor, output: Tensor) -> Tensor:
        """A quarter of the factors is for each projection."""
        return output * (1 + self.current("scale").chunk(4, 1)[index]).to(output.dtype)


class LowRank(Adapter):
    r"""A product added to the weights of a linear layer: :math:`y = (W + c B_t A_t) x + b`.

    Args:
        num_tasks: T, number of tasks of the stream.
        rank: r.
        weight_shape: ``(out, in)``, or ``(out, in, *kernel)`` of a convolution.

    Attributes:
        scaling: c.
        inputs: n, how many numbers an output is computed from.

    State:
        ``A`` ``(r, in)`` and ``B`` ``(out, r)``, parameters, and a bank of each, 4 r (in + out) bytes per
        task; for a convolution A has the kernel's shape. The scaling.
    """

    def __init__(self, num_tasks: int, rank: int, weight_shape: Sequence[int]) -> None:
        out, *into = weight_shape
        super().__init__(num_tasks, {"A": (rank, *into), "B": (out, rank)})
        self.rank = rank
        self.inputs = prod(into)
        self.scaling = 1.0

    def forward(self, layer: Any, input: Tensor, output: Tensor) -> Tensor:
        """The output plus the product of the input."""
        a, b = self.current("A"), self.current("B")
        if a.shape[0] == 1:
            return output + F.linear(F.linear(input, a[0]), b[0]) * self.scaling
        rows = input.reshape(input.shape[0], -1, input.shape[-1])
        return output + (rows @ a.mT @ b.mT).reshape(output.shape) * self.scaling

    def get_extra_state(self) -> dict[str, Any]:
        """The task in training, and the scaling."""
        return {**super().get_extra_state(), "scaling": self.scaling}

    def set_extra_state(self, state: Mapping[str, Any]) -> None:
        """Restore both."""
        super().set_extra_state(state)
        self.scaling = state["scaling"]


class ConvLowRank(LowRank):
    """The same for a convolution: one of r channels, and a 1 x 1 convolution behind it."""

    per_sample: ClassVar[bool] = False

    def switch(self, task: int | Tensor) -> None:
        """Activate a task.

        Raises:
            TypeError: one task ID per sample is given; the network runs such batches task by task.
        """
        if isinstance(task, Tensor):
            raise TypeError("A convolution of low rank needs one task ID for the whole batch.")
        super().switch(task)

    def forward(self, layer: Any, input: Tensor, output: Tensor) -> Tensor:
        """The output plus the product of the patches."""
        inner = layer._conv_forward(input, self.current("A")[0], None)
        places = len(layer.kernel_size)
        product = self.current("B")[0] @ inner.flatten(-places)
        adapted: Tensor = output + product.unflatten(-1, inner.shape[-places:]) * self.scaling
        return adapted


class AttentionLowRank(LowRank):
    """The same for attention of width E: a product for each of its four projections.

    State:
        ``A`` ``(4, r, E)`` and ``B`` ``(4, E, r)``.
    """

    def __init__(self, num_tasks: int, rank: int, weight_shape: Sequence[int]) -> None:
        width = weight_shape[1]
        Adapter.__init__(self, num_tasks, {"A": (4, rank, width), "B": (4, width, rank)})
        self.rank = rank
        self.inputs = width
        self.scaling = 1.0

    def project(self, index: int, input: Tensor, output: Tensor) -> Tensor:
        """The output of a projection plus the product of its input."""
        a, b = self.current("A")[:, index], self.current("B")[:, index]
        if a.shape[0] == 1:
            return output + F.linear(F.linear(input, a[0]), b[0]) * self.scaling
        product = input.transpose(0, 1) @ a.mT @ b.mT
        return output + product.transpose(0, 1) * self.scaling
