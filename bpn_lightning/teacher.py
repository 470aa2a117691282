"""A network as it was, to be run on the samples of later tasks: for any strategy that distills.

:meth:`Teacher.snapshot` copies what tasks share; :meth:`Teacher.forward` runs it in the mode that holds. Its
``tensors`` belong into the strategy's ``state_dict``, its ``to`` into ``move_state``.
"""

from collections.abc import Iterable, Mapping, Sequence
from itertools import chain, pairwise
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call

from bpn_lightning.errors import ConfigurationError
from bpn_lightning.host import ContinualHost
from bpn_lightning.nn.layers import TaskModule, evaluation_mode

__all__ = ["Columns", "Outputs", "Teacher", "concatenated_heads", "student_outputs"]

Columns = tuple[int, int]


class Outputs(NamedTuple):
    """What a network puts out for a batch.

    Attributes:
        logits: ``(batch, all columns)``, whatever the mask.
        features: ``(batch, features)`` of one of its layers, None unless asked for.
    """

    logits: Tensor
    features: Tensor | None = None


def concatenated_heads(outputs: Sequence[Outputs], heads: Sequence[Columns]) -> Tensor:
    """The output units of each head, all from the same outputs or each from its own, in its task's mode."""
    logits = [one.logits for one in outputs]
    if len(logits) == 1:
        if all(left[1] == right[0] for left, right in pairwise(heads)):
            return logits[0][:, heads[0][0] : heads[-1][1]]
        logits = logits * len(heads)
    return torch.cat([z[:, first:stop] for z, (first, stop) in zip(logits, heads, strict=True)], 1)


class _Unmasked(nn.Module):
    """A module's backbone and head, by their names in it, without its mask."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.backbone = module.get_submodule("backbone")
        self.head = module.get_submodule("head")

    def forward(self, inputs: Tensor) -> Tensor:
        """``(batch, ...)`` to ``(batch, all columns)``."""
        head = cast(nn.Linear, self.head)
        if inputs.is_floating_point():  # as the module does, whose weights may be in low precision
            inputs = inputs.to(head.weight.dtype)
        logits: Tensor = head(self.backbone(inputs))
        return logits


def _run(
    network: _Unmasked, tensors: Mapping[str, Tensor], inputs: Tensor, layer: str | None
) -> Outputs:
    """Call a network with some of its tensors replaced, in the mode that holds."""
    features: list[Tensor] = []

    def note(_: nn.Module, __: Any, output: Tensor) -> None:
        features.append(output.flatten(1).clone())  # the next layer may write into it

    handle = network.get_submodule(layer).register_forward_hook(note) if layer else None
    try:
        logits: Tensor = functional_call(network, dict(tensors), (inputs,))
    finally:
        if handle is not None:
            handle.remove()
    return Outputs(logits, *features[-1:])  # another strategy's hook may have called the layer too


def _shared(host: ContinualHost, named: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """Of some tensors of the module by name, those of the network that belong to no one task."""
    parts = [part for part in host.network.modules() if isinstance(part, TaskModule)]
    own = {id(tensor) for part in parts for tensor in chain(part.parameters(), part.buffers())}
    return {
        name: tensor
        for name, tensor in named
        if name.startswith(("backbone.", "head.")) and id(tensor) not in own
    }


class Teacher:
    """The network as it was when its snapshot was taken.

    State:
        ``tensors``: shared weights and float buffers by name, 4 bytes per number; never a copy of the
        module with its hooks. What belongs to one task, such as frozen biases and keys, does not
        change any more and is the network's own.
    """

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}

    def __bool__(self) -> bool:
        return bool(self.tensors)

    @staticmethod
    def state(host: ContinualHost) -> dict[str, Tensor]:
        """What a teacher keeps of a network; frozen weights too, as they may be set free later."""
        network = host.network
        tensors = _shared(host, chain(network.named_parameters(), network.named_buffers()))
        return {name: t.detach() for name, t in tensors.items() if t.is_floating_point()}

    def snapshot(self, host: ContinualHost) -> None:
        """Become what the network is now."""
        self.tensors = {name: tensor.clone() for name, tensor in self.state(host).items()}

    @torch.no_grad()
    def forward(self, host: ContinualHost, inputs: Tensor, layer: str | None = None) -> Outputs:
        """Its outputs in the mode that holds: no dropout, running statistics as they were.

        Args:
            host: the module that it is the past of.
            inputs: ``(batch, ...)``, prepared.
            layer: whose features to note, by name within the module.

        Raises:
            ConfigurationError: no snapshot was taken yet.
        """
        if not self.tensors:
            raise ConfigurationError(
                "Expected a teacher to be run after a first task, but no task is learned yet. The "
                "first task has nothing to be distilled: run it from the second task's start on."
            )
        network = _Unmasked(host.network)
        with evaluation_mode(network):
            return _run(network, self.tensors, inputs, layer)

    def to(self, device: torch.device) -> None:
        """Move to a device."""
        self.tensors = {name: tensor.to(device) for name, tensor in self.tensors.items()}


def student_outputs(host: ContinualHost, inputs: Tensor, layer: str | None = None) -> Outputs:
    """The outputs of the network as it trains, once more: its running statistics stay those of its own task."""
    network = _Unmasked(host.network)
    buffers = {n: buffer.clone() for n, buffer in _shared(host, network.named_buffers()).items()}
    return _run(network, buffers, inputs, layer)
