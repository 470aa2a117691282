"""What a file may name and set without being trusted, by what a name turns out to be.

A path says little: ``torch.nn.modules.module.torch.load`` leads out of ``torch.nn``, and
``SplitDigits.load_from_checkpoint`` is no stream but a reader of pickles. So a configuration is looked
through once its names are objects, and before one of them is built or called. A file may name

- layers, losses and containers of ``torch.nn``; optimizers and their schedulers;
- classification networks of torchvision, without weights that it would fetch;
- classification metrics of torchmetrics;
- callbacks, profilers, and a few loggers, plugins and strategies of Lightning, writing nowhere but below
  the run's folder;
- our strategies, streams, backbones and callbacks, and those of registered plugins.

Each of them may be called with any values and does no more than compute, since the arguments that take
functions or classes take these only.
"""

import inspect
import os
import re
import sys
from collections.abc import Collection, Iterable, Iterator
from contextlib import suppress
from datetime import timedelta
from enum import Enum
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jsonargparse import Namespace

from bpn_lightning import registry
from bpn_lightning.cli.messages import SHORT_NAMES
from bpn_lightning.cli.trust import NEVER
from bpn_lightning.datamodules import DATAMODULES
from bpn_lightning.errors import ConfigurationError, needs_trust
from bpn_lightning.files import has_variable
from bpn_lightning.strategies import STRATEGIES

__all__ = [
    "Given",
    "allowed_objects",
    "canonical_names",
    "check_given",
    "check_places",
    "given",
]

#: Modules, and what their public classes that may be named derive from.
FAMILIES = {
    "torch.nn": "torch.nn.Module",
    "torch.optim": "torch.optim.Optimizer",
    "torch.optim.lr_scheduler": "torch.optim.lr_scheduler.LRScheduler",
    "torchvision.models": "torch.nn.Module",
    "torchmetrics.classification": "torchmetrics.Metric",
    "lightning.pytorch.callbacks": "lightning.pytorch.Callback",
}

#: Single ones. Not among them: what talks to a server, needs a package that has to be installed for it,
#: or is refused in every run.
SINGLE = (
    "lightning.pytorch.loggers.CSVLogger",
    "lightning.pytorch.loggers.TensorBoardLogger",
    "lightning.pytorch.profilers.AdvancedProfiler",
    "lightning.pytorch.profilers.PassThroughProfiler",
    "lightning.pytorch.profilers.PyTorchProfiler",
    "lightning.pytorch.profilers.SimpleProfiler",
    "lightning.pytorch.accelerators.CPUAccelerator",
    "lightning.pytorch.accelerators.CUDAAccelerator",
    "lightning.pytorch.accelerators.MPSAccelerator",
    "lightning.pytorch.strategies.DDPStrategy",
    "lightning.pytorch.strategies.SingleDeviceStrategy",
    "lightning.pytorch.plugins.AsyncCheckpointIO",
    "lightning.pytorch.plugins.DoublePrecision",
    "lightning.pytorch.plugins.HalfPrecision",
    "lightning.pytorch.plugins.MixedPrecision",
    "lightning.pytorch.plugins.Precision",
    "lightning.pytorch.plugins.TorchCheckpointIO",
    "lightning.pytorch.plugins.TorchSyncBatchNorm",
    "lightning.pytorch.plugins.environments.LightningEnvironment",
    "lightning.pytorch.plugins.environments.SLURMEnvironment",
    "lightning.pytorch.plugins.environments.TorchElasticEnvironment",
    "bpn_lightning.nn.CrossEntropy",
    "bpn_lightning.nn.MLP",
    "bpn_lightning.nn.torchvision_backbone",
    "bpn_lightning.paper.probes.Drift",
    "bpn_lightning.paper.probes.Regions",
    "bpn_lightning.run.checkpoints.AtomicCheckpointIO",
    "bpn_lightning.run.console.StreamProgress",
    "bpn_lightning.run.dashboards.Dashboard",
    "bpn_lightning.model.optimization.sgd",
)

#: Keyword arguments of torchvision's builders that fetch weights under an older name.
_FETCHING = frozenset({"pretrained", "pretrained_backbone"})

#: Values that are what they say.
_PLAIN = (str, int, float, bytes, type(None), timedelta, torch.device, torch.dtype, os.PathLike)

#: Names below those places; loggers put in the variables of some, and ``filename`` is formatted.
_PARTS = frozenset({"filename", "name", "prefix", "sub_dir", "version"})

#: What ``str.format`` makes of it holds nothing but names and numbers. With more, such as
#: ``{epoch.__class__.__name__[0:.>2.0}``, it makes ``..``; ``{/tmp/x}`` puts in its own name.
_TEMPLATE = re.compile(
    r"(?:[^{}]|\{[a-z_][\w/-]*(?::(?:0?[0-9]{0,2}d|\.[0-9]{1,2}f))?\})*", re.ASCII | re.IGNORECASE
)

_NOTHING = object()


class Given(NamedTuple):
    """A value of a configuration that is no default.

    Attributes:
        key: where it stands, joined by dots.
        value: a plain value, or what a name stands for.
        name: the class path, where there is one.
    """

    key: str
    value: Any
    name: str = ""


def given(value: Any, key: str, owner: Any = None, default: Any = _NOTHING) -> Iterator[Given]:
    """All that a parsed configuration holds and code does not say by itself.

    Args:
        value: of the parser.
        key: of it.
        owner: the class or function whose arguments the value's keys are.
        default: what code has in its place.
    """
    if value is default or (isinstance(value, (*_PLAIN, Enum)) and _same(value, default)):
        return
    fields = vars(value) if isinstance(value, Namespace) else value
    if isinstance(fields, dict) and isinstance(fields.get("class_path"), str):
        path = fields["class_path"]
        found = _found(path)
        if found is not default:
            yield Given(f"{key}.class_path", found, path)
        for group in ("init_args", "dict_kwargs"):
            yield from given(fields.get(group, {}), f"{key}.{group}", owner=found)
    elif isinstance(fields, dict):
        for name, one in fields.items():
            yield from given(one, f"{key}.{name}", default=_default(owner, name))
    elif isinstance(fields, list | tuple | set):
        for one in fields:
            yield from given(one, key)
    else:
        yield Given(key, fields)


def check_given(values: Iterable[Given], typed: Collection[str] = ()) -> None:
    """Refuse values that only a user may bring.

    Args:
        values: of a configuration.
        typed: the words that a user typed.

    Raises:
        ConfigurationError: names the key.
    """
    allowed = {id(one) for one in allowed_objects()}
    users = [one for one in map(_found, _paths(typed)) if one is not _NOTHING]
    plugins: list[str] | None = None
    for one in values:
        if one.name or not isinstance(one.value, (*_PLAIN, Enum)):
            if id(one.value) in allowed or any(one.value == user for user in users):
                continue
            plugins = _plugins() if plugins is None else plugins
            if any(one.value is _found(path) is not _NOTHING for path in plugins):
                continue
            name = one.name or _canonical(one.value) or repr(one.value)[:80]
        elif isinstance(one.value, Enum) and not isinstance(one.value, str | int):
            if one.value.name in typed:
                continue
            name = f"{type(one.value).__name__}.{one.value.name}"
        elif one.value and (last := one.key.rpartition(".")[2]) in _FETCHING:
            name = f"{last}={one.value!r}"
        else:
            continue
        raise ConfigurationError(needs_trust(one.key, name))


@cache
def allowed_objects() -> tuple[Any, ...]:
    """Every class and function that any file may name, but for those of plugins."""
    from torchvision import models

    found = [_found(path) for path in SINGLE if import_module(path.rpartition(".")[0])]
    for module, base in FAMILIES.items():
        public = vars(import_module(module))
        found += [
            one
            for name, one in public.items()
            if not name.startswith("_") and isinstance(one, type) and issubclass(one, _found(base))
        ]
    found += [getattr(models, name) for name in models.list_models(module=models)]
    ours = [target.split(":") for target in (*STRATEGIES.values(), *DATAMODULES.values())]
    return (*found, *(getattr(import_module(module), name) for module, name in ours))


def canonical_names(typed: Iterable[str] = ()) -> list[str]:
    """Where what may be named is defined, which is not always where it is named.

    Args:
        typed: class paths of a user; their modules are imported.
    """
    for path in typed:
        with suppress(Exception):  # it is imported again where an error can be reported
            import_module(path.rpartition(".")[0])
    found = [*allowed_objects(), *(_found(path) for path in typed)]
    names = (_canonical(one) for one in found if one is not _NOTHING)
    return [name for name in names if name and name.partition(".")[0] not in NEVER]


def check_places(values: Iterable[Given], folder: Path, typed: Collection[str] = ()) -> None:
    """Refuse places outside of a folder, to which classes of Lightning would write.

    Args:
        values: of a configuration.
        folder: where they may lie.
        typed: the words that a user typed.

    Raises:
        ConfigurationError: names the key.
    """
    for one in values:
        if one.name or not isinstance(one.value, str | os.PathLike):
            continue
        text = os.fspath(one.value)
        argument = one.key.rpartition(".")[2]
        if text in typed:
            continue
        if argument == "filename" and not _TEMPLATE.fullmatch(text):
            raise ConfigurationError(
                f"Expected {one.key} to be a name in which braces hold a key, a number of digits and "
                f"nothing else, such as {{epoch:02d}} or {{val/loss:.3f}}, but got {text!r:.200}. Write "
                "it so, type it on the command line, or add --trust."
            )
        if argument in _PARTS and has_variable(text):
            raise ConfigurationError(
                f"Expected {one.key} to be a name without variables, but got {text!r:.200}. Write out "
                "what it stands for, type it on the command line, or add --trust."
            )
        if _leads_out(text, argument, folder):
            raise ConfigurationError(
                f"Expected {one.key} to lie below {folder}, where a file may let a run write, but got "
                f"{text!r}. Leave it out for a place there, type it on the command line, or add --trust."
            )


def _leads_out(text: str, argument: str, folder: Path) -> bool:
    """Whether a text is a place outside of a folder; a part of a name is none."""
    is_place = argument.endswith(("dir", "dirpath", "_path", "runs")) and argument != "sub_dir"
    parts = Path(text).parts
    if not is_place and not (os.path.isabs(text) or ".." in parts or text.startswith("~")):
        return ":/" in text or "::" in text
    if ":/" in text or "::" in text or "\0" in text or has_variable(text):
        return True
    return not Path(text).expanduser().resolve().is_relative_to(folder.resolve())


def _paths(typed: Collection[str]) -> Iterator[str]:
    """Class paths among words, and what a short name stands for."""
    for word in typed:
        if registry.is_class_path(word):
            yield word
        elif word.isidentifier():
            yield from (f"{module}.{word}" for module in SHORT_NAMES)


def _plugins() -> list[str]:
    known = (*registry.strategies().values(), *registry.streams().values())
    claims = [claim for one in known for claim in (one, *one.rivals)]
    return [one.class_path for one in claims if one.origin != registry.BUILT_IN]


def _found(path: str) -> Any:
    """What a path leads to, among the modules that are imported."""
    parts = path.split(".")
    for cut in range(len(parts) - 1, 0, -1):
        found: Any = sys.modules.get(".".join(parts[:cut]))
        if found is not None:
            for name in parts[cut:]:
                found = getattr(found, name, _NOTHING)
            return found
    return _NOTHING


def _canonical(one: Any) -> str:
    module, name = getattr(one, "__module__", None), getattr(one, "__qualname__", None)
    return f"{module}.{name}" if module and name else ""


def _same(value: Any, default: Any) -> bool:
    return type(value) is type(default) and bool(value == default)


def _default(owner: Any, name: str) -> Any:
    """The default of an argument of a class, or of one that it hands on to its bases."""
    for maker in owner.__mro__ if isinstance(owner, type) else () if owner is None else (owner,):
        try:
            parameter = inspect.signature(maker).parameters.get(name)
        except (TypeError, ValueError):  # made without a signature
            continue
        if parameter is not None:
            return parameter.default
    return _NOTHING
