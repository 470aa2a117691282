"""Strategies, streams, gates and fronts by name: the built-in ones, and those of installed plugins.

A package adds one by an entry point::

    [options.entry_points]
    bpn_lightning.strategies =
        replay = my_package.replay:Replay
    bpn_lightning.datamodules =
        SplitBirds = my_package.birds:SplitBirds
    bpn_lightning.gates =
        knn = my_package.knn:NearestNeighbors

A stream's name is the name of its class. Names have to be unique: a name registered twice is refused,
but only when it is used. Nothing here imports torch: names are listed without importing their classes.
"""

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache, reduce
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from textwrap import shorten
from typing import Any, NamedTuple

from bpn_lightning.datamodules import DATAMODULES
from bpn_lightning.errors import ConfigurationError, did_you_mean
from bpn_lightning.strategies import STRATEGIES
from bpn_lightning.strategies.table import GATES

__all__ = [
    "ALIASES",
    "BUILT_IN",
    "CLASS_PATH",
    "KINDS",
    "Kind",
    "Registered",
    "by_class_path",
    "entry_points_of",
    "fronts",
    "gates",
    "is_class_path",
    "name_of",
    "registered",
    "strategies",
    "streams",
]

BUILT_IN = "built in"
CLASS_PATH = "class path"

#: Names of a method's part that are a strategy with other values than its defaults.
ALIASES: dict[str, tuple[str, dict[str, Any]]] = {
    "gd": ("bd", {"direction": "gradient"}),
    "frozen": ("bd", {"direction": "frozen"}),
}

#: Fixed feature extractors before a network, and where the class is.
FRONTS: dict[str, str] = {
    "frozen": "bpn_lightning.nn.frozen_network:FrozenNetwork",
    "patches": "bpn_lightning.nn.patches:Patches",
    "random": "bpn_lightning.nn.fronts:RandomFeatures",
}

IMPORTABLE = "be importable"


class Kind(NamedTuple):
    """A kind of class that configs and the command line name.

    Attributes:
        group: of its entry points, after ``bpn_lightning.``.
        built_in: ``"module:Class"`` by name.
        base: the class from which it has to be derived.
    """

    group: str
    built_in: dict[str, str]
    base: str


KINDS = {
    "strategy": Kind("strategies", STRATEGIES, "bpn_lightning.strategies.base:ContinualStrategy"),
    "stream": Kind(
        "datamodules", DATAMODULES, "bpn_lightning.datamodules.base:ContinualDataModule"
    ),
    "gate": Kind("gates", GATES, "bpn_lightning.strategies.gates.base:TaskGate"),
    "front": Kind("fronts", FRONTS, "bpn_lightning.nn.fronts:Front"),
}


@dataclass(frozen=True)
class Registered:
    """A class that configs and the command line may name.

    Args:
        kind: key of :data:`KINDS`.
        name: the name in configs, and the key of its arguments.
        target: ``"module:Class"``.
        origin: ``"built in"``, ``"class path"``, or the distribution that registers it.
        rivals: other classes registered under the same name.
    """

    kind: str
    name: str
    target: str
    origin: str
    rivals: "tuple[Registered, ...]" = ()

    @property
    def class_path(self) -> str:
        """``"module.Class"``, as in configs."""
        return self.target.replace(":", ".")

    def check_name(self) -> None:
        """Refuse a name that is not unique or not a valid key, without importing anything.

        Raises:
            ConfigurationError: names the classes.
        """
        if self.rivals:
            claims = (self, *self.rivals)
            plugins = sorted({one.origin for one in claims} - {BUILT_IN})
            raise ConfigurationError(
                f"Expected the {self.kind} name {self.name!r} to stand for one class, but got "
                f"{' and '.join(f'{one.class_path} ({one.origin})' for one in claims)}. Rename or "
                f"remove that of {' or '.join(plugins)}, or use a full import path, such as "
                f"{claims[-1].class_path}."
            )
        if not self.name.isidentifier():
            rule = "have a name of letters, digits and underscores"
            raise self._refusal(rule, f"got {self.name!r}")

    def load(self) -> type:
        """Import the class.

        Raises:
            ConfigurationError: the name is refused, or its target cannot be imported or is not a class
                of its kind.
        """
        self.check_name()
        if self.origin == BUILT_IN:
            built_in: type = _import(self.target)
            return built_in
        found, base = self._import(), _import(KINDS[self.kind].base)
        if not isinstance(found, type):
            raise self._refusal(f"be a {base.__name__}", f"got no class: {type(found).__name__}")
        if not issubclass(found, base):
            bases = ", ".join(one.__name__ for one in found.__bases__)
            raise self._refusal(f"be a {base.__name__}", f"got a class of {bases}")
        if self.kind == "stream" and found.__name__ != self.name:
            raise self._refusal("have the name of its class", f"got the class {found.__name__}")
        return found

    def problem(self) -> str | None:
        """Why it cannot be used, in one line; None if it can. Built-in classes are not imported."""
        try:
            if self.origin == BUILT_IN:
                self.check_name()
            else:
                self.load()
        except ConfigurationError as error:
            return str(error)
        return None

    def _import(self) -> Any:
        try:
            return _import(self.target)
        except (Exception, SystemExit) as error:  # importing a module may raise any exception
            said = shorten(f"{type(error).__name__}: {error}", 300, placeholder=" ...")
            module, _, attribute = self.target.partition(":")
            home = sys.modules.get(module) if isinstance(error, AttributeError) else None
            near = did_you_mean(attribute, vars(home)) if home else ""
            raise self._refusal(IMPORTABLE, f"importing it raised {said}", near) from error

    def _refusal(self, rule: str, got: str, near: str = "") -> ConfigurationError:
        subject = f"the {self.kind} {self.name!r} of {self.origin} ({self.class_path})"
        remedy = "Repair or remove that package, or leave the name out."
        if self.origin == CLASS_PATH:
            subject = f"{self.class_path} in --method"
            remedy = "Derive it from bpn_lightning.strategies.ContinualStrategy."
            if rule == IMPORTABLE:
                remedy = "Check its spelling; its module has to be installed, in this folder or on PYTHONPATH."
        return ConfigurationError(f"Expected {subject} to {rule}, but {got}.{near} {remedy}")


def strategies() -> dict[str, Registered]:
    """All registered strategies, built-in ones first."""
    return registered("strategy")


def streams() -> dict[str, Registered]:
    """All registered streams, built-in ones first."""
    return registered("stream")


def gates() -> dict[str, Registered]:
    """All registered gates, built-in ones first."""
    return registered("gate")


def fronts() -> dict[str, Registered]:
    """All registered fronts, built-in ones first."""
    return registered("front")


def name_of(one: object, known: Mapping[str, Registered]) -> str:
    """The registered name of an object's class, else the class's import path."""
    path = f"{type(one).__module__}:{type(one).__qualname__}"
    names = {entry.target: name for name, entry in known.items()}
    return names.get(path, path.replace(":", "."))


def is_class_path(name: str) -> bool:
    """Whether a name has the form ``package.module.Class``.

    >>> is_class_path("my_lab.replay.Replay"), is_class_path("ewc"), is_class_path("lr0.1")
    (True, False, False)
    """
    return "." in name and all(part.isidentifier() for part in name.split("."))


def by_class_path(path: str) -> Registered:
    """The strategy of a class path; its arguments are under the name of the class."""
    module, _, name = path.rpartition(".")
    return Registered("strategy", name, f"{module}:{name}", CLASS_PATH)


def registered(kind: str) -> dict[str, Registered]:
    """The built-in classes, then the entry points; of several with the same name, the first lists the others.

    Args:
        kind: key of :data:`KINDS`.
    """
    table = KINDS[kind].built_in
    aliases = {alias: table[name] for alias, (name, _) in ALIASES.items() if kind == "strategy"}
    built_in = [
        Registered(kind, name, target, BUILT_IN) for name, target in (table | aliases).items()
    ]
    plugins = [
        Registered(
            kind, point.name, _target(point.value), f"{point.dist.name} {point.dist.version}"
        )
        for point in entry_points_of(kind)
        if point.dist is not None
    ]
    found: dict[str, Registered] = {}
    for one in [*built_in, *sorted(plugins, key=lambda plugin: (plugin.name, plugin.origin))]:
        first = found.setdefault(one.name, one)
        if first is not one:
            found[one.name] = replace(first, rivals=(*first.rivals, one))
    return {name: one for name, one in found.items() if name not in aliases or one.rivals}


def entry_points_of(kind: str) -> tuple[EntryPoint, ...]:
    """The entry points of other packages, and of this one, for a kind.

    Installed packages are read once, and again when a folder of ``sys.path`` changes.

    Args:
        kind: key of :data:`KINDS`.
    """
    return _entry_points(tuple(map(_folder_state, sys.path)))[kind]


@lru_cache(maxsize=1)
def _entry_points(path: tuple[tuple[str, int], ...]) -> dict[str, tuple[EntryPoint, ...]]:
    installed = entry_points()
    return {
        kind: tuple(installed.select(group=f"bpn_lightning.{group}"))
        for kind, (group, _, _) in KINDS.items()
    }


def _folder_state(folder: str) -> tuple[str, int]:
    """A folder, and when an entry was last added to it or removed."""
    try:
        return os.path.abspath(folder), os.stat(folder or ".").st_mtime_ns
    except OSError:  # it does not exist
        return folder, 0


def _target(value: str) -> str:
    """An entry point's value without its extras."""
    return value.partition("[")[0].replace(" ", "")


def _import(target: str) -> Any:
    module, _, attribute = target.partition(":")
    return reduce(getattr, attribute.split("."), import_module(module))
