"""Layers with per-task parameters, and a context manager for evaluation mode."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from bpn_lightning.nn.growing import grown

__all__ = [
    "BiasUnits",
    "ComplexKeys",
    "ComplexLinear",
    "KernelKeys",
    "Keys",
    "SwitchableLinear",
    "TaskModule",
    "effective_input",
    "evaluation_mode",
    "full_precision",
    "is_linear",
]


class TaskModule(nn.Module):
    """A part of a network with parameters or buffers per task, of which one task's are active.

    Only the module that owns the network calls :meth:`switch`.

    Args:
        num_tasks: number of tasks of the stream.
    """

    #: Whether a batch may contain samples of different tasks.
    per_sample: ClassVar[bool] = True

    def __init__(self, num_tasks: int) -> None:
        super().__init__()
        self.num_tasks = num_tasks
        self.active: int | Tensor = 0

    def switch(self, task: int | Tensor) -> None:
        """Activate a task.

        Args:
            task: a task ID, or ``(batch,)`` int64, one task ID per sample of the next forward pass.
        """
        self.active = task

    def forget(self, task_id: int) -> None:
        """Overwrite what is stored of a task that was learned: by default its row of every buffer."""
        for buffer in self.buffers(recurse=False):
            if buffer.dim() and len(buffer) == self.num_tasks:
                buffer[task_id] = 0

    def task_state(self, task_id: int) -> dict[str, Tensor]:
        """What is stored of a task, by the names of buffers: by default its row of each."""
        rows = self.named_buffers(recurse=False)
        return {name: b[task_id] for name, b in rows if b.dim() and len(b) == self.num_tasks}

    def grow(self, num_tasks: int) -> None:
        """Make room for more tasks; what the module has of the others stays.

        By default buffers that have a row for each task get rows of 0.
        """
        for name, bank in list(self.named_buffers(recurse=False)):
            if len(bank.shape) and len(bank) == self.num_tasks:
                setattr(self, name, grown(bank, bank.new_zeros(num_tasks, *bank.shape[1:])))
        self.num_tasks = num_tasks


class BiasUnits(TaskModule):
    r"""The bias units of one layer: :math:`\mathrm{BIAS}_t = M_t W_t` during training on task t.

    Wen et al., section V. The same M and W are reused for all tasks; :meth:`freeze` stores the product.

    Args:
        num_tasks: T, number of tasks of the stream.
        rank: H, the width of the factorization; 0: none, W is the bias itself.
        out_features: K, outputs of the layer.

    State:
        M ``(1, H)`` and W ``(H, K)``, or ``(1, K)`` without a factorization, parameters; ``bank`` ``(T,
        K)``, the frozen biases, 4 K bytes per task; the task in training, if any.
    """

    bank: Tensor

    def __init__(self, num_tasks: int, rank: int, out_features: int) -> None:
        super().__init__(num_tasks)
        self.M = nn.Parameter(torch.zeros(1, rank))
        self.W = nn.Parameter(torch.zeros(max(rank, 1), out_features))
        self.register_buffer("bank", torch.zeros(num_tasks, out_features))
        self.live: int | None = None
        self.num_open: int | None = None  # outputs that are computed, of a head; None: all

    def widen(self, out_features: int) -> None:
        """Make room for more outputs, whose biases are 0."""
        self.W = nn.Parameter(
            grown(self.W, self.W.new_zeros(len(self.W), out_features)), self.W.requires_grad
        )
        self.bank = grown(self.bank, self.bank.new_zeros(len(self.bank), out_features))

    def start(self, task_id: int, m: Tensor, w: Tensor) -> None:
        """Start training a task, with these values of M and W, copied in place."""
        with torch.no_grad():
            self.M.copy_(m)
            self.W.copy_(w)
        self.live = task_id

    def freeze(self) -> None:
        """Store the product of the task in training in the bank, and end its training.

        The biases of outputs that are not open stay 0.
        """
        if self.live is not None:
            with torch.no_grad():
                self.bank[self.live, : self.num_open] = self.product()[0]
            self.live = None

    def task_state(self, task_id: int) -> dict[str, Tensor]:
        """A task's bias ``(K,)``, also of the one in training."""
        if task_id != self.live:
            return super().task_state(task_id)
        row = self.bank.new_zeros(self.bank.shape[1])
        row[: self.num_open] = self.product()[0].detach()
        return {"bank": row}

    def forget(self, task_id: int) -> None:
        """Overwrite a task's bias; M and W are still those of the task that was trained last."""
        super().forget(task_id)
        if self.live is None:
            with torch.no_grad():
                self.M.zero_()
                self.W.zero_()

    def product(self) -> Tensor:
        """M W, or W where there is no M, shape ``(1, K)``, of the open outputs."""
        w: Tensor = self.W
        if self.num_open is not None and self.num_open < w.shape[1]:
            # Contiguous, so that the last bits do not depend on how many outputs are closed.
            w = w[:, : self.num_open].contiguous()
        return self.M @ w if self.M.shape[1] else w

    def forward(self) -> Tensor:
        """The bias of the active task: ``(1, K)``, or ``(batch, K)`` with one task ID per sample."""
        if isinstance(self.active, Tensor):
            biases = self.bank[self.active, : self.num_open]
            if self.live is None:
                return biases
            return torch.where((self.active == self.live)[:, None], self.product(), biases)
        if self.active == self.live:
            return self.product()
        return self.bank[self.active, None, : self.num_open]

    def get_extra_state(self) -> dict[str, int | None]:
        """The task in training."""
        return {"live": self.live}

    def set_extra_state(self, state: dict[str, int | None]) -> None:
        """Restore the task in training."""
        self.live = state["live"]


class Keys(TaskModule):
    r"""The keys of one layer: vectors :math:`k_t \in \{-1, 1\}^n` that its inputs are multiplied by.

    Cheung et al. (2019), https://arxiv.org/abs/1902.05522. They are sampled once and never learned;
    initially they are 1. Signs are exact in every precision.

    Args:
        num_tasks: T, number of tasks of the stream.
        size: n, inputs of the layer.

    State:
        ``bank`` ``(T, n)`` int8, n bytes per task.
    """

    kind: ClassVar[str] = "binary"
    bank: Tensor

    def __init__(self, num_tasks: int, size: int) -> None:
        super().__init__(num_tasks)
        self.register_buffer("bank", torch.ones(num_tasks, size, dtype=torch.int8))

    def grow(self, num_tasks: int) -> None:
        """Make room for more tasks, whose keys are 1, or phases 0, until they are written."""
        before = self.num_tasks
        super().grow(num_tasks)
        self.bank[before:] = 0 if self.bank.is_floating_point() else 1

    def write(self, task_id: int, key: Tensor) -> None:
        """Set the key of a task, ``(n,)``, in place."""
        self.bank[task_id] = key

    def forward(self) -> Tensor:
        """The key of the active task: ``(n,)``, or ``(batch, n)`` with one task ID per sample."""
        return self.bank[self.active]


class KernelKeys(Keys):
    """The keys of a convolution, n = :math:`C_{in} k_h k_w` signs that multiply its weights."""

    per_sample = False

    def switch(self, task: int | Tensor) -> None:
        """Activate the key of a task.

        Raises:
            TypeError: one task ID per sample is given; the network runs such batches task by task.
        """
        if isinstance(task, Tensor):
            raise TypeError("A convolution with keys needs one task ID for the whole batch.")
        super().switch(task)


class ComplexKeys(Keys):
    r"""The keys of a complex layer, :math:`k_t = e^{i \varphi_t}`, stored as phases, initially 0.

    State:
        ``bank`` ``(T, n)``, phases in radians, 4 n bytes per task.
    """

    kind = "complex"

    def __init__(self, num_tasks: int, size: int) -> None:
        super().__init__(num_tasks, size)
        self.bank = torch.zeros(num_tasks, size)


class SwitchableLinear(nn.Linear):
    r"""A linear layer with keys, bias units, adapters: :math:`y = W (x \odot k_t) + b + \mathrm{BIAS}_t`.

    Alg. 3 of Wen et al.; without keys it is their Eq. 1. :meth:`convert` converts an ``nn.Linear`` in
    place, so its parameters, its name and all references to it remain valid.

    Attributes:
        num_open: the outputs that are computed, from the first on; None: all. Of a head these are the
            columns that are open: the last bits of a product depend on how many outputs it has, so
            columns of tasks to come take no part in it.
    """

    bias_units: BiasUnits | None
    keys: Keys | None
    adapters: nn.ModuleDict | None  # of nn.adapters, by kind
    num_open: int | None = None

    @staticmethod
    def convert(
        layer: nn.Linear, bias_units: BiasUnits | None = None, keys: Keys | None = None
    ) -> "SwitchableLinear":
        """Add bias units or keys to a linear layer, keeping those that it has."""
        if not isinstance(layer, SwitchableLinear):
            kind = type(layer)  # a parametrized layer has its own class, which computes the weight
            layer.__class__ = (
                type(kind.__name__, (SwitchableLinear, kind), {})
                if is_parametrized(layer)
                else SwitchableLinear
            )
            for part in ("bias_units", "keys", "adapters"):
                layer.register_module(part, None)
        assert isinstance(layer, SwitchableLinear)
        if bias_units is not None:
            bias_units.num_open = layer.num_open
            layer.bias_units = bias_units.to(layer.weight.device)
        if keys is not None:
            layer.keys = keys.to(layer.weight)
        return layer

    def open_outputs(self, number: int | None) -> None:
        """Compute so many outputs from now on; None: all."""
        self.num_open = number
        if self.bias_units is not None:
            self.bias_units.num_open = number

    def _opened(self, tensor: Tensor) -> Tensor:
        """The rows of the open outputs, of a weight or a bias."""
        number = self.num_open
        return tensor if number is None or number == len(tensor) else tensor[:number]

    def effective_input(self, input: Tensor) -> Tensor:
        """The input of the weights: multiplied by the key, if any."""
        keys = self.keys
        return input if keys is None else input * _aligned(keys(), input)

    def forward(self, input: Tensor) -> Tensor:
        """The outputs ``(batch, ..., out)`` of inputs ``(batch, ..., in)``; of the open ones."""
        return self._biased(self.effective_input(input), self._opened(self.weight))

    @staticmethod
    def aligned(values: Tensor, output: Tensor) -> Tensor:
        """``(batch, K)`` numbers that broadcast over outputs ``(batch, ..., K)``."""
        return _aligned(values, output)

    def _biased(self, effective: Tensor, weight: Tensor) -> Tensor:
        """The linear map, with the layer's own bias and the active task's."""
        units = self.bias_units
        own = None if self.bias is None else self._opened(self.bias)
        if self.adapters is not None:
            output = F.linear(effective, weight, own)
            for adapter in self.adapters.values():
                output = adapter(self, effective, output)
            return output if units is None else output + self.aligned(units(), output)
        if units is None:
            return F.linear(effective, weight, own)
        shift: Tensor = units()
        if shift.shape[0] == 1:  # len() would fix the batch size when a network is exported
            # Adding two vectors of size K before the product is cheaper than adding to a batch after it.
            # Keep shape (1, K): indexing the row would add another backward operation.
            bias = shift if own is None else own + shift
            return F.linear(effective, weight, bias)
        return F.linear(effective, weight, own) + _aligned(shift, effective)


class ComplexLinear(SwitchableLinear):
    r"""A linear layer with complex weights and keys, :math:`y = W (x \odot e^{i \varphi_t}) + b + \mathrm{BIAS}_t`.

    n complex numbers are stored as 2 n real ones, all real parts, then all imaginary parts; elementwise
    operations, such as ReLU or dropout, therefore act on both parts separately. ``weight`` becomes the
    real part of W. All biases are real: they shift the real part of y.

    State:
        ``weight_imag`` ``(out, in)``, the imaginary part of W, a parameter; initially 0.
    """

    keys: Keys
    weight_imag: nn.Parameter
    real_output: bool

    @staticmethod
    def make_complex(layer: nn.Linear, keys: ComplexKeys, real_output: bool) -> "ComplexLinear":
        """Add complex keys and weights to a linear layer.

        Args:
            layer: converted in place.
            keys: of size ``in``.
            real_output: whether to return only the real part of y, as for a head.
        """
        layer = SwitchableLinear.convert(layer, keys=keys)
        imaginary = torch.zeros_like(layer.weight)
        layer.__class__ = ComplexLinear
        assert isinstance(layer, ComplexLinear)
        layer.weight_imag = nn.Parameter(imaginary, layer.weight.requires_grad)
        layer.real_output = real_output
        return layer

    def effective_input(self, input: Tensor) -> Tensor:
        """The input of the weights, ``(batch, ..., 2 in)``, from real ``in`` or complex ``2 in``."""
        phases = _aligned(self.keys(), input)
        cos, sin = phases.cos(), phases.sin()
        if input.shape[-1] == self.in_features:
            return torch.cat([input * cos, input * sin], -1)
        real, imaginary = input.chunk(2, -1)
        return torch.cat([real * cos - imaginary * sin, real * sin + imaginary * cos], -1)

    def forward(self, input: Tensor) -> Tensor:
        """Real ``(batch, ..., in)`` or complex ``2 in`` inputs to real ``out`` or complex ``2 out`` outputs."""
        effective = self.effective_input(input)
        weight, weight_imag = self._opened(self.weight), self._opened(self.weight_imag)
        real = self._biased(effective, torch.cat([weight, -weight_imag], 1))
        if self.real_output:
            return real
        imaginary = F.linear(effective, torch.cat([weight_imag, weight], 1))
        return torch.cat([real, imaginary], -1)


def is_linear(part: nn.Module) -> bool:
    """Whether a module is a linear layer, switchable or not, with a parametrized weight or not.

    Checks the exact type: a subclass may override forward, or never call it.
    """
    kind = type(part)
    if is_parametrized(part):
        kind = kind.__bases__[0]
    return kind in (nn.Linear, SwitchableLinear, ComplexLinear)


def _aligned(vectors: Tensor, input: Tensor) -> Tensor:
    """Reshape ``(batch, size)`` to broadcast over ``(batch, ..., size)``; ``(size,)`` is unchanged."""
    if vectors.dim() == 1:
        return vectors
    return vectors.reshape(vectors.shape[0], *(1,) * (input.dim() - 2), vectors.shape[1])


def effective_input(layer: nn.Module, input: Tensor) -> Tensor:
    """The input of a layer's weights: multiplied by the key if the layer has keys."""
    return layer.effective_input(input) if isinstance(layer, SwitchableLinear) else input


def full_precision(value: Tensor) -> Tensor:
    """Convert half precision to float32, for logarithms and sums."""
    return value.to(torch.promote_types(value.dtype, torch.float32))


@contextmanager
def evaluation_mode(module: nn.Module) -> Iterator[None]:
    """Put a module into evaluation mode, and restore the flag of each submodule afterwards."""
    flags = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, training in flags:
            part.training = training
