"""Layers one after another, computed from their tensors: small networks spend a fifth of their time in modules."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bpn_lightning.nn.answering import AnsweringNetwork
from bpn_lightning.nn.backbones import MLP
from bpn_lightning.nn.inference import closed_columns_added
from bpn_lightning.nn.layers import SwitchableLinear

__all__ = ["Chain"]

Step = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class _Linear:
    """A linear layer whose tasks have biases: ``bank`` ``(tasks, outputs)``, ``weight`` transposed."""

    bank: Tensor
    bias: Tensor | None
    weight: Tensor

    def of_one(self, inputs: Tensor, place: int, count: int | None = None) -> Tensor:
        """In the mode of a task; its first outputs, or all."""
        row = self.bank[place, :count]
        row = row if self.bias is None else row + self.bias[:count]
        return F.linear(inputs, self.weight.t()[:count], row)

    def of_each(self, inputs: Tensor, places: Tensor) -> Tensor:
        """In the mode of each sample's task."""
        rows = self.bank.index_select(0, places)
        if self.bias is not None:
            rows.add_(self.bias)
        if inputs.dim() == 2:  # into the memory of the rows, which is new
            return rows.addmm_(inputs, self.weight)
        return F.linear(inputs, self.weight.t()) + SwitchableLinear.aligned(rows, inputs)


@dataclass(frozen=True)
class Chain:
    """What a network computes in the modes of tasks, without a mode that holds: threads may share it.

    Args:
        steps: in their order; what is no linear layer with biases of tasks has nothing of a task.
        num_classes: columns of the logits.
        stops: of each task, where its columns end, if tasks have their own: products of another width are
            rounded differently, and a task has to answer bit for bit as before another one was added.
    """

    steps: Sequence["_Linear | Step"]
    num_classes: int
    stops: Sequence[int] = ()

    @classmethod
    def of(cls, network: AnsweringNetwork) -> "Chain | None":
        """The chain that a network is; None where it is something else.

        Args:
            network: whose tensors the chain shares; the mode that holds is that of the task that was opened last.
        """
        backbone, head = network.backbone, network.built_head
        if type(backbone) not in (nn.Sequential, MLP) or _hooked(backbone):
            return None
        count = head.out_features if network.mask == "task" else network.num_open
        steps: list[_Linear | Step] = []
        for layer in [*backbone.children(), head]:
            step = _step(layer, count if layer is head else None)
            if step is None:
                return None
            if (
                type(layer) is nn.ReLU
                and steps
                and isinstance(steps[-1], _Linear)
                and not _hooked(layer)
            ):
                step = torch.relu_  # what a linear layer gives is new
            steps.append(step)
        stops: list[int] = []
        if network.mask == "task":
            stops = [network.columns(place)[1] for place in range(len(network.structure.tasks))]
        return cls(steps, head.out_features, stops)

    def __call__(self, inputs: Tensor, places: int | Tensor) -> Tensor:
        """Logits ``(batch, num_classes)``, -inf for closed columns, of one task's mode or that of each sample."""
        found: Any = inputs
        for step in self.steps:
            count = self.stops[places] if self.stops and isinstance(places, int) else None
            count = count if step is self.steps[-1] else None
            if not isinstance(step, _Linear):
                found = step(found) if count is None else _first_outputs(step, found, count)
            elif isinstance(places, int):
                found = step.of_one(found, places, count)
            else:
                found = step.of_each(found, places)
        return closed_columns_added(found, self.num_classes)


def _step(layer: nn.Module, count: int | None) -> "_Linear | Step | None":
    """A layer as a step, with its first outputs or all; None where tasks have something else of it."""
    if type(layer) is SwitchableLinear and layer.bias_units is not None:
        if layer.keys is not None or layer.adapters is not None or _hooked(layer):
            return None
        bias = None if layer.bias is None else layer.bias.detach()[:count]
        weight = layer.weight.detach()[:count].t()
        return _Linear(layer.bias_units.bank[:, :count], bias, weight)
    if isinstance(layer, SwitchableLinear) and count is not None and count < layer.out_features:
        return None
    # Layers of torch remember nothing of an input, so threads may share them.
    known = all(
        type(part) is SwitchableLinear or type(part).__module__.startswith("torch.nn.")
        for part in layer.modules()
    )
    return layer if known else None


def _first_outputs(layer: Any, inputs: Tensor, count: int) -> Tensor:
    """Of a linear layer without modes."""
    weight, bias = cast(Tensor, layer.weight), cast("Tensor | None", layer.bias)
    return F.linear(inputs, weight[:count], None if bias is None else bias[:count])


def _hooked(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)
