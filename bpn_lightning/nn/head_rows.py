"""Rows of the head in what strategies hold by the names of parameters."""

from collections.abc import Mapping

from torch import Tensor

__all__ = ["without_rows"]

PARAMETERS = ("head.weight", "head.bias", "head.weight_imag")
"""Whose first dimension is the head's output units."""


def without_rows(tensors: Mapping[str, Tensor], rows: slice) -> dict[str, Tensor]:
    """Tensors by the names of parameters, with 0 in these rows of the head's; others are the same objects.

    >>> import torch
    >>> without_rows({"head.bias": torch.ones(3)}, slice(0, 2))
    {'head.bias': tensor([0., 0., 1.])}
    """
    found = dict(tensors)
    for name in PARAMETERS:
        if name in found:
            found[name] = found[name].clone()
            found[name][rows] = 0
    return found
