r"""How much each parameter matters to a task: per-sample gradients, squared and summed exactly.

For a linear layer :math:`y = W a + b` the squared gradient of sample n is
:math:`(\delta_n^2)(a_n^2)^T`, so its sum over a batch is one matrix product; convolutions and batch
normalisation have closed forms too. Everything else goes through ``torch.func``.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.func import functional_call, grad, vmap

from bpn_lightning.errors import DataError
from bpn_lightning.layers import SwitchableLinear, evaluation_mode
from bpn_lightning.tasks import ContinualHost

__all__ = ["FisherLabels", "fisher_diagonal", "squared_gradient_sums"]

FisherLabels = Literal["empirical", "sampled", "exact", "predicted"]

#: Elements of per-sample gradients that are held at a time: 64 MB in float32.
CHUNK = 2**24


def fisher_diagonal(
    host: ContinualHost,
    task_id: int,
    parameters: Mapping[str, nn.Parameter],
    labels: FisherLabels = "empirical",
    generator: torch.Generator | None = None,
) -> dict[str, Tensor]:
    r"""Diagonal of the Fisher information of a task, over its whole training part.

    .. math:: F = \frac{1}{N} \sum_n \sum_k w_k(x_n) \left(\partial \log p_k(x_n) / \partial\theta\right)^2

    with p the softmax over the task's active columns. In evaluation mode, in the task's mode, in full
    precision; leaves gradients, running statistics and the global random state alone.

    Args:
        host: the module; every process sums its own share.
        task_id: whose data, mode and columns.
        parameters: by name within the host.
        labels: w is 1 for the ``empirical`` (true), the ``predicted`` or one ``sampled`` label and
            p_k for all of them in ``exact``.
        generator: for ``sampled``, on the host's device.

    Returns:
        One tensor per parameter, same shape.

    Raises:
        DataError: the task has no samples.
    """
    module = host.network()
    sums = {name: torch.zeros_like(value) for name, value in parameters.items()}
    count = torch.zeros((), dtype=torch.float64, device=host.device)
    with host.task_mode(task_id), evaluation_mode(module):
        first, stop = host.columns(task_id)
        for batch in host.batches(task_id, "train"):
            choose = _label_choice(labels, batch.targets - first, generator)
            squares = squared_gradient_sums(
                module, parameters, batch.inputs, choose, slice(first, stop)
            )
            torch._foreach_add_(list(sums.values()), [squares[name] for name in sums])
            count += len(batch.targets)
    count = host.all_reduce(count)
    if count == 0:
        raise DataError(f"Expected task {task_id} to have training samples, but it has none.")
    return {name: host.all_reduce(value) / count.to(value.dtype) for name, value in sums.items()}


def _label_choice(
    labels: FisherLabels, targets: Tensor, generator: torch.Generator | None
) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """Map logits ``(n, classes)`` to labels and their weights, both ``(n, labels per sample)``."""

    def choose(logits: Tensor) -> tuple[Tensor, Tensor]:
        probabilities = logits.softmax(1)
        if labels == "exact":
            every = torch.arange(logits.shape[1], device=logits.device)
            return every.expand(logits.shape), probabilities
        if labels == "empirical":
            chosen = targets[:, None]
        elif labels == "predicted":
            chosen = logits.argmax(1, keepdim=True)
        else:
            chosen = torch.multinomial(probabilities, 1, generator=generator)
        return chosen, torch.ones_like(chosen, dtype=logits.dtype)

    return choose


def squared_gradient_sums(
    module: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    inputs: Tensor,
    choose: Callable[[Tensor], tuple[Tensor, Tensor]],
    columns: slice,
) -> dict[str, Tensor]:
    r"""Sum over samples and labels of the weighted, squared gradient of the cross-entropy.

    .. math:: \sum_n \sum_l w_{nl} \left(\partial \log p_{y_{nl}}(x_n) / \partial\theta\right)^2

    Samples must not influence one another, so the module is to be in evaluation mode.

    Args:
        module: maps ``(n, ...)`` to logits ``(n, all columns)``.
        parameters: what to differentiate by, by name within the module.
        inputs: ``(n, ...)``.
        choose: maps the active logits to labels and weights, ``(n, labels)`` each.
        columns: the active ones.

    Returns:
        One tensor per parameter, same shape.
    """
    arguments = (module, parameters, inputs, choose, columns)
    if _closed_form_holds(module, parameters, inputs[:1], columns):
        sums = _closed_form(*arguments)
        if sums is not None:
            return sums
    try:
        return _mapped(*arguments)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:  # torch.func cannot transform everything that autograd can
        return _one_by_one(*arguments)


# --- closed forms --------------------------------------------------------------------------------

Record = tuple[nn.Module, Tensor, GradientEdge]


def _closed_form_holds(
    module: nn.Module, parameters: Mapping[str, nn.Parameter], sample: Tensor, columns: slice
) -> bool:
    """Whether the closed forms give the square of one sample's gradient, as autograd sees it.

    A layer's hook does not see a weight that a function uses too, a weight made from others, or
    samples that were folded into places. One sample tells, at the cost of one.
    """

    def least(logits: Tensor) -> tuple[Tensor, Tensor]:
        # The likeliest one has no gradient in a network that is certain: 0 = 0 proves nothing.
        labels = logits.argmin(1, keepdim=True)
        return labels, torch.ones_like(labels, dtype=logits.dtype)

    try:
        sums = _closed_form(module, parameters, sample, least, columns)
    except (RuntimeError, ValueError, IndexError):
        return False
    if sums is None:
        return False
    wanted = _one_by_one(module, parameters, sample, least, columns)
    return all(
        bool((sums[name] - value).abs().max() <= 1e-3 * value.abs().max())
        for name, value in wanted.items()
    )


@contextmanager
def _recorded(layers: Mapping[str, nn.Module]) -> Iterator[list[Record]]:
    """Note the input and the gradient edge of the output of each layer as it runs."""
    records: list[Record] = []

    def note(layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        # The edge, not the tensor: an in-place activation that follows changes the tensor's own.
        if output.requires_grad:
            records.append((layer, args[0].detach(), get_gradient_edge(output)))

    handles = [layer.register_forward_hook(note) for layer in layers.values()]
    try:
        yield records
    finally:
        for handle in handles:
            handle.remove()


def _closed_form(
    module: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    inputs: Tensor,
    choose: Callable[[Tensor], tuple[Tensor, Tensor]],
    columns: slice,
) -> dict[str, Tensor] | None:
    """The sums from layers' inputs and output gradients; None where a layer has no closed form."""
    layers = {name.rpartition(".")[0] for name in parameters}
    parts = {name: module.get_submodule(name) for name in sorted(layers)}
    wanted = {id(value): name for name, value in parameters.items()}
    uses = [id(p) for _, p in module.named_parameters(remove_duplicate=False) if id(p) in wanted]
    if len(uses) > len(wanted) or not all(_has_closed_form(part) for part in parts.values()):
        return None  # tied weights add their gradients before they are squared
    with torch.enable_grad(), _recorded(parts) as records:
        logits = module(inputs)[:, columns]
        if len({id(layer) for layer, _, _ in records}) < len(records):
            return None  # so does a layer that runs twice
        if any(len(taken) != len(inputs) for _, taken, _ in records):
            return None  # samples are not the first dimension
        labels, weights = choose(logits.detach())
        sums = {name: torch.zeros_like(value) for name, value in parameters.items()}
        edges = [edge for _, _, edge in records]
        for column in range(labels.shape[1]):
            last = column + 1 == labels.shape[1]
            loss = F.cross_entropy(logits, labels[:, column], reduction="sum")
            deltas = torch.autograd.grad(loss, edges, retain_graph=not last, allow_unused=True)
            with torch.no_grad():
                for (layer, taken, _), delta in zip(records, deltas, strict=True):
                    if delta is None:
                        continue
                    for key, square in _squares(layer, taken, delta, weights[:, column]):
                        name = wanted.get(id(getattr(layer, key)))
                        if name is not None:
                            sums[name] += square
    return sums


def _has_closed_form(layer: nn.Module) -> bool:
    """By exact type: a subclass may have a forward of its own."""
    if type(layer) is nn.Conv2d:
        return layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
    if type(layer) in (nn.BatchNorm1d, nn.BatchNorm2d):
        return layer.running_mean is not None
    return type(layer) in (nn.Linear, SwitchableLinear)


def _squares(
    layer: nn.Module, taken: Tensor, delta: Tensor, weights: Tensor
) -> Iterator[tuple[str, Tensor]]:
    """Name and sum of squares of each parameter of one layer."""
    if isinstance(layer, nn.Linear) and delta.dim() == 2:
        weighted = weights[:, None] * delta.square()
        yield "weight", weighted.T @ taken.square()
        if layer.bias is not None:
            yield "bias", weighted.sum(0)
    elif isinstance(layer, nn.Linear):
        taken, delta = taken.flatten(1, -2), delta.flatten(1, -2)
        yield "weight", _outer_squares(delta.transpose(1, 2), taken.transpose(1, 2), weights)
        if layer.bias is not None:
            yield "bias", _weighted_squares(delta.sum(1), weights)
    elif isinstance(layer, nn.Conv2d):
        delta = delta.flatten(2)
        total = torch.zeros_like(layer.weight)
        # Unfolded, a sample is as large as its patches overlap: as many at a time as memory allows.
        step = max(1, CHUNK // (layer.weight[0].numel() * layer.groups * delta.shape[2]))
        for start in range(0, len(taken), step):
            part = slice(start, start + step)
            patches = F.unfold(
                taken[part],
                layer.kernel_size,
                layer.dilation,
                layer.padding,  # type: ignore[arg-type]
                layer.stride,
            )
            groups = zip(
                patches.chunk(layer.groups, 1), delta[part].chunk(layer.groups, 1), strict=True
            )
            squares = [_outer_squares(d, p, weights[part]) for p, d in groups]
            total += torch.cat(squares).view_as(layer.weight)
        yield "weight", total
        if layer.bias is not None:
            yield "bias", _weighted_squares(delta.sum(2), weights)
    elif isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d) and layer.affine:
        assert layer.running_mean is not None
        assert layer.running_var is not None
        if taken.dim() == 2:
            taken, delta = taken[..., None], delta[..., None]
        taken, delta = taken.flatten(2), delta.flatten(2)
        mean, variance = layer.running_mean[:, None], layer.running_var[:, None]
        normalised = (taken - mean) / (variance + layer.eps).sqrt()
        yield "weight", _weighted_squares((delta * normalised).sum(2), weights)
        yield "bias", _weighted_squares(delta.sum(2), weights)


def _weighted_squares(gradients: Tensor, weights: Tensor) -> Tensor:
    return weights @ gradients.square()


def _outer_squares(delta: Tensor, taken: Tensor, weights: Tensor) -> Tensor:
    """Sum over n of w_n (delta_n taken_n^T)^2 for ``(n, out, places)`` and ``(n, in, places)``."""
    size = delta.shape[1] * taken.shape[1]
    total = delta.new_zeros(delta.shape[1], taken.shape[1])
    step = max(1, CHUNK // size)
    for start in range(0, len(delta), step):
        part = slice(start, start + step)
        gradients = delta[part] @ taken[part].transpose(1, 2)
        total += torch.einsum("n,noi->oi", weights[part], gradients.square())
    return total


# --- any layer -----------------------------------------------------------------------------------


def _mapped(
    module: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    inputs: Tensor,
    choose: Callable[[Tensor], tuple[Tensor, Tensor]],
    columns: slice,
) -> dict[str, Tensor]:
    """The sums from each sample's own gradient, many samples at a time."""
    values = {name: value.detach() for name, value in parameters.items()}

    def loss(values: dict[str, Tensor], sample: Tensor, label: Tensor) -> Tensor:
        logits = functional_call(module, values, (sample[None],))[:, columns]
        return F.cross_entropy(logits, label[None])

    # The labels of a sample share nothing but the sample: an outer map over them.
    gradients = vmap(vmap(grad(loss), in_dims=(None, None, 0)), in_dims=(None, 0, 0))
    with torch.no_grad():
        labels, weights = choose(module(inputs)[:, columns])
    sums = {name: torch.zeros_like(value) for name, value in values.items()}
    size = sum(value.numel() for value in values.values()) * labels.shape[1]
    step = max(1, CHUNK // size)
    for start in range(0, len(inputs), step):
        part = slice(start, start + step)
        for name, value in gradients(values, inputs[part], labels[part]).items():
            sums[name] += torch.einsum("nl,nl...->...", weights[part], value.square())
    return sums


def _one_by_one(
    module: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    inputs: Tensor,
    choose: Callable[[Tensor], tuple[Tensor, Tensor]],
    columns: slice,
) -> dict[str, Tensor]:
    """The sums by their definition: one backward for every sample and label."""
    with torch.no_grad():
        labels, weights = choose(module(inputs)[:, columns])
    sums = {name: torch.zeros_like(value) for name, value in parameters.items()}
    for sample, of_sample, weight_of in zip(inputs, labels, weights, strict=True):
        for label, weight in zip(of_sample, weight_of, strict=True):
            with torch.enable_grad():
                loss = F.cross_entropy(module(sample[None])[:, columns], label[None])
            found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
            for total, gradient in zip(sums.values(), found, strict=True):
                if gradient is not None:
                    total += weight * gradient.square()
    return sums
