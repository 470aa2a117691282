"""The order of classes in the runs of a grid: drawn by the seed of each run, or the config's own."""

from collections.abc import Mapping, Sequence
from typing import Any

from bpn_lightning.cli.command import Command, flag_values
from bpn_lightning.datamodules import DATAMODULES
from bpn_lightning.errors import ConfigurationError, did_you_mean
from bpn_lightning.run.identity import SEED_ORDER

__all__ = ["ORDER", "class_orders"]

ORDER = "order"
"""The key of a grid and of its entries."""

_VALUES = {"fixed": None, "seed": SEED_ORDER}

Given = tuple[Sequence[tuple[str, Any]], Mapping[str, Any], Sequence[str]]


def class_orders(
    entry: Mapping[str, Any], common: Mapping[str, Any], command: Command, given: Given, here: str
) -> tuple[str | None, ...]:
    """The values of ``class_order_seed`` that the runs of an entry get; none where they get no such flag.

    By default the seed of a run draws the order of its classes: a mean over seeds that share one order says
    nothing about others. A stream without classes of its own for each task has no such order.

    Args:
        entry: of the grid.
        common: ``order`` of the whole grid, if it has one.
        command: of the entry's config.
        given: what the entry sets and varies, and the flags of every run.
        here: the entry, for messages.

    Raises:
        ConfigurationError: the entry has an unknown order, one that its stream cannot have, or two.
    """
    own = ORDER in entry
    wanted = entry.get(ORDER, common.get(ORDER, "seed"))
    names = wanted if isinstance(wanted, list) else [wanted]
    for name in names:
        if not isinstance(name, str) or name not in _VALUES or names.count(name) > 1:
            raise ConfigurationError(
                f"Expected {ORDER} of {here} to be fixed, seed or [fixed, seed], but got {wanted!r}."
                f"{did_you_mean(str(name), _VALUES)} `seed` lets the seed of each run draw the order of classes."
            )
    settings, varied, passed_on = given
    keys = [key for key, _ in (*settings, *flag_values(passed_on))] + [*varied]
    if any(key.startswith("data.") and key.endswith(".class_order_seed") for key in keys):
        if own:
            raise ConfigurationError(
                f"Expected {ORDER} of {here} to be left out where class_order_seed is set or varied, but got "
                f"{wanted!r}. Leave one of them out."
            )
        return ()
    stream = _stream(command, settings, passed_on)
    if stream in DATAMODULES and not stream.startswith("Split"):
        if own:
            raise ConfigurationError(
                f"Expected {ORDER} of {here} to be left out, since {stream} has no order of classes, but got "
                f"{wanted!r}."
            )
        return ()
    if not own and (stream not in DATAMODULES or _fixes_seed(command)):
        return ()
    return tuple(_VALUES[name] for name in names if name == "seed" or not _fixes_seed(command))


def _stream(command: Command, settings: Sequence[tuple[str, Any]], passed_on: Sequence[str]) -> str:
    """The name of the stream's class."""
    found = [layer.content.get("data") for layer in command.layers]
    paths = [one.get("class_path") for one in found if isinstance(one, Mapping)]
    typed = (*settings, *flag_values(passed_on))
    paths += [value for key, value in typed if key in ("data", "data.class_path")]
    known = [str(path) for path in paths if path is not None]
    return known[-1].rpartition(".")[2] if known else ""


def _fixes_seed(command: Command) -> bool:
    """Whether the config has a seed of its own for the order."""
    for layer in command.layers:
        data = layer.content.get("data")
        arguments = data.get("init_args") if isinstance(data, Mapping) else None
        if isinstance(arguments, Mapping) and arguments.get("class_order_seed") is not None:
            return True
    return False
