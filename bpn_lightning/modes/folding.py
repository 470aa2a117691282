"""One task's network without modes: biases, keys and adapters become a part of the layers."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from bpn_lightning.nn.adapters import Adapter, LowRank, Scales
from bpn_lightning.nn.layers import ComplexLinear, SwitchableLinear, TaskModule
from bpn_lightning.nn.switching import Switchable, SwitchableAttention, SwitchableConv, plain_class

__all__ = ["fold_layers", "make_plain"]

_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.LayerNorm, nn.GroupNorm)


def fold_layers(network: nn.Module, task: int) -> None:
    """Give the layers of a network one task's mode for good, in place.

    Linear layers, convolutions, attention and norms with biases become torch's own. Of others the banks of the
    other tasks are left out.

    Args:
        network: a copy, in evaluation mode.
        task: a row of its banks.
    """
    for part in network.modules():
        if isinstance(part, TaskModule):
            part.switch(task)
    for part in list(network.modules()):
        if isinstance(part, SwitchableLinear | Switchable):
            with torch.no_grad():
                folded = _folded(part)
            if folded:
                make_plain(part)
    for part in network.modules():
        if isinstance(part, TaskModule):
            _keep_one(part, task)


def _folded(layer: Any) -> bool:
    """Put a layer's mode into its parameters, where that can be done."""
    if isinstance(layer, ComplexLinear) or is_parametrized(layer):
        return False
    if isinstance(layer, SwitchableLinear | SwitchableConv):
        return _fold_weights(layer)
    if layer.adapters is not None or layer.bias_units is None:
        return False
    shift = layer.bias_units()[0]
    if isinstance(layer, SwitchableAttention):
        return _fold_attention(layer, shift)
    if isinstance(layer, _NORMS) and layer.bias is not None:
        layer.bias.add_(shift.view_as(layer.bias))
        return True
    return False


def _fold_attention(layer: Any, shift: Tensor) -> bool:
    if layer.in_proj_bias is None or layer.out_proj.bias is None:
        return False
    into, out = shift.tensor_split([3 * layer.embed_dim])
    layer.in_proj_bias.add_(into)
    layer.out_proj.bias.add_(out)
    return True


def _fold_weights(layer: Any) -> bool:
    adapters = [] if layer.adapters is None else [*layer.adapters.values()]
    if not all(isinstance(one, LowRank | Scales) for one in adapters):
        return False
    weight = layer.weight.detach().clone()
    bias = None if layer.bias is None else layer.bias.detach().clone()
    convolution = isinstance(layer, SwitchableConv)
    if convolution and layer.keys is not None:  # adapters see the patches before the key
        weight = _keyed(layer, weight)
    for adapter in adapters:
        weight, bias = _adapted(adapter, weight, bias)
    if not convolution and layer.keys is not None:
        weight = weight * layer.keys()
    if layer.bias_units is not None:
        shift = _whole(layer.bias_units()[0], len(weight))
        bias = shift.clone() if bias is None else bias + shift
    layer.weight = nn.Parameter(weight, requires_grad=False)
    layer.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
    return True


def _whole(shift: Tensor, outputs: int) -> Tensor:
    return torch.nn.functional.pad(shift, (0, outputs - len(shift)))


def _keyed(layer: Any, weight: Tensor) -> Tensor:
    shape = weight.shape[1:]
    signs = layer.keys().view(layer.groups, 1, *shape)
    keyed: Tensor = (weight.view(layer.groups, -1, *shape) * signs).flatten(0, 1)
    return keyed


def _adapted(adapter: Adapter, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    if isinstance(adapter, Scales):
        factors = 1 + adapter.current("scale")[0]
        scaled = weight * factors.view(-1, *(1,) * (weight.dim() - 1))
        return scaled, None if bias is None else bias * factors
    assert isinstance(adapter, LowRank)
    product = adapter.current("B")[0] @ adapter.current("A")[0].flatten(1)
    return weight + adapter.scaling * product.view_as(weight), bias


def make_plain(layer: Any) -> None:
    """Turn a switchable layer into what it was, without what tasks have in it; of a head the open outputs."""
    for part in ("bias_units", "keys", "adapters"):
        delattr(layer, part)
    number = layer.__dict__.pop("num_open", None)
    layer.__class__ = plain_class(layer)
    if number is not None:  # of a head, whose other columns are closed
        layer.out_features = number
        layer.weight = nn.Parameter(layer.weight[:number].clone(), requires_grad=False)
        if layer.bias is not None:
            layer.bias = nn.Parameter(layer.bias[:number].clone(), requires_grad=False)


def _keep_one(part: TaskModule, task: int) -> None:
    for name, bank in list(part.named_buffers(recurse=False)):
        if bank.dim() and len(bank) == part.num_tasks:
            setattr(part, name, bank[task : task + 1].clone())
    part.num_tasks = 1
    part.switch(0)
