"""Which names may be imported, depending on where they come from, checked before anything is imported.

Importing a module runs its code, and so does calling a function, so a name in an untrusted config is
untrusted code. By default a run accepts

- from a file: names that are known to be safe (:mod:`bpn_lightning.cli.allowed`), and registered plugins;
- from the command line: anything, including modules of the current folder;
- with ``--trust``: anything in its configs.

``--trust false`` disables the second rule, for generated command lines. Here the import paths are checked,
before torch is imported; the objects are checked after the import, before anything is instantiated.
docs/safety.md describes the guarantees.
"""

import argparse
import os
import sys
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.machinery import PathFinder
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from bpn_lightning.errors import ConfigurationError, needs_trust
from bpn_lightning.registry import KINDS, entry_points_of, is_class_path

__all__ = [
    "FLAGS",
    "NEVER",
    "OPEN",
    "Named",
    "Trust",
    "add_trusted_names",
    "decide_trust",
    "find_here",
    "imported_by",
    "named_classes",
    "restrict_imports",
    "words",
]

#: Modules that every run imports anyway.
ALWAYS = frozenset({"bpn_lightning", "torch", "torchvision", "torchmetrics", "lightning"})

#: Prefixes of all names that an untrusted file may use; not everything below them is allowed.
OPEN = (
    "bpn_lightning",
    "torch.nn",
    "torch.optim",
    "torchvision.models",
    "torchmetrics.classification",
    *(
        f"lightning.pytorch.{part}"
        for part in ("accelerators", "callbacks", "loggers", "plugins", "profilers", "strategies")
    ),
)

#: Never allowed: the standard library, which can run programs and open files, and packages that install
#: or import code. jsonargparse refuses itself.
NEVER = frozenset(
    {*sys.stdlib_module_names, "jsonargparse", "pip", "setuptools", "pkg_resources"}
    | {"distutils", "_distutils_hack"}
)

FLAGS = "the flags"
"""The origin of names that are not from a file."""

#: Keys whose value may be a class path, or a list of class paths.
_PLACES = frozenset(
    {"accelerator", "backbone", "callbacks", "class_path", "data", "logger", "loss", "metrics"}
    | {"front", "network", "optimizer", "plugins", "profiler", "scheduler", "strategy", "streams"}
)

#: Groups of keys, which jsonargparse would also read from a file.
_GROUPS = frozenset({"model", "trainer"})

#: Keys whose values are named groups.
_NAMED = frozenset({"model.metrics", "strategies"})

_CONFIGS = (".yaml", ".yml", ".json")

_allowed: set[str] = set()  # by an earlier run of this process, to be revoked


class Named(NamedTuple):
    """A class that a config names.

    Attributes:
        where: the file, or the command line.
        key: its key.
        path: ``package.module.Class``.
    """

    where: str
    key: str
    path: str

    @property
    def module(self) -> str:
        """The module that is imported for it."""
        return self.path.rpartition(".")[0]


def named_classes(where: str, content: Any, key: str = "") -> Iterator[Named]:
    """The classes that a part of a config names.

    >>> [named.path for named in named_classes("x.yaml", {"data": {"class_path": "lab.Birds"}})]
    ['lab.Birds']

    Raises:
        ConfigurationError: another config file is named instead.
    """
    last = key.rpartition(".")[2]
    if isinstance(content, dict):
        for name, value in content.items():
            yield from named_classes(where, value, f"{key}.{name}" if key else str(name))
    elif isinstance(content, list):
        for value in content:
            yield from named_classes(where, value, key)
    elif isinstance(content, str):
        if key == "method":
            yield from (
                Named(where, key, path) for path in content.split("+") if is_class_path(path)
            )
        elif last in _PLACES or key in _GROUPS or key.rpartition(".")[0] in _NAMED:
            if content.endswith(_CONFIGS) or "/" in content:
                raise ConfigurationError(
                    f"Expected {key} in {where} to be a class or its keys, but got the file "
                    f"{content!r}; configs cannot include others. Pass it with another --config, "
                    f"with its keys below `{key}:`."
                )
            if is_class_path(content):
                yield Named(where, key, content)


@dataclass(frozen=True)
class Trust:
    """What may be imported by name.

    Args:
        everything: whether any module may be imported.
        importable: the modules that may be, with their submodules.
        typed: the words on the command line, which are trusted.
        classes: those of them that name a class.
    """

    everything: bool
    importable: frozenset[str]
    typed: frozenset[str]
    classes: list[str]


def decide_trust(
    named: Sequence[Named],
    in_files: set[str],
    typed: Collection[str] = (),
    everything: bool = False,
) -> Trust:
    """Refuse names that need trust, without importing anything.

    Trusted modules of the current folder become importable.

    Args:
        named: classes.
        in_files: words in files, which are trusted only with ``everything``.
        typed: words that are trusted.
        everything: whether all names are trusted, except those of the standard library and of installers.

    Raises:
        ConfigurationError: names the class, and its location.
    """
    _refuse_never(named)
    plugins = _plugins()
    if not everything:
        _check_named(named, typed, plugins)
    tops = _top_modules({*typed, *in_files} if everything else typed)
    find_here(tops)
    return Trust(
        everything=everything,
        importable=frozenset(
            {*OPEN, *(top for top in tops | plugins if top.isidentifier())} - NEVER
        ),
        typed=frozenset(typed),
        classes=[one.path for one in named if one.where == FLAGS and one.path in typed],
    )


def _refuse_never(named: Iterable[Named]) -> None:
    """Refuse names from the standard library and from installers, regardless of trust."""
    for one in named:
        if one.path.partition(".")[0] in NEVER:
            raise ConfigurationError(
                f"Expected {one.key} in {one.where} to name a class of an installed package or a "
                f"plugin, but got {one.path!r}. The standard library and installers cannot be used, since "
                "they can run programs and open files. Name another class."
            )


def _check_named(named: Iterable[Named], typed: Collection[str], plugins: Collection[str]) -> None:
    """Refuse names that are neither open nor typed nor of a plugin."""
    for one in named:
        if not (
            one.path in typed
            or one.path.startswith(tuple(f"{module}." for module in OPEN))
            or one.path.partition(".")[0] in plugins
        ):
            raise ConfigurationError(
                needs_trust(f"{one.key} in {one.where}", one.path, typed=one.where == FLAGS)
            )


def imported_by(named: Iterable[Named]) -> list[str]:
    """One line per class whose module is not imported by every run."""
    lines = [
        f"{one.where} names {one.path}: the module {one.module} is imported."
        for one in named
        if one.path.partition(".")[0] not in ALWAYS | NEVER
    ]
    return list(dict.fromkeys(lines))


def words(value: Any) -> set[str]:
    """All texts in a nested value, and their parts separated by ``+``.

    >>> sorted(words(["bd+a.B", {"x": [3, "f"]}]))
    ['a.B', 'bd', 'bd+a.B', 'f']
    """
    if isinstance(value, str):
        return {value, *value.split("+")}
    if isinstance(value, dict | list):
        return set().union(*map(words, value.values() if isinstance(value, dict) else value))
    return set()


def _top_modules(names: Iterable[str]) -> set[str]:
    """The top-level modules of the class paths among words; file names are ignored."""
    paths = [name for name in names if is_class_path(name)]
    return {path.partition(".")[0] for path in paths if not Path(path).exists()}


def find_here(tops: Iterable[str]) -> None:
    """Make trusted modules of the current folder importable, which console scripts do not find.

    The folder is appended to the path, and only if one of them is found nowhere else, so that its files
    never shadow other modules.
    """
    here = os.getcwd()
    if here not in sys.path and any(
        top not in sys.modules and find_spec(top) is None and PathFinder.find_spec(top, [here])
        for top in tops
    ):
        sys.path.append(here)


def restrict_imports(trust: Trust, names: Iterable[str]) -> None:
    """Restrict jsonargparse's imports by name, and instantiation for arguments of any type.

    The settings apply to the whole process, until the next call.

    Args:
        trust: the modules that may be imported.
        names: full names that may be imported, too.
    """
    from jsonargparse import set_parsing_settings

    allowed = {*trust.importable, *names}
    # The longest matching entry decides; an entry can only be revoked by its opposite.
    within = tuple(f"{name}." for name in allowed)
    allowed |= {one for one in _allowed if one.startswith(within)}
    set_parsing_settings(
        instantiate_subclass_spec_in_any=False,
        config_read_mode_fsspec_enabled=False,  # Lightning would read configs from the network
        import_path_denylist=[*([] if trust.everything else ["*"]), *_allowed],
        import_path_allowlist=sorted(allowed),
    )
    _allowed.update(allowed)


def _plugins() -> set[str]:
    """Top-level modules of the registered plugins."""
    return {point.module.partition(".")[0] for kind in KINDS for point in entry_points_of(kind)}


def add_trusted_names(parser: argparse.ArgumentParser) -> None:
    """The flag of commands that read a bundle, whose network is built if it is of this package, or named here."""
    parser.add_argument(
        "--trust",
        metavar="NAME",
        nargs="+",
        default=[],
        help="import paths that the bundle's network may name",
    )
