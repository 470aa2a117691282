"""What a search varies: ranges and choices of keys, read from YAML and checked."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any

from bpn_lightning.checks import check_positive_int
from bpn_lightning.errors import ConfigurationError, did_you_mean
from bpn_lightning.run.tuning import Value, is_plain

__all__ = ["Choices", "Range", "Space", "grid_points", "read_space"]

_RANGE_KEYS = ("low", "high", "log", "points")

POINTS = 5
"""Of a range in the built-in grid, unless it says otherwise."""


@dataclass(frozen=True)
class Range:
    """Numbers from ``low`` to ``high``, both included; whole numbers where both are.

    Args:
        low: the smallest value.
        high: the largest one, above ``low``.
        log: whether their logarithms are spread evenly.
        points: values of the built-in grid, from end to end.
    """

    low: int | float
    high: int | float
    log: bool = False
    points: int = POINTS

    @property
    def whole(self) -> bool:
        """Whether all its values are whole numbers."""
        return isinstance(self.low, int) and isinstance(self.high, int)

    def values(self) -> list[Value]:
        """The grid's, each once.

        >>> Range(0.01, 1.0, log=True, points=3).values(), Range(1, 4, points=9).values()
        ([0.01, 0.1, 1.0], [1, 2, 3, 4])
        """
        low, high = self.low, self.high
        steps = [step / max(self.points - 1, 1) for step in range(self.points)]
        if self.log:
            found = [low * (high / low) ** step for step in steps]
        else:
            found = [low + (high - low) * step for step in steps]
        if self.whole:
            return list(dict.fromkeys(round(value) for value in found))
        # What 0.1 * 10 ** 0.5 lacks in digits is no other setting.
        return list(dict.fromkeys(float(f"{value:.12g}") for value in found))

    def record(self) -> dict[str, Any]:
        """For tuning.json."""
        return dict(vars(self))


@dataclass(frozen=True)
class Choices:
    """Some values, in no order."""

    choices: tuple[Value, ...]

    def values(self) -> list[Value]:
        """All of them."""
        return list(self.choices)

    def record(self) -> dict[str, Any]:
        """For tuning.json."""
        return {"choices": list(self.choices)}


Space = Mapping[str, Range | Choices]


def read_space(content: Any, where: str) -> dict[str, Range | Choices]:
    """Read the ranges and choices of some keys.

    Args:
        content: of the YAML: by key, a list of choices or a mapping with low and high.
        where: for messages.

    Raises:
        ConfigurationError: the space is empty, or a range or choice is none; names the key.
    """
    if not isinstance(content, dict) or not content:
        raise ConfigurationError(
            f"Expected space of {where} to name at least one key and its values, but got {content!r:.80}. Write "
            "{strategies.bd.epsilon: {low: 0.01, high: 1.0, log: true}}."
        )
    return {str(key): _read(key, value, where) for key, value in content.items()}


def grid_points(space: Space) -> list[dict[str, Value]]:
    """All combinations of the grid's values; the last key varies fastest.

    >>> grid_points({"a": Choices((1, 2)), "b": Choices(("x",))})
    [{'a': 1, 'b': 'x'}, {'a': 2, 'b': 'x'}]
    """
    values = [one.values() for one in space.values()]
    return [dict(zip(space, point, strict=True)) for point in product(*values)]


def _read(key: Any, value: Any, where: str) -> Range | Choices:
    if isinstance(value, list):
        return _choices(key, value, where)
    if not isinstance(value, dict) or not {"low", "high"} <= set(value):
        raise ConfigurationError(
            f"Expected {key} in space of {where} to be a list of choices or a range with low and high, but got "
            f"{value!r:.80}. Write [1, 10] or {{low: 1, high: 10}}."
        )
    for name in value:
        if name not in _RANGE_KEYS:
            raise ConfigurationError(
                f"Expected a range of {where} to have {', '.join(_RANGE_KEYS)}, but {key} has {name!r}."
                f"{did_you_mean(str(name), _RANGE_KEYS)}"
            )
    found = Range(value["low"], value["high"], value.get("log", False), value.get("points", POINTS))
    check_positive_int(f"points of {key} in space of {where}", found.points, "Leave it out for 5.")
    if type(found.log) is not bool:
        raise ConfigurationError(
            f"Expected log of {key} in space of {where} to be true or false, but got {found.log!r:.80}."
        )
    numbers = all(
        type(end) in (int, float) and math.isfinite(end) for end in (found.low, found.high)
    )
    if not numbers or not found.low < found.high:
        raise ConfigurationError(
            f"Expected low of {key} in space of {where} to be a number below high, but got low {found.low!r:.80} and high "
            f"{found.high!r:.80}. Exchange them, or write a list of choices. (YAML reads 1e-3 as a text: write 1.0e-3.)"
        )
    if found.log and found.low <= 0:
        raise ConfigurationError(
            f"Expected low of {key} in space of {where} to be above 0 where log is true, but got {found.low}. Raise it, "
            "or leave log out."
        )
    return found


def _choices(key: Any, value: list[Any], where: str) -> Choices:
    if not value:
        raise ConfigurationError(
            f"Expected {key} in space of {where} to have at least one choice, but got []. Add values."
        )
    for choice in value:
        if not is_plain(choice) or value.count(choice) > 1:
            raise ConfigurationError(
                f"Expected the choices of {key} in space of {where} to be numbers, booleans or plain words, each once, but "
                f"got {choice!r:.80}. Name classes in `set:` instead."
            )
    return Choices(tuple(value))
