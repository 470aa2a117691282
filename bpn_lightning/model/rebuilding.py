"""Build a network as a file describes it, of no more than the file holds.

A record of sizes is a few bytes, and may ask for more memory than there is: their product is what counts.
So before anything is made, its bytes are compared with those of the tensors that will be put into it.
"""

import copy
from collections.abc import Iterable, Mapping, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from bpn_lightning.errors import CheckpointError
from bpn_lightning.model.network import ContinualNetwork
from bpn_lightning.tasks import Task

__all__ = ["MAX_INPUT", "rebuild"]

MAX_INPUT = 2**24
"""Numbers of one input, such as 3 x 2048 x 2048 pixels; how large it is, no tensor says."""


def rebuild(
    network: ContinualNetwork,
    tasks: Sequence[Task],
    num_classes: int,
    input_shape: tuple[int, ...],
    dtype: torch.dtype,
    attached: Iterable[Sequence[Any]],
    state: Mapping[str, Any],
) -> None:
    """Make head, accuracy matrix and what was attached; ``state`` is loaded afterwards.

    Args:
        network: with the backbone that the file's weights are for; nothing is done twice.
        tasks: of the stream.
        num_classes: outputs of the head.
        input_shape: of one input.
        dtype: of prepared inputs.
        attached: kind and arguments of each of ``network``'s ``attach_...`` methods.
        state: tensors by their names in ``network.state_dict()``, and other values.

    Raises:
        CheckpointError: a size is none, or something is larger than all tensors of ``state`` together.
    """
    held = sum(value.nbytes for value in state.values() if isinstance(value, Tensor))
    sizes = [num_classes, *input_shape]
    if not all(type(size) is int and size > 0 for size in sizes) or prod(input_shape) > MAX_INPUT:
        raise CheckpointError(
            f"Expected a number of classes and an input of at most {MAX_INPUT:,} numbers, but got "
            f"{num_classes!r:.80} and {input_shape!r:.80}. The file is damaged or made up."
        )
    _refuse_more("an accuracy matrix", 8 * len(tasks) * (len(tasks) + 1), held)
    if network.head is None:
        features = _features(network.backbone, input_shape, dtype, state)
        _refuse_more("a head", 4 * features * num_classes, held)
    network._build(list(tasks), num_classes, input_shape, dtype)
    attached_bytes = 0
    for kind, *arguments in attached:
        attached_bytes += _attached_bytes(network, kind, arguments)
        _refuse_more(f"{kind} of {arguments}", attached_bytes, held)
        getattr(network, f"attach_{kind}")(*arguments)


def _features(
    backbone: nn.Module,
    input_shape: tuple[int, ...],
    dtype: torch.dtype,
    state: Mapping[str, Any],
) -> int:
    """Width of the backbone's output, where layers that find their sizes get those of the file."""
    probe = ContinualNetwork(copy.deepcopy(backbone))
    for name, value in [*probe.named_parameters(), *probe.named_buffers()]:
        if is_lazy(value):
            value.materialize(state[name].shape)
    return probe._features(input_shape, dtype)


def _attached_bytes(network: ContinualNetwork, kind: str, arguments: Sequence[Any]) -> int:
    """Of what attaching makes; a weight bank is filled with what the file holds."""
    if kind == "weight_bank":
        return 0
    layer: Any = network.get_submodule(arguments[0])
    tasks = len(network.tasks)
    if kind == "keys":
        width = 1 if arguments[1] == "binary" else 4
        size: int = layer.weight[0].numel() * getattr(layer, "groups", 1)
        return width * tasks * size
    rank, out = int(arguments[1]), int(layer.out_features)
    return 4 * (rank + rank * out + tasks * out)


def _refuse_more(what: str, needed: int, held: int) -> None:
    if needed > held:
        raise CheckpointError(
            f"Expected {what} to be within the {held:,} bytes of all tensors in the file, but got "
            f"{needed:,} bytes. The file is damaged or made up."
        )
