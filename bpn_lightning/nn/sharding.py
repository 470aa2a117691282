"""A frozen backbone of which each process holds a slice, by torch's FSDP2 (``torch.distributed.fsdp.fully_shard``)."""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from bpn_lightning.errors import ConfigurationError
from bpn_lightning.nn.layers import TaskModule
from bpn_lightning.nn.loaded import loaded_class
from bpn_lightning.nn.switching import kind_of

if TYPE_CHECKING:  # slow to import; only who shards needs them
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor

__all__ = [
    "blocks",
    "check_whole",
    "full_state",
    "is_sharded",
    "replicated",
    "shard",
    "sharded_state",
]


def is_sharded(backbone: nn.Module) -> bool:
    """Whether :func:`shard` was called with a backbone."""
    return isinstance(backbone, loaded_class("torch.distributed.fsdp", "FSDPModule"))


def check_whole(backbone: nn.Module) -> None:
    """Refuse a sharded backbone where one process needs all of it.

    Raises:
        ConfigurationError: it is sharded.
    """
    if is_sharded(backbone):
        raise ConfigurationError(
            "Expected a module whose weights are whole, but its backbone is sharded over processes. Save a "
            "checkpoint with trainer.save_checkpoint, and load it in one process with "
            "ContinualModule.load_from_checkpoint."
        )


def blocks(backbone: nn.Module) -> Iterator[nn.Module]:
    """The parts whose weights are gathered together, inner ones first: what containers list, such as ViT's blocks.

    Never a layer itself, whose class has to stay as it is, nor what tasks have for themselves.
    """
    for part in backbone.children():
        if isinstance(part, TaskModule):
            continue
        yield from blocks(part)
        listed = isinstance(backbone, nn.ModuleList | nn.Sequential)
        runs = not isinstance(part, nn.ModuleList | nn.ModuleDict)
        if listed and runs and kind_of(part) is None and any(True for _ in part.parameters()):
            yield part


def shard(backbone: nn.Module, mesh: "DeviceMesh") -> None:
    """Leave each process a slice of the backbone's frozen weights, and gather them block by block where they are used.

    Parameters that train, and those that tasks have for themselves, stay whole; so do buffers. Every
    process has to run the network equally often.

    Args:
        backbone: the same on every process of the mesh; changed in place.
        mesh: of one dimension.

    Raises:
        ConfigurationError: the backbone is a single layer.
    """
    from torch.distributed.fsdp import fully_shard

    if kind_of(backbone) is not None:
        raise ConfigurationError(
            f"Expected backbone to consist of layers where it is sharded, but got {type(backbone).__name__}, which "
            "is one itself. Put it into torch.nn.Sequential."
        )
    own = {
        p for part in backbone.modules() if isinstance(part, TaskModule) for p in part.parameters()
    }
    whole = own | {p for p in backbone.parameters() if p.requires_grad}
    for part in (*blocks(backbone), backbone):
        fully_shard(part, mesh=mesh, reshard_after_forward=True, ignored_params=whole)


def full_state(state: Mapping[str, Any]) -> dict[str, Any]:
    """A ``state_dict`` with whole tensors; every process of the mesh calls this. What was sharded is on the CPU."""
    return {
        name: value.full_tensor().cpu() if _is_sharded(value) else value
        for name, value in state.items()
    }


def replicated(state: Mapping[str, Any]) -> dict[str, Any]:
    """What of a ``state_dict`` is the same on every process: all but what is sharded."""
    return {name: value for name, value in state.items() if not _is_sharded(value)}


def sharded_state(module: nn.Module, state: Mapping[str, Any]) -> dict[str, Any]:
    """A ``state_dict`` of whole tensors, the same on every process, as a module with a sharded part loads it."""
    here = {name: one for name, one in module.state_dict().items() if _is_sharded(one)}
    return {
        name: _sharded(value, here[name])
        if name in here and isinstance(value, Tensor) and value.shape == here[name].shape
        else value
        for name, value in state.items()
    }


def _is_sharded(value: object) -> bool:
    return isinstance(value, loaded_class("torch.distributed.tensor", "DTensor"))


def _sharded(value: Tensor, like: "DTensor") -> Tensor:
    from torch.distributed.tensor import distribute_tensor

    local = value.to(like.device, like.dtype)
    with torch.no_grad():
        return distribute_tensor(local, like.device_mesh, like.placements, src_data_rank=None)
