"""Who may name what: whose word counts when a name is imported and built, decided before anything is.

A module runs its code when it is imported, and so does a function when it is called, so a name in a
config from somebody else is a program from somebody else. Without being asked, a run takes

- from a file: what is known to do no harm (:mod:`bpn_lightning.cli.allowed`), and registered plugins;
- from the command line: whatever the user typed, a module of the current folder too;
- with ``--trust``: whatever its configs name.

``--trust false`` takes the second one away, for command lines that a program wrote. Here names are
checked by where they lead, before torch is imported; what they turn out to be is checked again when
they are, and before anything is built. docs/safety.md says what is promised.
"""

import os
import sys
from collections.abc import Collection, Iterable, Iterator
from importlib.machinery import PathFinder
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from bpn_lightning.errors import ConfigurationError, needs_trust
from bpn_lightning.registry import is_class_path

__all__ = [
    "FLAGS",
    "NEVER",
    "OPEN",
    "Named",
    "check_named",
    "find_here",
    "importable",
    "imported_by",
    "named_classes",
    "refuse_never",
    "restrict_imports",
    "top_modules",
    "words",
]

#: What every run imports anyway.
ALWAYS = frozenset({"bpn_lightning", "torch", "torchvision", "torchmetrics", "lightning"})

#: Below these lies all that a file may name without being trusted; not all that lies there is allowed.
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

#: Never allowed by a name: the standard library, which runs programs and opens files, and what
#: installs or imports code. jsonargparse refuses itself.
NEVER = frozenset(
    {*sys.stdlib_module_names, "jsonargparse", "pip", "setuptools", "pkg_resources"}
    | {"distutils", "_distutils_hack"}
)

FLAGS = "the flags"
"""Where a name comes from that no file has."""

#: Keys whose value may be a class path by itself, or a list of them.
_PLACES = frozenset(
    {"accelerator", "backbone", "callbacks", "class_path", "data", "logger", "loss", "metrics"}
    | {"optimizer", "plugins", "profiler", "scheduler", "strategy", "streams"}
)

#: Groups of keys, which jsonargparse would read from a file as well.
_GROUPS = frozenset({"model", "trainer"})

#: Keys below which each value is one, by a name of its own.
_NAMED = frozenset({"model.metrics", "strategies"})

_CONFIGS = (".yaml", ".yml", ".json")

_allowed: set[str] = set()  # by an earlier run of this process, whose trust has ended


class Named(NamedTuple):
    """A class that a config names.

    Attributes:
        where: the file, or the flag.
        key: its key there.
        path: ``package.module.Class``.
    """

    where: str
    key: str
    path: str

    @property
    def module(self) -> str:
        """What is imported for it."""
        return self.path.rpartition(".")[0]


def named_classes(where: str, content: Any, key: str = "") -> Iterator[Named]:
    """The classes that a part of a config names.

    >>> [named.path for named in named_classes("x.yaml", {"data": {"class_path": "lab.Birds"}})]
    ['lab.Birds']

    Raises:
        ConfigurationError: another config is named instead.
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
                    f"{content!r}, and no config includes another. Name it by a --config of its own, "
                    f"its keys below `{key}:`."
                )
            if is_class_path(content):
                yield Named(where, key, content)


def refuse_never(named: Iterable[Named]) -> None:
    """Refuse parts of the standard library and of installers, whoever names them.

    Raises:
        ConfigurationError: names the class, and where it is named.
    """
    for one in named:
        if one.path.partition(".")[0] in NEVER:
            raise ConfigurationError(
                f"Expected {one.key} in {one.where} to name a class of an installed package or a "
                f"plugin, but got {one.path!r}. Nothing of the standard library or of an installer can "
                "be named: much of it runs programs or opens files. Name another class."
            )


def check_named(named: Iterable[Named], trusted: Collection[str], trust: bool = False) -> None:
    """Refuse what leads to nothing that needs no trust; nothing is imported.

    Args:
        named: classes.
        trusted: class paths that are allowed all the same.
        trust: whether all are.

    Raises:
        ConfigurationError: names the class, and where it is named.
    """
    plugins = None if trust else _plugins()
    for one in named:
        if plugins is not None and not (
            one.path in trusted
            or one.path.startswith(tuple(f"{module}." for module in OPEN))
            or one.path.partition(".")[0] in plugins
        ):
            raise ConfigurationError(
                needs_trust(f"{one.key} in {one.where}", one.path, typed=one.where == FLAGS)
            )


def imported_by(named: Iterable[Named]) -> list[str]:
    """A line for each class whose module is not one that every run imports."""
    lines = [
        f"{one.where} names {one.path}: the module {one.module} is imported."
        for one in named
        if one.path.partition(".")[0] not in ALWAYS | NEVER
    ]
    return list(dict.fromkeys(lines))


def words(value: Any) -> set[str]:
    """Every text in a value, at whatever depth, and the parts that ``+`` joins.

    >>> sorted(words(["bd+a.B", {"x": [3, "f"]}]))
    ['a.B', 'bd', 'bd+a.B', 'f']
    """
    if isinstance(value, str):
        return {value, *value.split("+")}
    if isinstance(value, dict | list):
        return set().union(*map(words, value.values() if isinstance(value, dict) else value))
    return set()


def top_modules(names: Iterable[str]) -> set[str]:
    """First parts of the class paths among words; names of files are none.

    >>> sorted(top_modules(["a.B", "c.d.E", "f"]))
    ['a', 'c']
    """
    paths = [name for name in names if is_class_path(name)]
    return {path.partition(".")[0] for path in paths if not Path(path).exists()}


def importable(trusted: Iterable[str]) -> frozenset[str]:
    """What a run may import by name, whoever names it: modules, and all that lies below them.

    Args:
        trusted: top modules that are allowed whoever brings them.
    """
    tops = {top for top in (*trusted, *_plugins()) if top.isidentifier()}
    return frozenset({*OPEN, *tops} - NEVER)


def find_here(tops: Iterable[str]) -> None:
    """Let trusted modules of the current folder be imported, which a console script does not find.

    The folder comes last, and only where one of them is nowhere else: no file in it takes the place of
    another module.
    """
    here = os.getcwd()
    if here not in sys.path and any(
        top not in sys.modules and find_spec(top) is None and PathFinder.find_spec(top, [here])
        for top in tops
    ):
        sys.path.append(here)


def restrict_imports(allowed: Collection[str], trust: bool) -> None:
    """Let jsonargparse import nothing else by name, and build nothing where any value will do.

    Its settings hold for the whole process, and until the next call.

    Args:
        allowed: modules, or whole names.
        trust: whether others may be imported, too.
    """
    from jsonargparse import set_parsing_settings

    # Of two entries the longer one decides, and none can be taken back but by its opposite.
    again = {one for one in _allowed if one.startswith(tuple(f"{name}." for name in allowed))}
    allowed = {*allowed, *again}
    set_parsing_settings(
        instantiate_subclass_spec_in_any=False,
        config_read_mode_fsspec_enabled=False,  # Lightning lets configs come from the network
        import_path_denylist=[*([] if trust else ["*"]), *_allowed],
        import_path_allowlist=sorted(allowed),
    )
    _allowed.update(allowed)


def _plugins() -> set[str]:
    """Top modules of the registered plugins."""
    groups = ("bpn_lightning.strategies", "bpn_lightning.datamodules")
    points = [point for group in groups for point in entry_points(group=group)]
    return {point.module.partition(".")[0] for point in points}
