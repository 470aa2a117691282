"""Nested values as JSON, with their tensors apart: how files hold states without code.

Mappings, lists, tuples, numbers, strings and None come back as they were, numbers that JSON lacks among them.
"""

from collections.abc import Mapping
from math import isfinite
from typing import Any

from torch import Tensor

from bpn_lightning.errors import ConfigurationError

__all__ = ["put_back", "set_aside"]


def set_aside(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """Convert a state to JSON values; its tensors are moved to ``tensors``, by name.

    >>> import torch
    >>> tensors = {}
    >>> set_aside({"rows": torch.zeros(2), 3: (1, float("inf"))}, "gate", tensors)
    {'items': [['rows', {'tensor': 'gate/rows'}], [3, {'tuple': [1, {'float': 'inf'}]}]]}
    >>> list(tensors)
    ['gate/rows']

    Raises:
        ConfigurationError: a value is of another kind.
    """
    if isinstance(value, Tensor):
        while name in tensors:
            name += "'"
        tensors[name] = value.detach().cpu().contiguous()
        return {"tensor": name}
    if isinstance(value, Mapping):
        parts = [(key, f"{name}/{key}" if name else str(key), part) for key, part in value.items()]
        return {"items": [[key, set_aside(part, place, tensors)] for key, place, part in parts]}
    if isinstance(value, list | tuple):
        found = [set_aside(part, f"{name}/{place}", tensors) for place, part in enumerate(value)]
        return {"tuple": found} if isinstance(value, tuple) else found
    if isinstance(value, float) and not isfinite(value):
        return {"float": repr(value)}
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        return {"int": str(value)}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise ConfigurationError(
        f"Expected a state of tensors and plain values, but {name} is of type {type(value).__name__}. Return "
        "numbers, strings, lists, mappings and tensors from state_dict."
    )


def put_back(value: Any, tensors: dict[str, Tensor]) -> Any:
    """The inverse of :func:`set_aside`; each tensor is used once, so that the state is no larger than its file.

    Raises:
        KeyError: a tensor is not there, or was used.
    """
    if isinstance(value, list):
        return [put_back(part, tensors) for part in value]
    if not isinstance(value, dict):
        return value
    if "tensor" in value:
        return tensors.pop(value["tensor"])
    if "tuple" in value:
        return tuple(put_back(part, tensors) for part in value["tuple"])
    if "float" in value:
        return float(value["float"])
    if "int" in value:
        return int(str(value["int"])[:100])
    return {key: put_back(part, tensors) for key, part in value["items"]}
