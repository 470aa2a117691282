"""Which layers of a network get task-dependent parts: by name, by wildcard, by kind, or by default."""

import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from bpn_lightning.errors import ConfigurationError, did_you_mean
from bpn_lightning.nn.layers import TaskModule, evaluation_mode
from bpn_lightning.nn.loaded import eagerly
from bpn_lightning.nn.switching import KINDS, kind_of
from bpn_lightning.random_state import seeded_generator

__all__ = [
    "KIND_NAMES",
    "chosen_layers",
    "default_layers",
    "listed",
    "named_layer",
    "undone_shifts",
]

#: What ``layers`` may name besides layers, in the order of the table of kinds.
KIND_NAMES = tuple(dict.fromkeys(kind.name for kind in KINDS.values()))

DEFAULT_KINDS = ("linear", "conv", "attention")


def listed(names: Iterable[str], most: int = 12) -> str:
    """Names with commas between them, of many the first ones."""
    every = list(names)
    rest = f" and {len(every) - most} more" if len(every) > most else ""
    return f"{', '.join(every[:most])}{rest}"


def named_layer(name: str, known: Mapping[str, nn.Module], part: str) -> nn.Module:
    """A layer by its name.

    Args:
        name: as in the network.
        known: the layers that there are to choose from.
        part: what the layer is to have, for the message.

    Raises:
        ConfigurationError: there is none that can have it.
    """
    if name not in known:
        _refuse(name, known, part)
    return known[name]


def _refuse(name: str, known: Collection[str], part: str) -> None:
    raise ConfigurationError(
        f"Expected layers to be layers of the network that can have {part}, but got {name!r}."
        f"{did_you_mean(name, {*known, *KIND_NAMES} - {name})} It has {listed(known)}."
    )


def chosen_layers(
    wanted: Sequence[str],
    known: Mapping[str, nn.Module],
    part: str,
    undone: Mapping[str, str] | None = None,
) -> list[str]:
    """The layers that some names, wildcards and kinds stand for, each once.

    Args:
        wanted: names such as ``backbone.conv1`` or ``head``, wildcards such as ``backbone.layer4.*``,
            kinds such as ``norm``.
        known: the layers that there are to choose from.
        part: what the layers are to have, for the message.
        undone: what :func:`undone_shifts` found. Wildcards and kinds stand for the normalization in the
            place of such a layer; one that is named itself is taken, with a warning.

    Raises:
        ConfigurationError: one of them stands for no layer.
    """
    undone = undone or {}
    found: list[str] = []
    for one in wanted:
        if one in known:
            found.append(one)
            continue
        names = [
            name
            for name, layer in known.items()
            if (_kind_name(layer) == one if one in KIND_NAMES else fnmatchcase(name, one))
        ]
        if not names:
            _refuse(one, known, part)
        found += [undone.get(name, name) for name in names]
    without = [f"{name} (by {undone[name]})" for name in dict.fromkeys(found) if name in undone]
    if without:
        warnings.warn(
            f"A bias or a scale before a normalization of batches is taken away again in training: of {listed(without)}. "
            "Name the normalization in layers instead.",
            stacklevel=2,
        )
    return list(dict.fromkeys(found))


def _kind_name(part: nn.Module) -> str:
    kind = kind_of(part)
    return "" if kind is None else kind.name


def default_layers(
    backbone: nn.Module, known: Mapping[str, nn.Module], part: str, undone: Mapping[str, str]
) -> list[str]:
    """Every linear, convolutional and attention layer, or the batch normalization right behind it.

    Layers that cannot have the part, or are of classes that are not known, are named in a warning.

    Args:
        backbone: the network below the head.
        known: the layers that there are to choose from.
        part: what the layers are to have, for the message.
        undone: what :func:`undone_shifts` found.
    """
    names = [name for name, layer in known.items() if _kind_name(layer) in DEFAULT_KINDS]
    unable = [
        f"{name} ({type(layer).__name__})"
        for name, layer in backbone.named_modules(prefix="backbone")
        if name not in known and _kind_name(layer) in DEFAULT_KINDS
    ]
    for without, why in (
        (unable, "they cannot have any"),
        (unknown_layers(backbone), "their classes are not torch's own"),
    ):
        if without:
            warnings.warn(
                f"The layers {listed(without)} have weights, but no {part} of the tasks, because {why}. "
                "Name the layers that are to have some in layers, which takes this warning away.",
                stacklevel=2,
            )
    return list(dict.fromkeys(undone.get(name, name) for name in names))


def unknown_layers(backbone: nn.Module) -> list[str]:
    """Parts without parts of their own that have a weight matrix, but are of no known kind."""
    inside = {
        id(part)
        for layer in backbone.modules()
        if kind_of(layer) is not None or isinstance(layer, TaskModule)
        for part in layer.modules()
    }
    return [
        f"{name} ({type(part).__name__})"
        for name, part in backbone.named_modules(prefix="backbone")
        if id(part) not in inside
        and not any(True for _ in part.children())
        and any(value.dim() > 1 for value in part.parameters(recurse=False))
    ]


def undone_shifts(
    backbone: nn.Module, layers: Mapping[str, nn.Module], inputs: Tensor
) -> dict[str, str]:
    """Layers whose output is the input of a normalization that subtracts each channel's mean.

    That takes away again what a layer adds to a channel: a bias has no effect while batches are
    normalized, and no gradient but rounding errors. Found by one dry forward in evaluation mode: the two are the same tensor.

    Args:
        backbone: the network below the head.
        layers: by name; those that are no normalizations are looked at.
        inputs: ``(batch, ...)``, of which shape, type and device matter, and the values of tokens.

    Returns:
        The name of the normalization by that of the layer.
    """
    subtracting = {
        id(part): name
        for name, part in layers.items()
        if isinstance(part, _BatchNorm | _InstanceNorm)
    }
    outputs: dict[
        int, tuple[str, Tensor, Tensor]
    ] = {}  # keeps the tensors, so that ids stay theirs
    found: dict[str, str] = {}

    def note_output(name: str) -> Any:
        def note(part: nn.Module, args: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                outputs[id(output)] = (name, output, output.clone())

        return note

    def note_input(part: nn.Module, args: tuple[Any, ...]) -> None:
        if args and id(args[0]) in outputs:
            name, output, before = outputs[id(args[0])]
            if torch.equal(output, before):  # else an activation was in place between the two
                found.setdefault(name, subtracting[id(part)])

    if not subtracting:
        return {}
    if inputs.is_floating_point():  # zeros are left alone by activations
        draw = torch.randn(inputs.shape, generator=seeded_generator("dry forward"))
        inputs = draw.to(inputs)
    handles = [
        part.register_forward_pre_hook(note_input)
        if id(part) in subtracting
        else part.register_forward_hook(note_output(name))
        for name, part in layers.items()
        if id(part) in subtracting or _kind_name(part) in DEFAULT_KINDS
    ]
    try:
        with torch.no_grad(), evaluation_mode(backbone), eagerly():
            backbone(inputs)
    finally:
        for handle in handles:
            handle.remove()
    return found
