"""Layers that behave differently for each task, and the context in which networks are measured."""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

__all__ = [
    "BiasUnits",
    "ComplexKeys",
    "ComplexLinear",
    "KernelKeys",
    "Keys",
    "SwitchableConv2d",
    "SwitchableLinear",
    "TaskModule",
    "WeightBank",
    "effective_input",
    "evaluation_mode",
    "full_precision",
    "is_linear",
]


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
        rank: H, the width of the factorization.
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
        """M W, shape ``(1, K)``."""
        return self.M @ self.W

    def forward(self) -> Tensor:
        """The bias of the active task: ``(1, K)``, or ``(batch, K)`` when every sample has its own."""
        if isinstance(self.active, Tensor):
            biases = self.bank[self.active]
            if self.live is None:
                return biases
            return torch.where((self.active == self.live)[:, None], self.product(), biases)
        return self.product() if self.active == self.live else self.bank[self.active, None]

    def get_extra_state(self) -> dict[str, int | None]:
        """Which task is live."""
        return {"live": self.live}

    def set_extra_state(self, state: dict[str, int | None]) -> None:
        """Take over which task was live."""
        self.live = state["live"]


class Keys(TaskModule):
    r"""The keys of one layer: vectors :math:`k_t \in \{-1, 1\}^n` that its inputs are multiplied by.

    Cheung et al. (2019), https://arxiv.org/abs/1902.05522. They are fixed: drawn once, never learned;
    1 before that. A sign is exact in every precision.

    Args:
        num_tasks: T, tasks of the stream.
        size: n, inputs of the layer.

    State:
        ``bank`` ``(T, n)`` int8, n bytes for each task.
    """

    kind: ClassVar[str] = "binary"
    bank: Tensor

    def __init__(self, num_tasks: int, size: int) -> None:
        super().__init__(num_tasks)
        self.register_buffer("bank", torch.ones(num_tasks, size, dtype=torch.int8))

    def write(self, task_id: int, key: Tensor) -> None:
        """Give a task its key, ``(n,)``, in place."""
        self.bank[task_id] = key

    def forward(self) -> Tensor:
        """The key of the active task: ``(n,)``, or ``(batch, n)`` when every sample has its own."""
        return self.bank[self.active]


class KernelKeys(Keys):
    """The keys of a convolution, n of :math:`C_{in} k_h k_w` signs; its weights are multiplied by them."""

    per_sample = False

    def switch(self, task: int | Tensor) -> None:
        """Use the key of this task.

        Raises:
            TypeError: samples have tasks of their own; the network answers those group by group.
        """
        if isinstance(task, Tensor):
            raise TypeError("The keyed weights of a convolution serve a whole batch.")
        super().switch(task)


class ComplexKeys(Keys):
    r"""The keys of a complex layer, :math:`k_t = e^{i \varphi_t}`, as their phases; 0 before they are drawn.

    State:
        ``bank`` ``(T, n)``, phases in radians, 4 n bytes for each task.
    """

    kind = "complex"

    def __init__(self, num_tasks: int, size: int) -> None:
        super().__init__(num_tasks, size)
        self.bank = torch.zeros(num_tasks, size)


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
        torch.clear_autocast_cache()  # it holds the weights of before in low precision

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
    r"""A linear layer with keys, bias units, or both: :math:`y = W (x \odot k_t) + b + \mathrm{BIAS}_t`.

    Alg. 3 of Wen et al.; without keys it is their Eq. 1. :meth:`convert` turns an ``nn.Linear`` into
    one in place, so its parameters, its name and every reference to it stay what they were.
    """

    bias_units: BiasUnits | None
    keys: Keys | None

    @staticmethod
    def convert(
        layer: nn.Linear, bias_units: BiasUnits | None = None, keys: Keys | None = None
    ) -> "SwitchableLinear":
        """Give a linear layer bias units or keys, beside what it has."""
        if not isinstance(layer, SwitchableLinear):
            kind = type(
                layer
            )  # of a parametrized layer a class of its own, where its weight is made
            layer.__class__ = (
                type(kind.__name__, (SwitchableLinear, kind), {})
                if is_parametrized(layer)
                else SwitchableLinear
            )
            layer.register_module("bias_units", None)
            layer.register_module("keys", None)
        assert isinstance(layer, SwitchableLinear)
        if bias_units is not None:
            layer.bias_units = bias_units.to(layer.weight.device)
        if keys is not None:
            layer.keys = keys.to(layer.weight)
        return layer

    def taken(self, input: Tensor) -> Tensor:
        """What the weights see of an input."""
        keys = self.keys
        return input if keys is None else input * _aligned(keys(), input)

    def forward(self, input: Tensor) -> Tensor:
        """``(batch, ..., in)`` to ``(batch, ..., out)``."""
        return self._biased(self.taken(input), self.weight)

    def _biased(self, taken: Tensor, weight: Tensor) -> Tensor:
        """The linear map, with the layer's own bias and the active task's."""
        units = self.bias_units
        if units is None:
            return F.linear(taken, weight, self.bias)
        shift: Tensor = units()
        if shift.shape[0] == 1:  # len() would fix the size of a batch while a network is exported
            # Adding two vectors of K before the product is cheaper than adding to a batch after it,
            # and a row of a matrix serves as well: taking it out would cost as much again backwards.
            bias = shift if self.bias is None else self.bias + shift
            return F.linear(taken, weight, bias)
        return F.linear(taken, weight, self.bias) + _aligned(shift, taken)


class ComplexLinear(SwitchableLinear):
    r"""A linear layer with complex weights and keys, :math:`y = W (x \odot e^{i \varphi_t}) + b + \mathrm{BIAS}_t`.

    n complex numbers are 2 n real ones: all real parts, then all imaginary parts; so whatever works
    element by element, such as ReLU or dropout, works on both parts separately. ``weight`` becomes the
    real part of W. Biases are real, as the layer's own is: they shift the real part of y.

    State:
        ``weight_imag`` ``(out, in)``, the imaginary part of W, a parameter; 0 at first.
    """

    keys: Keys
    weight_imag: nn.Parameter
    real_output: bool

    @staticmethod
    def make_complex(layer: nn.Linear, keys: ComplexKeys, real_output: bool) -> "ComplexLinear":
        """Give a linear layer complex keys and weights.

        Args:
            layer: converted in place.
            keys: of size ``in``.
            real_output: whether it answers with the real part of y alone, as a head does.
        """
        layer = SwitchableLinear.convert(layer, keys=keys)
        imaginary = torch.zeros_like(layer.weight)
        layer.__class__ = ComplexLinear
        assert isinstance(layer, ComplexLinear)
        layer.weight_imag = nn.Parameter(imaginary, layer.weight.requires_grad)
        layer.real_output = real_output
        return layer

    def taken(self, input: Tensor) -> Tensor:
        """``(batch, ..., in)``, real, or ``(batch, ..., 2 in)`` to what the weights see, ``2 in``."""
        phases = _aligned(self.keys(), input)
        cos, sin = phases.cos(), phases.sin()
        if input.shape[-1] == self.in_features:
            return torch.cat([input * cos, input * sin], -1)
        real, imaginary = input.chunk(2, -1)
        return torch.cat([real * cos - imaginary * sin, real * sin + imaginary * cos], -1)

    def forward(self, input: Tensor) -> Tensor:
        """``(batch, ..., in)`` or ``(batch, ..., 2 in)`` to ``(batch, ..., out)`` or ``(batch, ..., 2 out)``."""
        taken = self.taken(input)
        real = self._biased(taken, torch.cat([self.weight, -self.weight_imag], 1))
        if self.real_output:
            return real
        imaginary = F.linear(taken, torch.cat([self.weight_imag, self.weight], 1))
        return torch.cat([real, imaginary], -1)


class SwitchableConv2d(nn.Conv2d):
    r"""A convolution with keys: :math:`y = (W \odot k_t) * x + b`, a key for each place of its patches.

    Multiplying the weights is the same as multiplying every patch, and cheaper. :meth:`convert` turns
    an ``nn.Conv2d`` into one in place.
    """

    keys: KernelKeys

    @staticmethod
    def convert(layer: nn.Conv2d, keys: KernelKeys) -> "SwitchableConv2d":
        """Give a convolution keys, of size :math:`C_{in} k_h k_w`."""
        layer.__class__ = SwitchableConv2d
        assert isinstance(layer, SwitchableConv2d)
        layer.keys = keys.to(layer.weight)
        return layer

    def forward(self, input: Tensor) -> Tensor:
        """As ``nn.Conv2d``."""
        shape = self.weight.shape[1:]
        by_group = self.weight.view(self.groups, -1, *shape) * self.keys().view(
            self.groups, 1, *shape
        )
        output: Tensor = self._conv_forward(input, by_group.flatten(0, 1), self.bias)
        return output


def is_linear(part: nn.Module) -> bool:
    """Whether a part is a linear layer, switchable or not, its weight parametrized or not.

    By exact type: a subclass may have a forward of its own, or none that is called.
    """
    kind = type(part)
    if is_parametrized(part):
        kind = kind.__bases__[0]
    return kind in (nn.Linear, SwitchableLinear, ComplexLinear)


def _aligned(vectors: Tensor, input: Tensor) -> Tensor:
    """``(size,)``, or ``(batch, size)`` with as many dimensions as ``(batch, ..., size)`` has."""
    if vectors.dim() == 1:
        return vectors
    return vectors.reshape(vectors.shape[0], *(1,) * (input.dim() - 2), vectors.shape[1])


def effective_input(layer: nn.Module, input: Tensor) -> Tensor:
    """What a layer's weights see of an input: the input itself, but for keyed layers."""
    return layer.taken(input) if isinstance(layer, SwitchableLinear) else input


def full_precision(value: Tensor) -> Tensor:
    """The same in float32, where it is in half precision: for logarithms, and for sums."""
    return value.to(torch.promote_types(value.dtype, torch.float32))


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
