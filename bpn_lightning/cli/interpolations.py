"""Checks of the size of a configuration's ``${...}`` interpolations before they are resolved.

Nested interpolations grow exponentially, so a few lines could fill the memory: forty lines of the form
``k1: ${.k0}${.k0}`` expand to 2**40 values. Allowed are the name of another key (``${data.init_args.seed}``,
``${.lr}`` for a sibling, ``${..lr}`` one level up) and of an environment variable (``${oc.env:NAME}``,
``${oc.env:NAME,default}``), without nesting and other resolvers.
"""

import os
import re
from typing import Any

from bpn_lightning.errors import ConfigurationError

__all__ = ["MOST_CHARACTERS", "check_interpolations"]

#: The maximum total size of all interpolations of a configuration; each counts as one more.
MOST_CHARACTERS = 100_000

_KEY = re.compile(r"\$\{(\.*)(\w[\w+-]*(?:\.\w[\w+-]*|\[\w+\])*)\}", re.ASCII)
_VARIABLE = re.compile(r"\$\{oc\.env:(\w+)(?:,([^${}]*))?\}", re.ASCII)
_INDEX = re.compile(r"0|[1-9][0-9]{0,8}", re.ASCII)

_Place = tuple[Any, ...]


def check_interpolations(config: dict[str, Any]) -> None:
    """Refuse interpolations that are unresolvable, circular or too large, without resolving any.

    Args:
        config: the complete configuration in plain types; unknown names are refused.

    Raises:
        ConfigurationError: names the key.
    """
    sizes = _Sizes(config)
    total = 0
    for place, text in _interpolated(config, ()):
        total += sizes.of(place, text)
        if total > MOST_CHARACTERS:
            raise ConfigurationError(
                f"Expected the ${{...}} of a configuration to expand to at most {MOST_CHARACTERS:,} "
                f"characters, but got more in {_name(place)}. Write the values instead."
            )


def _interpolated(value: Any, place: _Place) -> "list[tuple[_Place, str]]":
    if isinstance(value, dict):
        pairs = list(value.items())
    elif isinstance(value, list):
        pairs = list(enumerate(value))
    else:
        return [(place, value)] if isinstance(value, str) and "${" in value else []
    return [found for key, one in pairs for found in _interpolated(one, (*place, key))]


class _Sizes:
    """The number of characters and evaluations of each expanded value, computed once per value."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.config = config
        self.known: dict[_Place, int] = {}
        self.open: list[_Place] = []

    def of(self, place: _Place, value: Any) -> int:
        if place in self.known:
            return self.known[place]
        if place in self.open:
            loop = " -> ".join(map(_name, [*self.open[self.open.index(place) :], place]))
            raise ConfigurationError(
                f"Expected every ${{...}} to resolve to a value, but got a cycle: {loop:.300}. Set one of "
                "them to a value."
            )
        if len(self.open) > 50:
            raise ConfigurationError(
                "Expected ${...} to resolve in at most 50 steps, but got more from "
                f"{_name(self.open[0])}. Refer to the value directly."
            )
        self.open.append(place)
        if isinstance(value, dict):
            size = 2 + sum(
                len(str(key)) + 6 + self.of((*place, key), one) for key, one in value.items()
            )
        elif isinstance(value, list):
            size = 2 + sum(4 + self.of((*place, i), one) for i, one in enumerate(value))
        elif isinstance(value, str):
            size = self._of_text(place, value)
        else:  # 30 bits are at most ten digits
            size = value.bit_length() // 3 + 2 if isinstance(value, int) else len(str(value))
        self.open.pop()
        self.known[place] = size
        return size

    def _of_text(self, place: _Place, text: str) -> int:
        size = len(text)
        for found in _VARIABLE.finditer(text):
            size += 1 + len(os.environ.get(found[1], found[2] or ""))
        for found in _KEY.finditer(text):
            size += 1 + self._size_at(place, len(found[1]), found[2])
        if _KEY.sub("", _VARIABLE.sub("", text)).count("${"):
            raise ConfigurationError(
                "Expected every ${...} to name a key or, as ${oc.env:NAME}, an environment variable, "
                f"but got {text!r:.100} in {_name(place)}. Other resolvers and nesting are not supported."
            )
        return size

    def _size_at(self, by: _Place, dots: int, name: str) -> int:
        """The size of the value of a name, resolved from the root or, with dots, relative to the key."""
        if dots > len(by):
            raise self._missing(by, "." * dots + name)
        value: Any = self.config
        place: _Place = ()
        for key in by[: len(by) - dots] if dots else ():
            value, place = value[key], (*place, key)
        for part in re.findall(r"[\w+-]+", name):
            if isinstance(value, str) and "${" in value:
                raise ConfigurationError(
                    f"Expected every ${{...}} to name a key directly, but got {'.' * dots}{name} in "
                    f"{_name(by)}, which goes through {value!r:.100}. Name the key that it refers to."
                )
            # As text: "001" is another key than 1, and int() reads "1_0" as 10.
            if isinstance(value, list):
                keys: list[Any] = [int(part)] if _INDEX.fullmatch(part) else []
                keys = [index for index in keys if index < len(value)]
            else:
                keys = [key for key in value if str(key) == part] if isinstance(value, dict) else []
            if len(keys) != 1:
                raise self._missing(by, "." * dots + name)
            value, place = value[keys[0]], (*place, keys[0])
        return self.of(place, value)

    @staticmethod
    def _missing(by: _Place, name: str) -> ConfigurationError:
        return ConfigurationError(
            f"Expected every ${{...}} to name another key, but got an error in {_name(by)}: Interpolation "
            f"key {name!r:.100} not found. `--print_config` shows all keys."
        )


def _name(place: _Place) -> str:
    return ".".join(map(str, place))
