"""Merged weights in the place of those of training, from a task's end until the next one starts."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

__all__ = ["MergedWeights"]


class MergedWeights:
    """Swaps a strategy's merged weights into a network, and those of training back.

    Attributes:
        training: by name, the weights of training while merged ones are in their place; else empty.

    State: ``training``, one tensor for each merged one, of the same shape.
    """

    def __init__(self) -> None:
        self.training: dict[str, Tensor] = {}

    def swap_in(self, network: nn.Module, merged: Mapping[str, Tensor]) -> None:
        """Put weights, by their names in ``network.state_dict()``, in the place of those of training."""
        parts = network.state_dict()
        self.training = {name: parts[name].clone() for name in merged}
        _copy(network, merged)

    def swap_out(self, network: nn.Module) -> None:
        """Put the weights of training back, if others are in their place."""
        _copy(network, self.training)
        self.training = {}


def _copy(network: nn.Module, weights: Mapping[str, Tensor]) -> None:
    parts = network.state_dict() if weights else {}
    with torch.no_grad():
        for name, value in weights.items():
            parts[name].copy_(value)
