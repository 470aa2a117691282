r"""Sums over samples of a measure of each one's gradient, from one forward and one backward.

With what enters a layer, :math:`a_n`, and the gradient of its output, :math:`\delta_n`
(:mod:`bpn_lightning.functional.records`), of a linear layer's weight

- the sum of the squares is :math:`(\delta^2)^T (a^2)`, one matrix product (the Fisher information),
- the sum of the absolute values is :math:`|\delta|^T |a|` (memory aware synapses).

What has no closed form goes through ``torch.func`` or plain autograd.
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

#: Elements of per-sample gradients that are held at a time: 64 MB in float32.
CHUNK = 2**24

Choose = Callable[[Tensor], tuple[Tensor, Tensor]]
Loss = Callable[[Tensor, Tensor], Tensor]
Measure = Callable[[Tensor], Tensor]


# --- closed forms, layer by layer ----------------------------------------------------------------


def layer_sums(
    layer: nn.Module, layer_input: Tensor, delta: Tensor, weights: Tensor, measure: Measure
) -> dict[str, Tensor]:
    r"""Weighted sums over samples of a measure of each sample's own gradient.

    .. math:: \sum_n w_n\, m(\partial \ell_n / \partial \theta)

    Args:
        layer: linear, convolution or batch normalization.
        layer_input: ``(n, ...)``, what its weights saw.
        delta: ``(n, ...)``, the gradient of the sum of all :math:`\ell_n` by its output.
        weights: ``(n,)``.
        measure: ``torch.square`` or ``torch.abs``: elementwise, with m(a b) = m(a) m(b).

    Returns:
        By the parameter's name within the layer, of its shape.
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
    """The sums of a convolution's weight, from ``delta`` ``(n, out, places)``."""
    total = torch.zeros_like(layer.weight)
    # Unfolded, a sample is as large as its patches overlap: as many at a time as memory allows.
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
    """Sum over n of w_n m(delta_n taken_n^T) for ``(n, out, places)`` and ``(n, in, places)``."""
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
    """``(n, classes)`` and ``(n,)`` to ``(n,)``."""
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
) -> dict[str, Tensor]:
    r"""Sum over samples and labels of a weighted measure of each one's gradient.

    .. math:: \sum_n \sum_l w_{nl}\, m(\partial \ell(f(x_n), y_{nl}) / \partial\theta)

    Samples must not influence one another, so the module is to be in evaluation mode.

    Args:
        module: maps ``(n, ...)`` to logits ``(n, all columns)``.
        parameters: what to differentiate by, by name within the module.
        inputs: ``(n, ...)``.
        choose: maps the active logits to labels and weights, ``(n, labels)`` each.
        columns: the active ones.
        loss: maps active logits and ``(n,)`` labels to ``(n,)`` losses.
        measure: ``torch.square`` or ``torch.abs``.
        closed_forms: whether they hold, as :func:`sums_have_closed_forms` said of this network; None
            asks it, which costs a sample.

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
            return _mapped_sums(*arguments)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:  # torch.func cannot transform everything that autograd can
            return _sums_one_by_one(*arguments)


def sums_have_closed_forms(
    module: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    sample: Tensor,
    columns: slice,
    measure: Measure = torch.square,
) -> bool:
    """Whether the closed forms give the measure of one sample's gradient, as autograd sees it.

    A layer's hook does not see a weight that a function uses too, a weight made from others, or
    samples that were folded into places. One sample tells, at the cost of one, for any loss.

    Args:
        module: maps ``(n, ...)`` to logits, in evaluation mode.
        parameters: by name within the module.
        sample: ``(1, ...)``; of none at all nothing can be told.
        columns: the active ones.
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
    """The sums from layers' inputs and output gradients; None where a layer has no closed form."""
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
                    sums[name] += value
    return sums


def _mapped_sums(
    module: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    inputs: Tensor,
    choose: Choose,
    columns: slice,
    loss: Loss,
    measure: Measure,
) -> dict[str, Tensor]:
    """The sums from each sample's own gradient, many samples at a time."""
    values = {name: value.detach() for name, value in parameters.items()}

    def of_sample(values: dict[str, Tensor], sample: Tensor, label: Tensor) -> Tensor:
        logits = functional_call(module, values, (sample[None],))[:, columns]
        return loss(logits, label[None]).sum()

    # The labels of a sample share nothing but the sample: an outer map over them.
    gradients = vmap(vmap(grad(of_sample), in_dims=(None, None, 0)), in_dims=(None, 0, 0))
    with torch.no_grad():
        labels, weights = choose(module(inputs)[:, columns])
    sums = {name: torch.zeros_like(value) for name, value in values.items()}
    size = sum(value.numel() for value in values.values()) * labels.shape[1]
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
    """The sums by their definition: one backward for every sample and label."""
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
