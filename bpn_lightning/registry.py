"""Strategies and streams by name: the built-in tables, and what installed packages add.

Another package adds a strategy or a stream by an entry point of its own::

    [options.entry_points]
    bpn_lightning.strategies =
        replay = my_package.replay:Replay
    bpn_lightning.datamodules =
        SplitBirds = my_package.birds:SplitBirds

A stream's name is the name of its class. Nothing here imports torch: names are listed without
importing what they stand for.
"""

from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import entry_points

from bpn_lightning.datamodules import DATAMODULES
from bpn_lightning.errors import ConfigurationError
from bpn_lightning.strategies import STRATEGIES

__all__ = ["BUILT_IN", "Registered", "strategies", "streams"]

BUILT_IN = "built in"


@dataclass(frozen=True)
class Registered:
    """A class that configs and the command line may name.

    Args:
        kind: ``"strategy"`` or ``"stream"``.
        name: what a user writes.
        target: ``"module:Class"``.
        origin: ``"built in"``, or the distribution that brings it.
    """

    kind: str
    name: str
    target: str
    origin: str

    def load(self) -> type:
        """Import the class.

        Raises:
            ConfigurationError: it comes from another package, and that cannot be imported.
        """
        module, _, attribute = self.target.partition(":")
        if self.origin == BUILT_IN:
            return _class(module, attribute)
        try:
            return _class(module, attribute)
        except Exception as error:
            raise ConfigurationError(
                f"Expected the {self.kind} {self.name!r} to be importable as {self.target}, but "
                f"importing it raised {type(error).__name__}: {error}. It comes from {self.origin}: "
                "repair or remove that package, or leave the name out."
            ) from error


def strategies() -> dict[str, Registered]:
    """Every strategy that has a name, built-in ones first."""
    return _registered("strategy", STRATEGIES, "bpn_lightning.strategies")


def streams() -> dict[str, Registered]:
    """Every stream that has a name, built-in ones first."""
    return _registered("stream", DATAMODULES, "bpn_lightning.datamodules")


def _registered(kind: str, table: dict[str, str], group: str) -> dict[str, Registered]:
    """The table and then the entry points; where two claim a name, the first keeps it."""
    found = {name: Registered(kind, name, target, BUILT_IN) for name, target in table.items()}
    plugins = [
        Registered(kind, point.name, point.value, f"{point.dist.name} {point.dist.version}")
        for point in entry_points(group=group)
        if point.dist is not None
    ]
    for plugin in sorted(plugins, key=lambda plugin: (plugin.name, plugin.origin)):
        found.setdefault(plugin.name, plugin)
    return found


def _class(module: str, attribute: str) -> type:
    found = getattr(import_module(module), attribute)
    if not isinstance(found, type):
        raise TypeError(f"{module}:{attribute} is not a class")
    return found
