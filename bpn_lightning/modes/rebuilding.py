"""Build a network as a file describes it, of no more than the file holds.

A record of sizes is a few bytes, and may ask for more memory than there is: their product is what counts.
So before anything is made, its bytes are compared with those of the tensors that will be put into it.
"""

import copy
from collections.abc import Mapping
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from bpn_lightning.errors import CheckpointError
from bpn_lightning.modes.fronts import rebuild_front
from bpn_lightning.nn.answering import AnsweringNetwork
from bpn_lightning.nn.attaching import numbers_per_task
from bpn_lightning.nn.feature_width import feature_width
from bpn_lightning.nn.prompts import block_width, is_block
from bpn_lightning.nn.structure import Attachment, Structure

__all__ = ["MAX_INPUT", "rebuild"]

MAX_INPUT = 2**24
"""Numbers of one input, such as 3 x 2048 x 2048 pixels; how large it is, no tensor says."""


def rebuild(
    network: AnsweringNetwork, structure: Structure, state: Mapping[str, Any], spare: int = 0
) -> None:
    """Make head, accuracy matrix and what was attached; ``state`` is loaded afterwards.

    Args:
        network: with the backbone that the file's weights are for; nothing is done twice.
        structure: as the file describes it.
        state: tensors by their names in ``network.state_dict()``, and other values.
        spare: bytes that what is attached may take beyond those of ``state``, which may lack what only
            training needs.

    Raises:
        CheckpointError: a size is none, or something is larger than all tensors of ``state`` together.
        ConfigurationError: the network was built for another stream.
    """
    tasks, num_classes, input_shape = (
        len(structure.tasks),
        structure.num_classes,
        structure.input_shape,
    )
    rebuild_front(network, structure.front, state)
    held = sum(value.nbytes for value in state.values() if isinstance(value, Tensor))
    sizes = [num_classes, *input_shape]
    if not all(type(size) is int and size > 0 for size in sizes) or prod(input_shape) > MAX_INPUT:
        raise CheckpointError(
            f"Expected a number of classes and an input of at most {MAX_INPUT:,} numbers, but got "
            f"{num_classes!r:.80} and {input_shape!r:.80}. The file is damaged or made up."
        )
    _refuse_more("an accuracy matrix", network.bytes_built(tasks), held)
    if network.head is None:
        features = _features(network.backbone, input_shape, structure.input_dtype, state)
        _refuse_more("a head", 4 * features * num_classes, held)
    network.structure.forgotten = list(structure.forgotten)
    network.build(list(structure.tasks), num_classes, input_shape, structure.input_dtype)
    attached_bytes = 0
    for one in structure.attached:
        attached_bytes += _attached_bytes(network, one)
        _refuse_more(f"{one.part} of {list(one.arguments.values())}", attached_bytes, held + spare)
        getattr(network, f"attach_{one.part}")(**one.arguments)
    network.structure.set_preparations(structure.preparations)


def _features(
    backbone: nn.Module,
    input_shape: tuple[int, ...],
    dtype: torch.dtype,
    state: Mapping[str, Any],
) -> int:
    """Width of the backbone's output, where layers that find their sizes get those of the file."""
    probe = copy.deepcopy(backbone)
    _materialize(probe, state)
    width = feature_width(probe, input_shape, dtype)
    _materialize(backbone, state)  # it fits: no weights are drawn that the file's would overwrite
    return width


def _materialize(backbone: nn.Module, state: Mapping[str, Any]) -> None:
    """Make the weights of layers that find their sizes, with those of the file and without values."""
    for name, value in [*backbone.named_parameters(), *backbone.named_buffers()]:
        if is_lazy(value):
            value.materialize(state[f"backbone.{name}"].shape)


def _attached_bytes(network: AnsweringNetwork, attachment: Attachment) -> int:
    """Of what attaching makes; a weight bank is filled with what the file holds."""
    if attachment.part == "weight_bank":
        return 0
    arguments = attachment.arguments
    layer: Any = network.get_submodule(arguments["layer"])
    tasks = len(network.tasks)
    if attachment.part == "keys":
        width = 1 if arguments["kind"] == "binary" else 4
        size: int = layer.weight[0].numel() * getattr(layer, "groups", 1)
        return width * tasks * size
    if attachment.part == "prompts":
        own = is_block(layer) and arguments["place"] in ("each", "first")
        return 4 * (tasks + 1) * int(arguments["tokens"]) * (block_width(layer) if own else 0)
    rank = int(arguments.get("rank", 0))
    row = numbers_per_task(attachment.part, layer, rank)
    live = rank + rank * row if attachment.part == "bias_units" and rank else row
    return 4 * (live + tasks * row)


def _refuse_more(what: str, needed: int, held: int) -> None:
    if needed > held:
        raise CheckpointError(
            f"Expected {what} to be within the {held:,} bytes of all tensors in the file, but got "
            f"{needed:,} bytes. The file is damaged or made up."
        )
