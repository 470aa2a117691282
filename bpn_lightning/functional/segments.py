r"""Gradients of several groups of samples from one forward and one backward pass.

For a linear layer the gradient of a group g is :math:`\delta_g^T a_g`, from the
:mod:`bpn_lightning.functional.records` of its samples; layers without a closed form need one forward and
backward pass per group. Used for episodic memories, with one group per past task.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.grad import conv2d_weight

from bpn_lightning.functional.gradients import cross_entropies
from bpn_lightning.functional.records import (
    agree,
    differentiated,
    least_likely,
    logits_of,
    recorded_forward,
    vector_gradients,
)
from bpn_lightning.nn.execution import differentiable

__all__ = ["layer_segments", "segment_gradients", "segments_have_closed_forms"]


def layer_segments(
    layer: nn.Module,
    layer_input: Tensor,
    delta: Tensor,
    sizes: Sequence[int],
    into: Mapping[str, Tensor],
) -> None:
    """Write the sum of gradients over each group of samples.

    Args:
        layer: linear, convolution or batch normalization.
        layer_input: ``(n, ...)``, the effective input of its weights.
        delta: ``(n, ...)``, the gradient of the loss with respect to its output.
        sizes: number of samples of each group; samples are ordered by group.
        into: output tensors, ``(groups, *parameter shape)``, by the parameter's name within the layer;
            other parameters are skipped, and rows of outputs that a head does not compute.
    """
    for name, gradients in vector_gradients(layer, layer_input, delta).items():
        if name in into:
            for rows, place in zip(torch.split(gradients, list(sizes)), into[name], strict=True):
                torch.sum(rows, 0, out=place[: rows.shape[1]])
    if "weight" not in into or not isinstance(layer, nn.Linear | nn.Conv2d):
        return
    groups = zip(
        torch.split(layer_input, list(sizes)),
        torch.split(delta, list(sizes)),
        into["weight"],
        strict=True,
    )
    for a, d, place in groups:
        if isinstance(layer, nn.Conv2d):
            place.copy_(_convolution_gradient(layer, a, d))
        else:
            torch.mm(d.flatten(0, -2).mT, a.flatten(0, -2), out=place[: d.shape[-1]])


def _convolution_gradient(layer: nn.Conv2d, layer_input: Tensor, delta: Tensor) -> Tensor:
    """The gradient of a convolution's weight over a group of samples."""
    gradient: Tensor = conv2d_weight(  # type: ignore[no-untyped-call]
        layer_input,
        layer.weight.shape,
        delta,
        layer.stride,
        layer.padding,
        layer.dilation,
        layer.groups,
    )
    return gradient


def segment_gradients(
    module: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    inputs: Tensor,
    losses_of: Callable[[Tensor, slice], Tensor],
    sizes: Sequence[int],
    *,
    tasks: Tensor | None = None,
    closed_forms: bool | None = None,
    rows: Mapping[str, int] | None = None,
) -> Tensor:
    r"""The gradient of each group's mean loss, for all groups at about the cost of one.

    .. math:: G_g = \frac{1}{n_g} \sum_{n \in g} \partial \ell_n / \partial \theta

    One forward and one backward pass over all samples, in which layer gradients are summed per group;
    layers without a closed form need one forward and backward pass per group. ``.grad`` and the DDP
    reducer are not involved. Samples must not influence one another, so the module has to be in
    evaluation mode.

    Args:
        module: maps ``(n, ...)`` to logits ``(n, classes)``.
        parameters: the parameters to differentiate, by name within the module.
        inputs: ``(n, ...)``, ordered by group.
        losses_of: maps the logits of some samples, ``(part, classes)``, and their slice of the n samples
            to their losses, ``(part,)``.
        sizes: number of samples of each group, at least 1; the sum is n.
        tasks: ``(n,)``, the task ID of each sample; None: the current mode.
        closed_forms: whether closed forms are valid, the result of :func:`segments_have_closed_forms` for
            this network; None calls it, at the cost of one sample.
        rows: how many rows of some parameters are differentiated, from the first on; the others, such
            as those of a head's closed columns, are left out.

    Returns:
        ``(groups, P)``, the parameters flattened, in their order.
    """
    if closed_forms is None:
        first = None if tasks is None else tasks[:1]
        closed_forms = segments_have_closed_forms(module, parameters, inputs[:1], tasks=first)
    arguments = (module, parameters, inputs, losses_of, sizes, tasks, rows or {})
    with differentiable(module):
        gradients = _closed_segments(*arguments) if closed_forms else None
        return _segments_one_by_one(*arguments) if gradients is None else gradients


def segments_have_closed_forms(
    module: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    sample: Tensor,
    *,
    tasks: Tensor | None = None,
) -> bool:
    """Whether the closed forms agree with autograd on one sample.

    Args:
        module: maps ``(n, ...)`` to logits, in evaluation mode.
        parameters: by name within the module.
        sample: ``(1, ...)``.
        tasks: ``(1,)``, its task ID; None: the current mode.
    """

    def loss(logits: Tensor, _: slice) -> Tensor:
        return cross_entropies(logits, least_likely(logits.detach()))

    rows: dict[str, int] = {}
    arguments = (module, parameters, sample, loss, [1], tasks, rows)
    with differentiable(module):
        try:
            found = _closed_segments(*arguments)
        except (RuntimeError, ValueError, IndexError):
            return False
        if found is None:
            return False
        wanted = _segments_one_by_one(*arguments)
    sizes = [value.numel() for value in parameters.values()]
    parts = [dict(zip(parameters, torch.split(g[0], sizes), strict=True)) for g in (found, wanted)]
    return agree(*parts)


def _closed_segments(
    module: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    inputs: Tensor,
    losses_of: Callable[[Tensor, slice], Tensor],
    sizes: Sequence[int],
    tasks: Tensor | None,
    rows: Mapping[str, int],
) -> Tensor | None:
    """From one forward and one backward pass; None if a layer has no closed form."""
    forward = recorded_forward(module, parameters, inputs, tasks)
    if forward is None:
        return None
    logits, records = forward
    with torch.enable_grad():
        losses = losses_of(logits, slice(0, len(inputs)))
        repeats = torch.tensor(sizes, device=losses.device)
        shares = repeats.to(losses.dtype).reciprocal()
        total = losses @ shares.repeat_interleave(repeats, output_size=len(inputs))
    leading = {name: _leading(value, rows.get(name)) for name, value in parameters.items()}
    counts = [value.numel() for value in leading.values()]
    gradients = logits.new_zeros(len(sizes), sum(counts))
    places = {
        id(parameters[name]): part.view(-1, *leading[name].shape)
        for name, part in zip(leading, torch.split(gradients, counts, 1), strict=True)
    }
    for layer, layer_input, delta in differentiated(total, records):
        into = {
            name: places[id(value)]
            for name, value in layer.named_parameters(recurse=False)
            if id(value) in places
        }
        layer_segments(layer, layer_input, delta, sizes, into)
    return gradients


def _segments_one_by_one(
    module: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    inputs: Tensor,
    losses_of: Callable[[Tensor, slice], Tensor],
    sizes: Sequence[int],
    tasks: Tensor | None,
    rows: Mapping[str, int],
) -> Tensor:
    """By definition: one forward and backward pass per group."""
    gradients, start = [], 0
    for size in sizes:
        part = slice(start, start + size)
        start += size
        with torch.enable_grad():
            logits = logits_of(module, inputs[part], None if tasks is None else tasks[part])
            mean = losses_of(logits, part).mean()
        found = torch.autograd.grad(mean, list(parameters.values()), allow_unused=True)
        pairs = zip(parameters.values(), found, strict=True)
        flat = [torch.zeros_like(p) if g is None else g for p, g in pairs]
        named = zip(parameters, flat, strict=True)
        parts = [_leading(value, rows.get(name)).flatten() for name, value in named]
        gradients.append(torch.cat(parts))
    return torch.stack(gradients)


def _leading(tensor: Tensor, rows: int | None) -> Tensor:
    return tensor if rows is None else tensor[:rows]
