"""What the layers have of a task as one tensor, whose parts a bundle names once for all tasks.

A safetensors file has a name, a type, a shape and offsets for each tensor: of a small task that is mostly
words. Rows of the head are not among the parts, as their number is the task's; the others' shapes are those
of the shared weights, so bundles of one base have one layout.
"""

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

__all__ = ["Layout", "layout_of", "packed", "unpacked"]

Layout = Sequence[Sequence[Any]]
"""The name and the shape of each part."""

ROWS = "rows"
_APART = ("head.", "weight_bank.")


def layout_of(tasks: Sequence[Mapping[str, Tensor]]) -> Layout:
    """The layout of tasks; empty where they differ in more than rows of the head."""
    found = [{n: v for n, v in part.items() if not n.startswith(_APART)} for part in tasks]
    layouts = [[[n, list(v.shape)] for n, v in sorted(part.items())] for part in found]
    types = {value.dtype for part in found for value in part.values()}
    return layouts[0] if len(types) == 1 and all(one == layouts[0] for one in layouts) else []


def packed(tensors: Mapping[str, Tensor], layout: Layout) -> Mapping[str, Tensor]:
    """Tensors of a task, those of the layout as one."""
    if not layout:
        return tensors
    names = [name for name, _ in layout]
    rows = torch.cat([tensors[name].detach().cpu().flatten() for name in names])
    return {ROWS: rows, **{name: v for name, v in tensors.items() if name not in names}}


def unpacked(tensors: Mapping[str, Tensor], layout: Layout) -> dict[str, Tensor]:
    """The inverse of :func:`packed`, of what files say; parts are views.

    Raises:
        ValueError: there are more or fewer numbers than the layout says.
    """
    if not layout:
        return dict(tensors)
    shapes = {str(name): [int(size) for size in shape] for name, shape in layout}
    sizes = [prod(shape) for shape in shapes.values()]
    rows = tensors[ROWS].flatten()
    if sum(sizes) != len(rows) or any(size < 0 for shape in shapes.values() for size in shape):
        raise ValueError(f"{len(rows):,} numbers of a task where the layout has {sum(sizes):,}")
    parts = zip(shapes.items(), torch.split(rows, sizes), strict=True)
    found = {name: part.view(shape) for (name, shape), part in parts}
    return {**found, **{name: value for name, value in tensors.items() if name != ROWS}}
