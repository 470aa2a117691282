"""The biases of all layers in one table, so that a batch that mixes tasks looks them up once."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from bpn_lightning.nn.layers import BiasUnits, ComplexLinear, SwitchableLinear

__all__ = ["GatheredBanks"]


@dataclass(frozen=True)
class GatheredBanks:
    """One table of biases, of which every layer's bank is a part.

    Args:
        table: ``(tasks, sum of the layers' outputs)``.
        places: of each layer's units: their name, first column and the one after the last.
    """

    table: Tensor
    places: tuple[tuple[str, int, int], ...]

    @classmethod
    def of(cls, network: nn.Module) -> "GatheredBanks | None":
        """Gather the banks of a network, in place; None where it has none.

        A linear layer's own bias is added to its rows and taken off the layer: that is the sum that the
        layer would make for one task.
        """
        units = [(name, p) for name, p in network.named_modules() if isinstance(p, BiasUnits)]
        if not units or len({part.bank.dtype for _, part in units}) > 1:
            return None
        for name, part in units:
            owner = network.get_submodule(name.rpartition(".")[0])
            if isinstance(owner, SwitchableLinear) and _can_give_its_bias(owner):
                part.bank += owner.bias.detach()
                owner.bias = None  # type: ignore[assignment]
        table = torch.cat([part.bank for _, part in units], 1)
        places, first = [], 0
        for name, part in units:
            stop = first + part.bank.shape[1]
            part.bank = table[:, first:stop]
            places.append((name, first, stop))
            first = stop
        return cls(table, tuple(places))

    @contextmanager
    def looked_up(self, network: nn.Module, tasks: Tensor) -> Iterator[None]:
        """Whatever a network computes inside uses these rows of the table.

        Args:
            network: whose units have the places' names.
            tasks: ``(batch,)`` int64, rows of the table.
        """
        rows = self.table.index_select(0, tasks)
        units = [network.get_submodule(name) for name, _, _ in self.places]
        for part, (_, first, stop) in zip(units, self.places, strict=True):
            part.rows = rows[:, first:stop]
        try:
            yield
        finally:
            for part in units:
                part.rows = None  # type: ignore[assignment]


def _can_give_its_bias(layer: SwitchableLinear) -> bool:
    plain = type(layer) is SwitchableLinear and not is_parametrized(layer)
    return (
        plain
        and not isinstance(layer, ComplexLinear)
        and layer.adapters is None
        and layer.bias is not None
    )
