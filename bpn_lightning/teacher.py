"""A snapshot of the network, to run on the samples of later tasks: for any strategy that distills.

:meth:`Teacher.snapshot` copies the shared weights; :meth:`Teacher.forward` runs them in the current mode.
Save its ``tensors`` in the strategy's ``state_dict``, and call its ``to`` in ``move_state``.
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
    """The outputs of a network for a batch.

    Attributes:
        logits: ``(batch, all classes)``, before the mask.
        features: ``(batch, features)`` of one of its layers; None unless requested.
    """

    logits: Tensor
    features: Tensor | None = None


def concatenated_heads(outputs: Sequence[Outputs], heads: Sequence[Columns]) -> Tensor:
    """The logits of all heads, ``(batch, classes)``, from shared outputs or from one per task mode."""
    logits = [one.logits for one in outputs]
    if len(logits) == 1:
        if all(left[1] == right[0] for left, right in pairwise(heads)):
            return logits[0][:, heads[0][0] : heads[-1][1]]
        logits = logits * len(heads)
    return torch.cat([z[:, first:stop] for z, (first, stop) in zip(logits, heads, strict=True)], 1)


class _Unmasked(nn.Module):
    """A module's backbone and head, under the same names, without the mask."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.backbone = module.get_submodule("backbone")
        self.head = module.get_submodule("head")

    def forward(self, inputs: Tensor) -> Tensor:
        """The logits of a batch, ``(batch, all classes)``."""
        head = cast(nn.Linear, self.head)
        if inputs.is_floating_point():  # like the module, whose weights may be in half precision
            inputs = inputs.to(head.weight.dtype)
        logits: Tensor = head(self.backbone(inputs))
        return logits


def _run(
    network: _Unmasked, tensors: Mapping[str, Tensor], inputs: Tensor, layer: str | None
) -> Outputs:
    """Call a network with some of its tensors replaced, in the current mode."""
    features: list[Tensor] = []

    def note(_: nn.Module, __: Any, output: Tensor) -> None:
        features.append(output.flatten(1).clone())  # the next layer may be in-place

    handle = network.get_submodule(layer).register_forward_hook(note) if layer else None
    try:
        logits: Tensor = functional_call(network, dict(tensors), (inputs,))
    finally:
        if handle is not None:
            handle.remove()
    return Outputs(logits, *features[-1:])  # another strategy's hook may call the layer too


def _shared(host: ContinualHost, named: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """Select the network's tensors that do not belong to a single task, by name."""
    parts = [part for part in host.network.modules() if isinstance(part, TaskModule)]
    own = {id(tensor) for part in parts for tensor in chain(part.parameters(), part.buffers())}
    return {
        name: tensor
        for name, tensor in named
        if name.startswith(("backbone.", "head.")) and id(tensor) not in own
    }


class Teacher:
    """A snapshot of the network.

    State:
        ``tensors``: shared weights and float buffers by name, 4 bytes per number; never a copy of the
        module with its hooks. Tensors of a single task, such as frozen biases and keys, no longer
        change and are taken from the network.
    """

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}

    def __bool__(self) -> bool:
        return bool(self.tensors)

    @staticmethod
    def state(host: ContinualHost) -> dict[str, Tensor]:
        """The tensors of a snapshot, including frozen weights, which may be unfrozen later."""
        network = host.network
        tensors = _shared(host, chain(network.named_parameters(), network.named_buffers()))
        return {name: t.detach() for name, t in tensors.items() if t.is_floating_point()}

    def snapshot(self, host: ContinualHost) -> None:
        """Copy the current state of the network."""
        self.tensors = {name: tensor.clone() for name, tensor in self.state(host).items()}

    @torch.no_grad()
    def forward(self, host: ContinualHost, inputs: Tensor, layer: str | None = None) -> Outputs:
        """The snapshot's outputs in the current mode, without dropout and with its running statistics.

        Args:
            host: the module of which the snapshot was taken.
            inputs: ``(batch, ...)``, preprocessed.
            layer: name of the layer whose features are returned too.

        Raises:
            ConfigurationError: there is no snapshot yet.
        """
        if not self.tensors:
            raise ConfigurationError(
                "Expected a snapshot before the teacher is run, but none was taken. Call snapshot at the "
                "start of the second task; in the first task there is nothing to distill."
            )
        network = _Unmasked(host.network)
        with evaluation_mode(network):
            return _run(network, self.tensors, inputs, layer)

    def to(self, device: torch.device) -> None:
        """Move to a device."""
        self.tensors = {name: tensor.to(device) for name, tensor in self.tensors.items()}


def student_outputs(host: ContinualHost, inputs: Tensor, layer: str | None = None) -> Outputs:
    """The outputs of the network in training, without updating its running statistics."""
    network = _Unmasked(host.network)
    buffers = {n: buffer.clone() for n, buffer in _shared(host, network.named_buffers()).items()}
    return _run(network, buffers, inputs, layer)
