"""One-line messages for errors of classes that are instantiated from a configuration."""

import re
from collections.abc import Iterator
from types import TracebackType
from typing import Any

from jsonargparse import Namespace

from bpn_lightning.errors import BPNLightningError, ConfigurationError

__all__ = ["building_error", "own_error"]


def own_error(error: BaseException) -> BPNLightningError | None:
    """This package's error inside one of jsonargparse, if any.

    Our errors are ValueErrors, which jsonargparse reports as a value of the wrong type.
    """
    found: BaseException | None = error
    while found is not None and not isinstance(found, BPNLightningError):
        found = found.__cause__ or found.__context__
    return found


def building_error(error: Exception, config: Any, prefix: str = "") -> BPNLightningError:
    """The error to raise instead of one from instantiating a class.

    Args:
        error: the error that the parser raised.
        config: the parsed configuration.
        prefix: prefix of its keys, with a trailing dot.
    """
    own = own_error(error)
    if own is not None:
        return own
    cause: BaseException = error
    while cause.__context__ is not None and _built(cause.__context__) is not None:
        cause = cause.__context__  # jsonargparse lists the types that it tried
    built = _built(cause)
    if built is None:  # a union of types, whose errors it lists
        listed = [
            line
            for line in re.findall(r"^ *- (.*)$", str(error), re.MULTILINE)
            if not line.startswith(("Expected a", "Not a valid subclass", "Does not"))
        ]
        where = f"{prefix}{getattr(_local(error, 'component'), 'dest', 'a key')}"
        line = " ".join((listed[0] if listed else str(error)).split())
        return ConfigurationError(
            f"Expected {where} to be valid for one of its classes, but got an error: {line:.300}. "
            "Correct it."
        )
    name = getattr(built, "__qualname__", type(built).__qualname__)
    place = next((key for key, path in _class_paths(config, "") if path.endswith(f".{name}")), "")
    where = f"{prefix}{place}" if place else f"the arguments of {name}"
    line = " ".join(str(cause).split())
    return ConfigurationError(
        f"Expected {where} to be valid arguments of {name}, but it raised "
        f"{type(cause).__name__}: {line:.300}. Correct them."
    )


def _built(error: BaseException) -> Any:
    """The innermost class or function in whose call an error was raised."""
    return _local(error, "class_type")


def _local(error: BaseException, name: str) -> Any:
    """The innermost value of a local variable of the parser when the error was raised."""
    found = None
    trace: TracebackType | None = error.__traceback__
    while trace is not None:
        frame = trace.tb_frame
        if str(frame.f_globals.get("__name__")).startswith(
            ("jsonargparse.", "lightning.pytorch.cli")
        ):
            found = frame.f_locals.get(name, found)
        trace = trace.tb_next
    return found


def _class_paths(value: Any, key: str) -> Iterator[tuple[str, str]]:
    """Keys and class paths, innermost first, which is the order of instantiation."""
    fields = vars(value) if isinstance(value, Namespace) else value
    if isinstance(fields, dict):
        for name, one in fields.items():
            yield from _class_paths(one, f"{key}.{name}" if key else str(name))
        if isinstance(fields.get("class_path"), str):
            yield key, "." + fields["class_path"]
    elif isinstance(fields, list | tuple):
        for one in fields:
            yield from _class_paths(one, key)
