"""The classes and values that untrusted config files may use, checked on the imported objects.

Import paths are not sufficient: ``torch.nn.modules.module.torch.load`` leads out of ``torch.nn``, and
``SplitDigits.load_from_checkpoint`` is not a stream but reads pickles. A configuration is therefore checked
after its names are resolved, and before any of them is instantiated or called. A file may name

- layers, losses and containers of ``torch.nn``; optimizers and their schedulers;
- classification networks of torchvision, without weights to download;
- classification metrics of torchmetrics;
- callbacks, profilers, and a few loggers, plugins and strategies of Lightning that write only below the
  run's folder;
- our strategies, streams, gates, fronts, backbones and callbacks, and those of registered plugins.

All of them are safe with any arguments, since arguments that are functions or classes are restricted to the
same list.
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
from bpn_lightning.errors import ConfigurationError, needs_trust
from bpn_lightning.files.writing import has_variable

__all__ = [
    "Given",
    "allowed_objects",
    "canonical_names",
    "check_given",
    "check_places",
    "given",
]

#: Modules, and the base classes of their allowed public classes.
FAMILIES = {
    "torch.nn": "torch.nn.Module",
    "torch.optim": "torch.optim.Optimizer",
    "torch.optim.lr_scheduler": "torch.optim.lr_scheduler.LRScheduler",
    "torchvision.models": "torch.nn.Module",
    "torchmetrics.classification": "torchmetrics.Metric",
    "lightning.pytorch.callbacks": "lightning.pytorch.Callback",
}

#: Individual classes and functions. Excluded are those that contact a server, need an additional package,
#: or are refused in every run.
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
    "bpn_lightning.nn.Pretrained",
    "bpn_lightning.nn.efficientnet_lite_backbone",
    "bpn_lightning.nn.timm_backbone",
    "bpn_lightning.nn.torchvision_backbone",
    "bpn_lightning.nn.transformers_backbone",
    "bpn_lightning.paper.probes.Drift",
    "bpn_lightning.paper.probes.Moves",
    "bpn_lightning.paper.probes.Regions",
    "bpn_lightning.run.checkpoints.AtomicCheckpointIO",
    "bpn_lightning.run.console.StreamProgress",
    "bpn_lightning.run.dashboards.Dashboard",
    "bpn_lightning.model.optimization.sgd",
    "bpn_lightning.trainer.sharding.ShardedCoreStrategy",
)

#: Keyword arguments of torchvision's builders that download weights, under an older name.
_FETCHING = frozenset({"pretrained", "pretrained_backbone"})

#: Types of plain values.
_PLAIN = (str, int, float, bytes, type(None), timedelta, torch.device, torch.dtype, os.PathLike)

#: Arguments that are names below these folders; loggers expand variables in some, ``filename`` is formatted.
_PARTS = frozenset({"filename", "name", "prefix", "sub_dir", "version"})

#: Format strings whose result contains only names and numbers. More general ones are unsafe:
#: ``{epoch.__class__.__name__[0:.>2.0}`` results in ``..``, and ``{/tmp/x}`` in its own name.
_TEMPLATE = re.compile(
    r"(?:[^{}]|\{[a-z_][\w/-]*(?::(?:0?[0-9]{0,2}d|\.[0-9]{1,2}f))?\})*", re.ASCII | re.IGNORECASE
)

_NOTHING = object()


class Given(NamedTuple):
    """A value of a configuration that is not a default.

    Attributes:
        key: its key, joined by dots.
        value: a plain value, or the object of a name.
        name: the class path, if there is one.
    """

    key: str
    value: Any
    name: str = ""


def given(value: Any, key: str, owner: Any = None, default: Any = _NOTHING) -> Iterator[Given]:
    """All values of a parsed configuration that are not defaults.

    Args:
        value: a value of the parser.
        key: its key.
        owner: the class or function of which the value's keys are arguments.
        default: the default.
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
    """Refuse values that need the user's trust.

    Args:
        values: of a configuration.
        typed: the words on the command line.

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
    """All classes and functions that any file may name, except those of plugins."""
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
    tables = (kind.built_in for kind in registry.KINDS.values())
    ours = [target.split(":") for table in tables for target in table.values()]
    return (*found, *(getattr(import_module(module), name) for module, name in ours))


def canonical_names(typed: Iterable[str] = ()) -> list[str]:
    """The defining import paths of allowed objects, which may differ from the paths used in configs.

    Args:
        typed: class paths from the command line; their modules are imported.
    """
    for path in typed:
        with suppress(Exception):  # imported again later, where errors are reported
            import_module(path.rpartition(".")[0])
    found = [*allowed_objects(), *(_found(path) for path in typed)]
    names = (_canonical(one) for one in found if one is not _NOTHING)
    return [name for name in names if name and name.partition(".")[0] not in NEVER]


def check_places(values: Iterable[Given], folder: Path, typed: Collection[str] = ()) -> None:
    """Refuse paths outside of a folder to which classes of Lightning would write.

    Args:
        values: of a configuration.
        folder: the allowed folder.
        typed: the words on the command line.

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
                f"Expected {one.key} to be a name in which braces contain only a key and a number of "
                f"digits, such as {{epoch:02d}} or {{val/loss:.3f}}, but got {text!r:.200}. Change it, "
                "type it on the command line, or add --trust."
            )
        if argument in _PARTS and has_variable(text):
            raise ConfigurationError(
                f"Expected {one.key} to be a name without variables, but got {text!r:.200}. Write its "
                "value instead, type it on the command line, or add --trust."
            )
        if _leads_out(text, argument, folder):
            raise ConfigurationError(
                f"Expected {one.key} to be below {folder}, the only folder where a config may let a run "
                f"write, but got {text!r}. Leave it out, type it on the command line, or add --trust."
            )


def _leads_out(text: str, argument: str, folder: Path) -> bool:
    """Whether a text is a path outside of a folder; parts of names are not paths."""
    named = argument.endswith(("dir", "dirpath", "_path", "runs")) or argument == "to"
    is_place = named and argument != "sub_dir"
    parts = Path(text).parts
    if not is_place and not (os.path.isabs(text) or ".." in parts or text.startswith("~")):
        return ":/" in text or "::" in text
    if ":/" in text or "::" in text or "\0" in text or has_variable(text):
        return True
    return not Path(text).expanduser().resolve().is_relative_to(folder.resolve())


def _paths(typed: Collection[str]) -> Iterator[str]:
    """Class paths among words, including those of short names."""
    for word in typed:
        if registry.is_class_path(word):
            yield word
        elif word.isidentifier():
            yield from (f"{module}.{word}" for module in SHORT_NAMES)


def _plugins() -> list[str]:
    known = [one for kind in registry.KINDS for one in registry.registered(kind).values()]
    claims = [claim for one in known for claim in (one, *one.rivals)]
    return [one.class_path for one in claims if one.origin != registry.BUILT_IN]


def _found(path: str) -> Any:
    """The object of an import path, if its module is imported."""
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
    """The default of an argument of a class, or of one that it passes to its base classes."""
    for maker in owner.__mro__ if isinstance(owner, type) else () if owner is None else (owner,):
        try:
            parameter = inspect.signature(maker).parameters.get(name)
        except (TypeError, ValueError):  # without a signature
            continue
        if parameter is not None:
            return parameter.default
    return _NOTHING
