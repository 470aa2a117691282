"""A bundle's network as plain modules of tensors in and tensors out: what ``torch.export`` and ONNX take."""

import copy

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from bpn_lightning.modes.snapshot import Snapshot
from bpn_lightning.nn.answering import AnsweringNetwork
from bpn_lightning.nn.inference import closed_columns_added
from bpn_lightning.nn.layers import BiasUnits, SwitchableLinear, TaskModule

__all__ = ["OUTSIDE", "BaseGraph", "MixedGraph", "copied", "rows_outside", "tables_of"]

OUTSIDE = "outside"


class _Graph(nn.Module):
    """A copy of a bundle's network, all of whose columns are open."""

    def __init__(self, now: Snapshot) -> None:
        super().__init__()
        self.network = copied(now)
        self.network.built_head.open_outputs(None)

    def logits(self, inputs: Tensor) -> Tensor:
        """Prepared inputs to logits of all columns, in the mode that holds."""
        network = self.network
        if network.front is not None:
            inputs = network.front.standardized(inputs)
        head = network.built_head
        found: Tensor = head(network.backbone(inputs))
        return closed_columns_added(found, head.out_features)


class MixedGraph(_Graph):
    """Prepared inputs and task IDs to logits; NaN for IDs that are none."""

    places: Tensor

    def __init__(self, now: Snapshot) -> None:
        super().__init__(now)
        self.register_buffer("places", now.places_by_id.cpu())
        self.register_buffer(OUTSIDE, None if now.outside is None else rows_outside(now))
        self.parts = [part for part in self.network.modules() if isinstance(part, TaskModule)]
        for layer in self.network.modules():
            if isinstance(layer, SwitchableLinear):
                _give_bias_to_rows(layer)

    def forward(self, inputs: Tensor, tasks: Tensor) -> Tensor:
        """Logits ``(batch, num_classes)`` of inputs ``(batch, ...)`` in the modes of ``(batch,)`` task IDs."""
        inside = (tasks >= 0) & (tasks < len(self.places))
        places = self.places[torch.where(inside, tasks, 0)]
        inside = inside & (places >= 0)
        places = torch.where(inside, places, 0)
        for part in self.parts:
            part.switch(places)
        logits = self.logits(inputs)
        outside: Tensor | None = getattr(self, OUTSIDE)
        if outside is not None:
            logits = logits + outside[places]
        return logits.masked_fill(~inside[:, None], float("nan"))


def _give_bias_to_rows(layer: SwitchableLinear) -> None:
    """Add a layer's own bias to those of all tasks, so that a product and its biases are one operation."""
    units, own = layer.bias_units, layer.bias
    if units is None or own is None or layer.adapters is not None or is_parametrized(layer):
        return
    units.bank = units.bank + own.detach()
    layer.bias = None  # type: ignore[assignment]


class BaseGraph(_Graph):
    """Prepared inputs, 0 or -inf for each column, and biases of one task for each layer, to logits."""

    def __init__(self, now: Snapshot) -> None:
        super().__init__(now)
        self.units = [part for part in self.network.modules() if isinstance(part, BiasUnits)]
        for part in self.units:
            part.switch(0)

    def forward(self, inputs: Tensor, outside: Tensor, *rows: Tensor) -> Tensor:
        """Logits ``(batch, num_classes)``; ``outside`` ``(1, num_classes)``, ``rows`` ``(1, outputs)``."""
        banks = [part.bank for part in self.units]
        try:
            for part, row in zip(self.units, rows, strict=True):
                part.bank = row
            return self.logits(inputs) + outside
        finally:
            for part, bank in zip(self.units, banks, strict=True):
                part.bank = bank


def copied(now: Snapshot) -> AnsweringNetwork:
    """A copy of a bundle's network on the CPU."""
    network = copy.deepcopy(now.network).cpu()
    return network.requires_grad_(False).eval()


def rows_outside(now: Snapshot) -> Tensor:
    """0, or -inf for the columns that take no part in a task's mode, ``(tasks, num_classes)``."""
    zeros = torch.zeros(len(now.names), now.structure.num_classes)
    found = now.outside
    return zeros if found is None else zeros.masked_fill(found.cpu(), float("-inf"))


def tables_of(now: Snapshot) -> dict[str, Tensor]:
    """What :class:`BaseGraph` takes of tasks, by name, each ``(tasks, ...)``."""
    units = {n: part for n, part in now.network.named_modules() if isinstance(part, BiasUnits)}
    return {OUTSIDE: rows_outside(now), **{name: part.bank.cpu() for name, part in units.items()}}
