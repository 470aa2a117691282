r"""Sums over samples of squared or absolute per-sample gradients, from one forward and one backward pass.

From the layer input :math:`a_n` and the gradient of the layer's output :math:`\delta_n`
(:mod:`bpn_lightning.functional.records`), for the weight of a linear layer

- the sum of squares is :math:`(\delta^2)^T (a^2)`, one matrix product (the Fisher information),
- the sum of absolute values is :math:`|\delta|^T |a|` (memory aware synapses).

Layers without a closed form use ``torch.func`` or plain autograd.
"""

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from bpn_lightning.functional.records import (
    agree,
    differentiated,
    least_likely,
    recorded_forward,
    vector_gradients,
)
from bpn_lightning.nn.execution import differentiable

__all__ = ["cross_entropies", "layer_sums", "sample_gradient_sums", "sums_have_closed_forms"]

#: Elements of per-sample gradients in memory at a time: 64 MB in float32.
CHUNK = 2**24

Choose = Callable[[Tensor], tuple[Tensor, Tensor]]
Loss = Callable[[Tensor, Tensor], Tensor]
Measure = Callable[[Tensor], Tensor]


# --- closed forms, layer by layer ----------------------------------------------------------------


def layer_sums(
    layer: nn.Module, layer_input: Tensor, delta: Tensor, weights: Tensor, measure: Measure
) -> dict[str, Tensor]:
    r"""Weighted sums over samples of a measure of per-sample gradients.

    .. math:: \sum_n w_n\, m(\partial \ell_n / \partial \theta)

    Args:
        layer: linear, convolution or batch normalization.
        layer_input: ``(n, ...)``, the effective input of its weights.
        delta: ``(n, ...)``, the gradient of the sum of all :math:`\ell_n` with respect to its output.
        weights: ``(n,)``.
        measure: ``torch.square`` or ``torch.abs``: elementwise, with m(a b) = m(a) m(b).

    Returns:
        One tensor per parameter, by its name within the layer, same shape.
    """
    vectors = vector_gradients(layer, layer_input, delta)
    sums = {name: weights @ measure(gradients) for name, gradients in vectors.items()}
    if isinstance(layer, nn.Linear) and delta.dim() == 2:
        sums["weight"] = (weights[:, None] * measure(delta)).T @ measure(layer_input)
    elif isinstance(layer, nn.Linear):
        layer_input, delta = layer_input.flatten(1, -2).mT, delta.flatten(1, -2).mT
        sums["weight"] = _outer_sums(delta, layer_input, weights, measure)
    elif isinstance(layer, nn.Conv2d):
        sums["weight"] = _convolution_sums(layer, layer_input, delta.flatten(2), weights, measure)
    return sums


def _convolution_sums(
    layer: nn.Conv2d, layer_input: Tensor, delta: Tensor, weights: Tensor, measure: Measure
) -> Tensor:
    """The sums for a convolution's weight, from ``delta`` ``(n, out, positions)``."""
    total = torch.zeros_like(layer.weight)
    # Unfolding multiplies the size of a sample by the patch size: process it in chunks.
    step = max(1, CHUNK // (layer.weight[0].numel() * layer.groups * delta.shape[2]))
    for start in range(0, len(layer_input), step):
        part = slice(start, start + step)
        patches = F.unfold(
            layer_input[part],
            layer.kernel_size,
            layer.dilation,
            layer.padding,  # type: ignore[arg-type]
            layer.stride,
        )
        groups = zip(
            delta[part].chunk(layer.groups, 1), patches.chunk(layer.groups, 1), strict=True
        )
        sums = [_outer_sums(d, p, weights[part], measure) for d, p in groups]
        total += torch.cat(sums).view_as(layer.weight)
    return total


def _outer_sums(delta: Tensor, layer_input: Tensor, weights: Tensor, measure: Measure) -> Tensor:
    """Sum over n of w_n m(delta_n a_n^T) for ``(n, out, positions)`` and ``(n, in, positions)``."""
    size = delta.shape[1] * layer_input.shape[1]
    total = delta.new_zeros(delta.shape[1], layer_input.shape[1])
    step = max(1, CHUNK // size)
    for start in range(0, len(delta), step):
        part = slice(start, start + step)
        gradients = delta[part] @ layer_input[part].mT
        total += torch.einsum("n,noi->oi", weights[part], measure(gradients))
    return total


# --- sums over samples ---------------------------------------------------------------------------


def cross_entropies(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy per sample: logits ``(n, classes)`` and labels ``(n,)`` to ``(n,)``."""
    return F.cross_entropy(logits, labels, reduction="none")


def sample_gradient_sums(
    module: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    inputs: Tensor,
    choose: Choose,
    columns: slice,
    *,
    loss: Loss = cross_entropies,
    measure: Measure = torch.square,
    closed_forms: bool | None = None,
    elements: int | None = None,
) -> dict[str, Tensor]:
    r"""Weighted sum over samples and labels of a measure of the gradient of each.

    .. math:: \sum_n \sum_l w_{nl}\, m(\partial \ell(f(x_n), y_{nl}) / \partial\theta)

    Samples must not influence one another, so the module has to be in evaluation mode.

    Args:
        module: maps ``(n, ...)`` to logits ``(n, all classes)``.
        parameters: the parameters to differentiate, by name within the module.
        inputs: ``(n, ...)``.
        choose: maps the active logits to labels and weights, ``(n, labels)`` each.
        columns: the active output units.
        loss: maps active logits and ``(n,)`` labels to ``(n,)`` losses.
        measure: ``torch.square`` or ``torch.abs``.
        closed_forms: whether closed forms are valid, the result of :func:`sums_have_closed_forms` for
            this network; None calls it, at the cost of one sample.
        elements: of a sample's gradients, which say how many samples are summed at a time; None: of all
            parameters. Those of a head's closed columns do not count.

    Returns:
        One tensor per parameter, same shape.
    """
    arguments = (module, parameters, inputs, choose, columns, loss, measure)
    if closed_forms is None:
        closed_forms = sums_have_closed_forms(module, parameters, inputs[:1], columns, measure)
    with differentiable(module):
        if closed_forms:
            sums = _closed_sums(*arguments)
            if sums is not None:
                return sums
        try:
            return _mapped_sums(*arguments, elements)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:  # torch.func does not support everything that autograd does
            return _sums_one_by_one(*arguments)


def sums_have_closed_forms(
    module: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    sample: Tensor,
    columns: slice,
    measure: Measure = torch.square,
) -> bool:
    """Whether the closed forms agree with autograd on one sample.

    Layer hooks do not notice a weight that a function also uses, a weight computed from others, or
    samples that were reshaped into positions. One sample is enough to find out, for any loss.

    Args:
        module: maps ``(n, ...)`` to logits, in evaluation mode.
        parameters: by name within the module.
        sample: ``(1, ...)``; the result is undefined for an empty one.
        columns: the active output units.
        measure: ``torch.square`` or ``torch.abs``.
    """

    def choose(logits: Tensor) -> tuple[Tensor, Tensor]:
        labels = least_likely(logits)[:, None]
        return labels, torch.ones_like(labels, dtype=logits.dtype)

    arguments = (module, parameters, sample, choose, columns, cross_entropies, measure)
    with differentiable(module):
        try:
            sums = _closed_sums(*arguments)
        except (RuntimeError, ValueError, IndexError):
            return False
        return sums is not None and agree(sums, _sums_one_by_one(*arguments))


def _closed_sums(
    module: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    inputs: Tensor,
    choose: Choose,
    columns: slice,
    loss: Loss,
    measure: Measure,
) -> dict[str, Tensor] | None:
    """The sums from layer inputs and output gradients; None if a layer has no closed form."""
    forward = recorded_forward(module, parameters, inputs)
    if forward is None:
        return None
    logits, records = forward[0][:, columns], forward[1]
    labels, weights = choose(logits.detach())
    names = {id(value): name for name, value in parameters.items()}
    sums = {name: torch.zeros_like(value) for name, value in parameters.items()}
    for column in range(labels.shape[1]):
        last = column + 1 == labels.shape[1]
        with torch.enable_grad():
            total = loss(logits, labels[:, column]).sum()
        for layer, layer_input, delta in differentiated(total, records, retain_graph=not last):
            found = layer_sums(layer, layer_input, delta, weights[:, column], measure)
            for key, value in found.items():
                name = names.get(id(getattr(layer, key)))
                if name is not None:
                    sums[name][: len(value)] += value  # a head computes its open rows only
    return sums


def _mapped_sums(
    module: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    inputs: Tensor,
    choose: Choose,
    columns: slice,
    loss: Loss,
    measure: Measure,
    elements: int | None,
) -> dict[str, Tensor]:
    """The sums from per-sample gradients, many samples at a time."""
    values = {name: value.detach() for name, value in parameters.items()}

    def of_sample(values: dict[str, Tensor], sample: Tensor, label: Tensor) -> Tensor:
        logits = functional_call(module, values, (sample[None],))[:, columns]
        return loss(logits, label[None]).sum()

    # An outer map over the labels of each sample.
    gradients = vmap(vmap(grad(of_sample), in_dims=(None, None, 0)), in_dims=(None, 0, 0))
    with torch.no_grad():
        labels, weights = choose(module(inputs)[:, columns])
    sums = {name: torch.zeros_like(value) for name, value in values.items()}
    size = (elements or sum(value.numel() for value in values.values())) * labels.shape[1]
    step = max(1, CHUNK // size)
    for start in range(0, len(inputs), step):
        part = slice(start, start + step)
        for name, value in gradients(values, inputs[part], labels[part]).items():
            sums[name] += torch.einsum("nl,nl...->...", weights[part], measure(value))
    return sums


def _sums_one_by_one(
    module: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    inputs: Tensor,
    choose: Choose,
    columns: slice,
    loss: Loss,
    measure: Measure,
) -> dict[str, Tensor]:
    """The sums by definition: one backward pass per sample and label."""
    with torch.no_grad():
        labels, weights = choose(module(inputs)[:, columns])
    sums = {name: torch.zeros_like(value) for name, value in parameters.items()}
    for sample, of_sample, weight_of in zip(inputs, labels, weights, strict=True):
        for label, weight in zip(of_sample, weight_of, strict=True):
            with torch.enable_grad():
                total = loss(module(sample[None])[:, columns], label[None]).sum()
            found = torch.autograd.grad(total, list(parameters.values()), allow_unused=True)
            for value, gradient in zip(sums.values(), found, strict=True):
                if gradient is not None:
                    value += weight * measure(gradient)
    return sums
