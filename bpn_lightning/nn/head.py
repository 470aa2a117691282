"""The head of a network: one linear layer whose rows, one for each class, are drawn by column."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from bpn_lightning.nn.growing import grown
from bpn_lightning.nn.layers import SwitchableLinear
from bpn_lightning.random_state import seeded_generator

__all__ = ["draw_rows", "empty_head", "grow_head", "without_rows"]

BY_COLUMN = ("head.weight", "head.bias", "head.weight_imag")
"""Whose first dimension is the head's output units."""


def empty_head(
    features: int, num_classes: int, device: torch.device | str = "cpu"
) -> SwitchableLinear:
    """A head whose weights are not set, without random draws.

    Args:
        features: width of its input.
        num_classes: output units.
        device: where its weights lie.
    """
    head: nn.Linear = nn.utils.skip_init(  # type: ignore[no-untyped-call]
        nn.Linear, features, num_classes, device=device
    )
    return SwitchableLinear.convert(head)


def draw_rows(head: nn.Linear, seed: int, columns: Iterable[int]) -> None:
    r"""Draw rows of a head, :math:`N(0, 1 / \text{features})`, and set their biases to 0.

    A row depends on the seed and its column alone: a head of more classes has the same rows, and more.

    Args:
        head: written in place.
        seed: of the stream.
        columns: which rows.
    """
    scale = head.in_features**-0.5
    with torch.no_grad():
        for column in columns:
            generator = seeded_generator("head", seed, column)
            head.weight[column] = torch.randn(head.in_features, generator=generator) * scale
            head.bias[column] = 0


def grow_head(head: SwitchableLinear, num_classes: int, seed: int) -> None:
    """Give a head more output units, in place: rows are drawn by :func:`draw_rows`, biases are 0.

    Args:
        head: its parameters become others.
        num_classes: output units from now on.
        seed: of the stream.
    """
    first = head.out_features
    for name, parameter in list(head.named_parameters(recurse=False)):
        larger = parameter.new_zeros(num_classes, *parameter.shape[1:])
        setattr(head, name, nn.Parameter(grown(parameter, larger), parameter.requires_grad))
    head.out_features = num_classes
    draw_rows(head, seed, range(first, num_classes))
    if head.bias_units is not None:
        head.bias_units.widen(num_classes)


def without_rows(tensors: Mapping[str, Tensor], rows: slice) -> dict[str, Tensor]:
    """Tensors by the names of parameters, with 0 in these rows of the head's; others are the same objects.

    >>> import torch
    >>> without_rows({"head.bias": torch.ones(3)}, slice(0, 2))
    {'head.bias': tensor([0., 0., 1.])}
    """
    found = dict(tensors)
    for name in BY_COLUMN:
        if name in found:
            found[name] = found[name].clone()
            found[name][rows] = 0
    return found
