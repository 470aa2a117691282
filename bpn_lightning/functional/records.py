r"""The layer inputs of one forward pass, and the gradients of the layer outputs.

The layer input :math:`a_n` and the gradient of the layer output :math:`\delta_n` determine the gradient
of each sample n: for a linear layer :math:`y = W a + b` it is :math:`\delta_n a_n^T`. Convolutions and
batch normalization have closed forms too. Their validity for a network is tested on one sample; the
autograd graph shows whether the parameters were used outside the recorded layer calls.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from bpn_lightning.nn.execution import graph_uses
from bpn_lightning.nn.layers import SwitchableLinear, effective_input
from bpn_lightning.nn.switching import plain_class

__all__ = [
    "Record",
    "agree",
    "differentiated",
    "least_likely",
    "logits_of",
    "recorded",
    "recorded_forward",
    "vector_gradients",
]


class Record(NamedTuple):
    r"""One call of a layer.

    Attributes:
        layer: the layer.
        layer_input: ``(n, ...)``, the effective input of its weights: multiplied by the key if it has keys.
        edge: of its output, from which ``torch.autograd.grad`` computes :math:`\delta`.
    """

    layer: nn.Module
    layer_input: Tensor
    edge: GradientEdge


@contextmanager
def recorded(layers: Iterable[nn.Module]) -> Iterator[list[Record]]:
    """Record every call of some layers inside the block."""
    records: list[Record] = []

    def note(layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        # The edge, not the tensor, because an in-place activation changes the tensor's grad_fn.
        if output.requires_grad:
            layer_input = effective_input(layer, args[0].detach())
            records.append(Record(layer, layer_input, get_gradient_edge(output)))

    handles = [layer.register_forward_hook(note) for layer in layers]
    try:
        yield records
    finally:
        for handle in handles:
            handle.remove()


def recorded_forward(
    module: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    inputs: Tensor,
    tasks: Tensor | None = None,
) -> tuple[Tensor, list[Record]] | None:
    """Logits of a batch, and a record of each layer with one of the given parameters.

    Args:
        module: maps ``(n, ...)`` to logits, in evaluation mode.
        parameters: by name within the module.
        inputs: ``(n, ...)``.
        tasks: ``(n,)``, the task ID of each sample, for a module that accepts them; None: the current
            mode.

    Returns:
        None if the records do not determine per-sample gradients: unsupported layers, layers called
        twice, tied weights, samples not along the first dimension, or parameters used outside their
        layer's recorded call. Weights computed from others have to be tested on one sample.
    """
    names = sorted({name.rpartition(".")[0] for name in parameters})
    layers = [module.get_submodule(name) for name in names]
    wanted = {id(value) for value in parameters.values()}
    uses = [id(p) for _, p in module.named_parameters(remove_duplicate=False) if id(p) in wanted]
    if len(uses) > len(wanted) or not all(_has_closed_form(layer) for layer in layers):
        return None
    with torch.enable_grad(), recorded(layers) as records:
        logits = logits_of(module, inputs, tasks)
    ran = {id(record.layer) for record in records}
    if len(ran) < len(records) or any(len(record.layer_input) != len(inputs) for record in records):
        return None
    edges = graph_uses(logits)
    noted = {id(record.layer) for record in records if record.edge.node in edges}
    for name, parameter in parameters.items():
        layer = module.get_submodule(name.rpartition(".")[0])
        found = edges[get_gradient_edge(parameter).node] if parameter.requires_grad else 0
        if found != (id(layer) in noted):
            return None
    return logits, records


def logits_of(module: nn.Module, inputs: Tensor, tasks: Tensor | None) -> Tensor:
    """The logits of a module, ``(n, classes)``, each sample in its task's mode, or all in the current one."""
    logits: Tensor = module(inputs) if tasks is None else module(inputs, task=tasks)
    return logits


def _has_closed_form(layer: nn.Module) -> bool:
    """Check the exact type: a subclass may override forward. All but scales only adds to what it computes."""
    kind = plain_class(layer)
    if "scales" in (getattr(layer, "adapters", None) or ()):
        return False
    if kind is nn.Conv2d:
        keyless = getattr(layer, "keys", None) is None
        return keyless and layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
    if kind in (nn.BatchNorm1d, nn.BatchNorm2d):
        return layer.running_mean is not None and not layer.training
    return type(layer) in (nn.Linear, SwitchableLinear)


def differentiated(
    scalar: Tensor, records: Sequence[Record], retain_graph: bool = False
) -> list[tuple[nn.Module, Tensor, Tensor]]:
    """Layer, layer input and output gradient of the layers that contribute to a scalar."""
    edges = [record.edge for record in records]
    deltas = torch.autograd.grad(scalar, edges, retain_graph=retain_graph, allow_unused=True)
    pairs = zip(records, deltas, strict=True)
    return [(r.layer, r.layer_input, delta) for r, delta in pairs if delta is not None]


def vector_gradients(layer: nn.Module, layer_input: Tensor, delta: Tensor) -> dict[str, Tensor]:
    """Per-sample gradients of the parameters that are vectors, ``(n, size)`` each."""
    if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
        if not layer.affine:
            return {}
        assert layer.running_mean is not None
        assert layer.running_var is not None
        if layer_input.dim() == 2:
            layer_input, delta = layer_input[..., None], delta[..., None]
        layer_input, delta = layer_input.flatten(2), delta.flatten(2)
        mean, variance = layer.running_mean[:, None], layer.running_var[:, None]
        normalized = (layer_input - mean) / (variance + layer.eps).sqrt()
        return {"weight": (delta * normalized).sum(2), "bias": delta.sum(2)}
    if layer.bias is None:
        return {}
    if isinstance(layer, nn.Conv2d):
        return {"bias": delta.flatten(2).sum(2)}
    return {"bias": delta if delta.dim() == 2 else delta.flatten(1, -2).sum(1)}


def least_likely(logits: Tensor) -> Tensor:
    """The least likely label per sample, ``(n,)``, whose cross-entropy always has a gradient.

    The gradient of the most likely one vanishes if the network is certain, and 0 = 0 proves nothing.
    """
    return logits.masked_fill(logits.isneginf(), float("inf")).argmin(1)


def agree(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> bool:
    """Whether tensors agree with a reference, up to a thousandth of its largest entry."""
    return all(
        bool((found[name] - value).abs().max() <= 1e-3 * value.abs().max())
        for name, value in wanted.items()
    )
