r"""The gradient of every sample, or group of samples, from one forward and one backward.

What enters a layer, :math:`a_n`, and the gradient of its output, :math:`\delta_n`, hold the gradient
of each sample n: for a linear layer :math:`y = W a + b` it is :math:`\delta_n a_n^T`, so

- the sum of its squares is :math:`(\delta^2)^T (a^2)`, one matrix product (the Fisher information),
- the sum of its absolute values is :math:`|\delta|^T |a|` (memory aware synapses),
- the gradient of a group g of samples is :math:`\delta_g^T a_g` (episodic memories).

Convolutions and batch normalisation have closed forms too. Whether they hold in a network is tried on
one sample, and whether the layers' records are all that a batch made of their parameters is read from
its graph; everything else goes through ``torch.func`` or plain autograd.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.func import functional_call, grad, vmap
from torch.nn.grad import conv2d_weight

from bpn_lightning.nn.execution import differentiable, graph_uses
from bpn_lightning.nn.layers import SwitchableLinear, taken_input

__all__ = [
    "Record",
    "cross_entropies",
    "layer_segments",
    "layer_sums",
    "recorded",
    "recorded_forward",
    "sample_gradient_sums",
    "segment_gradients",
    "segments_have_closed_forms",
    "sums_have_closed_forms",
]

#: Elements of per-sample gradients that are held at a time: 64 MB in float32.
CHUNK = 2**24

Choose = Callable[[Tensor], tuple[Tensor, Tensor]]
Loss = Callable[[Tensor, Tensor], Tensor]
Measure = Callable[[Tensor], Tensor]


# --- what layers see -----------------------------------------------------------------------------


class Record(NamedTuple):
    r"""One run of a layer.

    Attributes:
        layer: which.
        taken: ``(n, ...)``, what its weights saw: its input, keyed where the layer has keys.
        edge: of its output, for ``torch.autograd.grad``, which gives :math:`\delta`.
    """

    layer: nn.Module
    taken: Tensor
    edge: GradientEdge


@contextmanager
def recorded(layers: Iterable[nn.Module]) -> Iterator[list[Record]]:
    """Note every run of some layers in the forwards inside."""
    records: list[Record] = []

    def note(layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        # The edge, not the tensor: an in-place activation that follows changes the tensor's own.
        if output.requires_grad:
            taken = taken_input(layer, args[0].detach())
            records.append(Record(layer, taken, get_gradient_edge(output)))

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
    """Logits of some samples, and a record of each layer that has parameters asked for.

    Args:
        module: maps ``(n, ...)`` to logits, in evaluation mode.
        parameters: by name within the module.
        inputs: ``(n, ...)``.
        tasks: ``(n,)``, each sample's task, for a module that takes them; None for the mode that holds.

    Returns:
        None where the records do not hold each sample's gradient: a layer of another kind, one that
        runs twice, tied weights, samples that are not the first dimension, a parameter that something
        else than its layer's recorded run has used. Weights that are made from others need a trial on
        one sample.
    """
    names = sorted({name.rpartition(".")[0] for name in parameters})
    layers = [module.get_submodule(name) for name in names]
    wanted = {id(value) for value in parameters.values()}
    uses = [id(p) for _, p in module.named_parameters(remove_duplicate=False) if id(p) in wanted]
    if len(uses) > len(wanted) or not all(_has_closed_form(layer) for layer in layers):
        return None
    with torch.enable_grad(), recorded(layers) as records:
        logits = _answers(module, inputs, tasks)
    ran = {id(record.layer) for record in records}
    if len(ran) < len(records) or any(len(record.taken) != len(inputs) for record in records):
        return None
    edges = graph_uses(logits)
    noted = {id(record.layer) for record in records if record.edge.node in edges}
    for name, parameter in parameters.items():
        layer = module.get_submodule(name.rpartition(".")[0])
        found = edges[get_gradient_edge(parameter).node] if parameter.requires_grad else 0
        if found != (id(layer) in noted):
            return None
    return logits, records


def _answers(module: nn.Module, inputs: Tensor, tasks: Tensor | None) -> Tensor:
    logits: Tensor = module(inputs) if tasks is None else module(inputs, task=tasks)
    return logits


def _has_closed_form(layer: nn.Module) -> bool:
    """By exact type: a subclass may have a forward of its own."""
    if type(layer) is nn.Conv2d:
        return layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
    if type(layer) in (nn.BatchNorm1d, nn.BatchNorm2d):
        return layer.running_mean is not None and not layer.training
    return type(layer) in (nn.Linear, SwitchableLinear)


# --- closed forms, layer by layer ----------------------------------------------------------------


def layer_sums(
    layer: nn.Module, taken: Tensor, delta: Tensor, weights: Tensor, measure: Measure
) -> dict[str, Tensor]:
    r"""Weighted sums over samples of a measure of each sample's own gradient.

    .. math:: \sum_n w_n\, m(\partial \ell_n / \partial \theta)

    Args:
        layer: linear, convolution or batch normalisation.
        taken: ``(n, ...)``, what its weights saw.
        delta: ``(n, ...)``, the gradient of the sum of all :math:`\ell_n` by its output.
        weights: ``(n,)``.
        measure: ``torch.square`` or ``torch.abs``: elementwise, with m(a b) = m(a) m(b).

    Returns:
        By the parameter's name within the layer, of its shape.
    """
    vectors = _sample_vectors(layer, taken, delta)
    sums = {name: weights @ measure(gradients) for name, gradients in vectors.items()}
    if isinstance(layer, nn.Linear) and delta.dim() == 2:
        sums["weight"] = (weights[:, None] * measure(delta)).T @ measure(taken)
    elif isinstance(layer, nn.Linear):
        taken, delta = taken.flatten(1, -2).mT, delta.flatten(1, -2).mT
        sums["weight"] = _outer_sums(delta, taken, weights, measure)
    elif isinstance(layer, nn.Conv2d):
        sums["weight"] = _convolution_sums(layer, taken, delta.flatten(2), weights, measure)
    return sums


def layer_segments(
    layer: nn.Module,
    taken: Tensor,
    delta: Tensor,
    sizes: Sequence[int],
    into: Mapping[str, Tensor],
) -> None:
    """Write the sums over each group of samples of their gradients.

    Args:
        layer: linear, convolution or batch normalisation.
        taken: ``(n, ...)``, what its weights saw.
        delta: ``(n, ...)``, the gradient of the loss by its output.
        sizes: samples of each group, which stand one group after another.
        into: where they go, ``(groups, *the parameter's shape)``, by the parameter's name within the
            layer; the others are not asked for.
    """
    for name, gradients in _sample_vectors(layer, taken, delta).items():
        if name in into:
            for rows, place in zip(torch.split(gradients, list(sizes)), into[name], strict=True):
                torch.sum(rows, 0, out=place)
    if "weight" not in into or not isinstance(layer, nn.Linear | nn.Conv2d):
        return
    groups = zip(
        torch.split(taken, list(sizes)),
        torch.split(delta, list(sizes)),
        into["weight"],
        strict=True,
    )
    for a, d, place in groups:
        if isinstance(layer, nn.Conv2d):
            place.copy_(_convolution_gradient(layer, a, d))
        else:
            torch.mm(d.flatten(0, -2).mT, a.flatten(0, -2), out=place)


def _sample_vectors(layer: nn.Module, taken: Tensor, delta: Tensor) -> dict[str, Tensor]:
    """Each sample's gradient of the parameters that are vectors, ``(n, size)`` each."""
    if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
        if not layer.affine:
            return {}
        assert layer.running_mean is not None
        assert layer.running_var is not None
        if taken.dim() == 2:
            taken, delta = taken[..., None], delta[..., None]
        taken, delta = taken.flatten(2), delta.flatten(2)
        mean, variance = layer.running_mean[:, None], layer.running_var[:, None]
        normalised = (taken - mean) / (variance + layer.eps).sqrt()
        return {"weight": (delta * normalised).sum(2), "bias": delta.sum(2)}
    if layer.bias is None:
        return {}
    if isinstance(layer, nn.Conv2d):
        return {"bias": delta.flatten(2).sum(2)}
    return {"bias": delta if delta.dim() == 2 else delta.flatten(1, -2).sum(1)}


def _convolution_sums(
    layer: nn.Conv2d, taken: Tensor, delta: Tensor, weights: Tensor, measure: Measure
) -> Tensor:
    """The sums of a convolution's weight, from ``delta`` ``(n, out, places)``."""
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
            delta[part].chunk(layer.groups, 1), patches.chunk(layer.groups, 1), strict=True
        )
        sums = [_outer_sums(d, p, weights[part], measure) for d, p in groups]
        total += torch.cat(sums).view_as(layer.weight)
    return total


def _convolution_gradient(layer: nn.Conv2d, taken: Tensor, delta: Tensor) -> Tensor:
    """The gradient of a convolution's weight over a group of samples."""
    gradient: Tensor = conv2d_weight(  # type: ignore[no-untyped-call]
        taken,
        layer.weight.shape,
        delta,
        layer.stride,
        layer.padding,
        layer.dilation,
        layer.groups,
    )
    return gradient


def _outer_sums(delta: Tensor, taken: Tensor, weights: Tensor, measure: Measure) -> Tensor:
    """Sum over n of w_n m(delta_n taken_n^T) for ``(n, out, places)`` and ``(n, in, places)``."""
    size = delta.shape[1] * taken.shape[1]
    total = delta.new_zeros(delta.shape[1], taken.shape[1])
    step = max(1, CHUNK // size)
    for start in range(0, len(delta), step):
        part = slice(start, start + step)
        gradients = delta[part] @ taken[part].mT
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
        labels = _least_likely(logits)[:, None]
        return labels, torch.ones_like(labels, dtype=logits.dtype)

    arguments = (module, parameters, sample, choose, columns, cross_entropies, measure)
    with differentiable(module):
        try:
            sums = _closed_sums(*arguments)
        except (RuntimeError, ValueError, IndexError):
            return False
        return sums is not None and _agree(sums, _sums_one_by_one(*arguments))


def _least_likely(logits: Tensor) -> Tensor:
    """A label per sample, ``(n,)``, whose cross-entropy has a gradient in any network.

    The likeliest one's has none in a network that is certain: 0 = 0 would prove nothing.
    """
    return logits.masked_fill(logits.isneginf(), float("inf")).argmin(1)


def _agree(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> bool:
    return all(
        bool((found[name] - value).abs().max() <= 1e-3 * value.abs().max())
        for name, value in wanted.items()
    )


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
        for layer, taken, delta in _differentiated(total, records, retain_graph=not last):
            found = layer_sums(layer, taken, delta, weights[:, column], measure)
            for key, value in found.items():
                name = names.get(id(getattr(layer, key)))
                if name is not None:
                    sums[name] += value
    return sums


def _differentiated(
    scalar: Tensor, records: Sequence[Record], retain_graph: bool = False
) -> list[tuple[nn.Module, Tensor, Tensor]]:
    """Layer, what it saw, and the scalar's gradient by its output, of those that took part."""
    edges = [record.edge for record in records]
    deltas = torch.autograd.grad(scalar, edges, retain_graph=retain_graph, allow_unused=True)
    pairs = zip(records, deltas, strict=True)
    return [(r.layer, r.taken, delta) for r, delta in pairs if delta is not None]


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


# --- gradients of groups of samples --------------------------------------------------------------


def segment_gradients(
    module: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    inputs: Tensor,
    losses_of: Callable[[Tensor, slice], Tensor],
    sizes: Sequence[int],
    *,
    tasks: Tensor | None = None,
    closed_forms: bool | None = None,
) -> Tensor:
    r"""The gradient of each group's mean loss, of all groups for about the price of one.

    .. math:: G_g = \frac{1}{n_g} \sum_{n \in g} \partial \ell_n / \partial \theta

    One forward and one backward over all samples, in which a layer's gradient is summed group by
    group; where the layers have no closed form, a forward and a backward for each group. Neither
    ``.grad`` nor the reducer of several processes is touched. Samples must not influence one another,
    so the module is to be in evaluation mode.

    Args:
        module: maps ``(n, ...)`` to logits ``(n, columns)``.
        parameters: what to differentiate by, by name within the module.
        inputs: ``(n, ...)``, one group after another.
        losses_of: maps the logits of some samples, and which of the n these are, to their losses:
            ``(part, columns)`` and a slice to ``(part,)``.
        sizes: samples of each group, at least 1; they add up to n.
        tasks: ``(n,)``, each sample's task; None for the mode that holds.
        closed_forms: whether they hold, as :func:`segments_have_closed_forms` said of this network;
            None asks it, which costs a sample.

    Returns:
        ``(groups, P)``, the parameters flattened, in their order.
    """
    if closed_forms is None:
        first = None if tasks is None else tasks[:1]
        closed_forms = segments_have_closed_forms(module, parameters, inputs[:1], tasks=first)
    arguments = (module, parameters, inputs, losses_of, sizes, tasks)
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
    """Whether one sample's gradient by the closed forms is autograd's.

    Args:
        module: maps ``(n, ...)`` to logits, in evaluation mode.
        parameters: by name within the module.
        sample: ``(1, ...)``.
        tasks: ``(1,)``, its task; None for the mode that holds.
    """

    def loss(logits: Tensor, _: slice) -> Tensor:
        return cross_entropies(logits, _least_likely(logits.detach()))

    arguments = (module, parameters, sample, loss, [1], tasks)
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
    return _agree(*parts)


def _closed_segments(
    module: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    inputs: Tensor,
    losses_of: Callable[[Tensor, slice], Tensor],
    sizes: Sequence[int],
    tasks: Tensor | None,
) -> Tensor | None:
    """From one forward and one backward; None where a layer has no closed form."""
    forward = recorded_forward(module, parameters, inputs, tasks)
    if forward is None:
        return None
    logits, records = forward
    with torch.enable_grad():
        losses = losses_of(logits, slice(0, len(inputs)))
        repeats = torch.tensor(sizes, device=losses.device)
        shares = repeats.to(losses.dtype).reciprocal()
        total = losses @ shares.repeat_interleave(repeats, output_size=len(inputs))
    counts = [value.numel() for value in parameters.values()]
    gradients = logits.new_zeros(len(sizes), sum(counts))
    places = dict(zip(map(id, parameters.values()), torch.split(gradients, counts, 1), strict=True))
    for layer, taken, delta in _differentiated(total, records):
        into = {
            name: places[id(value)].view(-1, *value.shape)
            for name, value in layer.named_parameters(recurse=False)
            if id(value) in places
        }
        layer_segments(layer, taken, delta, sizes, into)
    return gradients


def _segments_one_by_one(
    module: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    inputs: Tensor,
    losses_of: Callable[[Tensor, slice], Tensor],
    sizes: Sequence[int],
    tasks: Tensor | None,
) -> Tensor:
    """By their definition: a forward and a backward for every group."""
    gradients, start = [], 0
    for size in sizes:
        part = slice(start, start + size)
        start += size
        with torch.enable_grad():
            logits = _answers(module, inputs[part], None if tasks is None else tasks[part])
            mean = losses_of(logits, part).mean()
        found = torch.autograd.grad(mean, list(parameters.values()), allow_unused=True)
        pairs = zip(parameters.values(), found, strict=True)
        flat = [torch.zeros_like(p) if g is None else g for p, g in pairs]
        gradients.append(torch.cat([value.flatten() for value in flat]))
    return torch.stack(gradients)
