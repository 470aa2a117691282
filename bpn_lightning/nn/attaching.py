"""Make keys for a layer of whatever kind."""

from typing import cast

from torch import Tensor, nn

from bpn_lightning.errors import ConfigurationError
from bpn_lightning.nn.layers import (
    ComplexKeys,
    ComplexLinear,
    KernelKeys,
    Keys,
)
from bpn_lightning.nn.switching import add_parts

__all__ = ["make_keys"]


def make_keys(name: str, layer: nn.Module, kind: str, num_tasks: int, is_head: bool) -> Keys:
    """Turn a layer, in its place, into one with keys.

    Args:
        name: of the layer, for the message.
        layer: linear, or a convolution, which takes binary keys only.
        kind: ``binary`` or ``complex``.
        num_tasks: how many keys.
        is_head: whether its outputs are logits, which stay real.

    Raises:
        ConfigurationError: a layer without weights of its own is to become complex.
    """
    weight = cast(Tensor, layer.weight)
    if kind != "complex":
        convolution = not isinstance(layer, nn.Linear)
        size = weight[0].numel() * (cast(int, layer.groups) if convolution else 1)
        keys = KernelKeys(num_tasks, size) if convolution else Keys(num_tasks, size)
        add_parts(layer, keys=keys.to(weight.device))
        return keys
    assert isinstance(layer, nn.Linear)
    if "weight" not in dict(layer.named_parameters(recurse=False)):
        raise ConfigurationError(
            "Expected layers with weights of their own where keys are 'complex', but layer "
            f"{name} makes its weights from others. Set keys to 'binary', or take weight_norm "
            "and other parametrizations away."
        )
    complex_keys = ComplexKeys(num_tasks, layer.in_features)
    return ComplexLinear.make_complex(layer, complex_keys, real_output=is_head).keys
