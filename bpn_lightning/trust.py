"""Which modules a run may import, decided before any of them is.

A module runs its code when it is imported, so a name in a config from somebody else is a program from
somebody else. Without being asked, a run imports

- modules of installed packages, and of the plugins among them;
- modules that the user named on the command line: whoever types a name means it;
- with ``--trust``, whatever its configs name.

``--trust false`` takes the second one away, for command lines that a program wrote. What is imported
must then also fit the type of its argument, and it is never a part of the standard library or of
packages that load or compile code. docs/safety.md says what is promised.
"""

import sys
from collections.abc import Collection, Iterable, Iterator
from functools import cache
from importlib.metadata import entry_points, packages_distributions
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from bpn_lightning.errors import ConfigurationError
from bpn_lightning.registry import is_class_path

__all__ = [
    "FLAGS",
    "Named",
    "check_named",
    "importable",
    "imported_by",
    "named_classes",
    "refuse_never",
    "restrict_imports",
    "top_modules",
]

#: What every run imports anyway.
ALWAYS = frozenset({"bpn_lightning", "torch", "torchvision", "torchmetrics", "lightning"})

#: Never allowed by a name: the standard library, which runs programs and opens files, and what
#: installs or imports code. jsonargparse refuses itself.
NEVER = frozenset(
    {*sys.stdlib_module_names, "jsonargparse", "pip", "setuptools", "pkg_resources"}
    | {"distutils", "_distutils_hack"}
)

#: Parts of allowed packages that load or compile code, or unpickle; no part of a run is one of them.
#: The type of an argument keeps them out as well.
LOADERS = (
    "torch.load",
    "torch.serialization",
    "torch.hub",
    "torch.jit",
    "torch.package",
    "torch.export",
    "torch.utils.cpp_extension",
    "torch.utils.model_zoo",
    "torch.distributed.elastic",
    "torch.distributed.launcher",
    "torch.distributed.rpc",
    "torch.distributed.run",
    "torch.multiprocessing",
    "lightning.fabric.cli",
    "lightning.pytorch.cli",
    "numpy.load",
    "numpy.lib",
    "numpy.f2py",
    "numpy.ctypeslib",
    "cloudpickle",
    "joblib",
)

FLAGS = "the flags"
"""Where a name comes from that no file has."""

TYPE_IT = "type the name on the command line, or "

#: Keys whose value may be a class path by itself, or a list of them.
_PLACES = frozenset(
    {"accelerator", "backbone", "callbacks", "data", "logger", "loss", "metrics", "optimizer"}
    | {"plugins", "profiler", "scheduler", "strategy", "streams"}
)

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
    """
    last = key.rpartition(".")[2]
    if isinstance(content, dict):
        for name, value in content.items():
            yield from named_classes(where, value, f"{key}.{name}" if key else str(name))
    elif isinstance(content, list):
        for value in content:
            yield from named_classes(where, value, key)
    elif isinstance(content, str):
        paths = content.split("+") if key == "method" else [content]
        of_metrics = key.rpartition(".")[0] == "model.metrics"
        if key == "method" or last == "class_path" or last in _PLACES or of_metrics:
            yield from (
                Named(where, key, path)
                for path in paths
                if is_class_path(path) and not path.endswith((".yaml", ".yml", ".json"))
            )


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


def check_named(named: Iterable[Named], trusted: Collection[str]) -> None:
    """Refuse what no installed package and no plugin has; nothing is imported.

    Args:
        named: classes.
        trusted: top modules that are allowed all the same.

    Raises:
        ConfigurationError: names the class, and where it is named.
    """
    for one in named:
        top = one.path.partition(".")[0]
        if top not in trusted and _is_foreign(top):
            raise ConfigurationError(
                f"Expected {one.key} in {one.where} to name a class of an installed package or a "
                f"plugin, but got {one.path!r}, and no package brings the module {top!r}. Importing "
                f"it runs its code: read it, then {'' if one.where == FLAGS else TYPE_IT}add --trust."
            )


def imported_by(named: Iterable[Named]) -> list[str]:
    """A line for each class whose module is not one that every run imports."""
    lines = [
        f"{one.where} names {one.path}: the module {one.module} is imported."
        for one in named
        if one.path.partition(".")[0] not in ALWAYS | NEVER
    ]
    return list(dict.fromkeys(lines))


def top_modules(value: Any) -> set[str]:
    """First parts of the class paths in a value, below whatever key; names of files are none.

    >>> sorted(top_modules(["a.B", {"x": ["c.d.E", "f"]}]))
    ['a', 'c']
    """
    if isinstance(value, str):
        paths = [path for path in value.split("+") if is_class_path(path)]
        return {path.partition(".")[0] for path in paths if not Path(path).exists()}
    if isinstance(value, dict):
        return set().union(*map(top_modules, value.values()))
    if isinstance(value, list):
        return set().union(*map(top_modules, value))
    return set()


def importable(named: Collection[str], trusted: Collection[str]) -> frozenset[str]:
    """The top modules that a run may import by name.

    Args:
        named: all that its configs and its command line might name.
        trusted: those of them that are allowed whoever brings them.
    """
    others = {*named, *trusted} - ALWAYS - NEVER
    if not others:
        return ALWAYS
    missing = {top for top in others if not _exists(top)}  # to be told that there is none
    allowed = ALWAYS | _installed() | set(trusted) | missing
    return frozenset(top for top in allowed - NEVER if top.isidentifier())


def restrict_imports(allowed: Collection[str], trust: bool) -> None:
    """Let jsonargparse import nothing else by name, and build nothing where any value will do.

    Its settings hold for the whole process, and until the next call.

    Args:
        allowed: top modules.
        trust: whether others may be imported, too.
    """
    from jsonargparse import set_parsing_settings

    set_parsing_settings(
        instantiate_subclass_spec_in_any=False,
        config_read_mode_fsspec_enabled=False,  # Lightning lets configs come from the network
        import_path_denylist=[*LOADERS, *([] if trust else ["*"]), *_allowed],
        import_path_allowlist=sorted(allowed),
    )
    _allowed.update(allowed)


def _is_foreign(top: str) -> bool:
    return top not in ALWAYS | NEVER and _exists(top) and top not in _installed()


def _exists(top: str) -> bool:
    """Whether there is such a module; a top module is looked for without importing anything."""
    try:
        return find_spec(top) is not None
    except (ImportError, ValueError):  # `__main__` has no specification, and is there
        return top in sys.modules


def _installed() -> set[str]:
    """Top modules of distributions and of plugins."""
    return _installed_on(tuple(sys.path))


@cache
def _installed_on(path: tuple[str, ...]) -> set[str]:
    """Looking through all distributions takes a second."""
    groups = ("bpn_lightning.strategies", "bpn_lightning.datamodules")
    points = [point for group in groups for point in entry_points(group=group)]
    return {*packages_distributions(), *(point.module.partition(".")[0] for point in points)}
