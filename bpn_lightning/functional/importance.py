r"""Importance of each parameter to a task: exact averages of measures of per-sample gradients.

.. math:: \Omega = \frac{1}{N} \sum_n m(\partial \ell_n / \partial \theta)

with squared gradients of the log-likelihood for the Fisher information, and absolute gradients of the
squared output norm for memory aware synapses. The gradients are computed in
:mod:`bpn_lightning.functional.gradients`.
"""

from collections.abc import Callable, Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from bpn_lightning.errors import DataError
from bpn_lightning.functional.gradients import (
    Choose,
    Loss,
    Measure,
    cross_entropies,
    sample_gradient_sums,
    sums_have_closed_forms,
)
from bpn_lightning.host import ContinualHost
from bpn_lightning.nn.layers import evaluation_mode
from bpn_lightning.nn.network import ContinualNetwork
from bpn_lightning.tasks import Batch

__all__ = [
    "FisherLabels",
    "fisher_diagonal",
    "mean_over_task",
    "output_sensitivity",
    "squared_lengths",
]

FisherLabels = Literal["empirical", "sampled", "exact", "predicted"]


def mean_over_task(
    host: ContinualHost,
    task_id: int,
    like: Mapping[str, Tensor],
    sums_of: Callable[[Batch, slice], Mapping[str, Tensor]],
) -> dict[str, Tensor]:
    """Means over all training samples of a task, from sums over batches.

    Computed in evaluation mode, in the task's mode, without augmentation, in full precision; each sample
    counts once over all processes. Does not change gradients, running statistics or the global random
    state.

    Args:
        host: the module; each process sums over its shard.
        task_id: ID of the task.
        like: tensors with the shapes of the sums, by name.
        sums_of: maps a batch and the task's active output units to sums over its samples, by name.

    Returns:
        One tensor per name, with the given shape.

    Raises:
        DataError: the task has no samples.
    """
    sums = {name: torch.zeros_like(value) for name, value in like.items()}
    count = torch.zeros((), dtype=torch.float64, device=host.device)
    with host.network.task_mode(task_id), evaluation_mode(host.network):
        columns = slice(*host.network.columns(task_id))
        for batch in host.batches(task_id, "train"):
            found = sums_of(batch, columns)
            if sums:
                torch._foreach_add_(list(sums.values()), [found[name] for name in sums])
            count += len(batch.targets)
    count = host.all_reduce(count)
    if count == 0:
        raise DataError(f"Expected task {task_id} to have training samples, but it has none.")
    return {name: host.all_reduce(value) / count.to(value.dtype) for name, value in sums.items()}


def _measured(
    module: ContinualNetwork,
    parameters: Mapping[str, nn.Parameter],
    loss: Loss,
    measure: Measure,
) -> Callable[[Tensor, Choose, slice], dict[str, Tensor]]:
    """Sums over the samples of a batch; closed forms are validated on the first batch."""
    known: list[bool] = []

    def sums(inputs: Tensor, choose: Choose, columns: slice) -> dict[str, Tensor]:
        if not known and len(inputs):  # this process's shard of a batch may be empty
            sample = inputs[:1]
            known.append(sums_have_closed_forms(module, parameters, sample, columns, measure))
        return sample_gradient_sums(
            module,
            parameters,
            inputs,
            choose,
            columns,
            loss=loss,
            measure=measure,
            closed_forms=known == [True],
            elements=sum(module.open_part(*item).numel() for item in parameters.items()),
        )

    return sums


# --- Fisher information --------------------------------------------------------------------------


def fisher_diagonal(
    host: ContinualHost,
    task_id: int,
    parameters: Mapping[str, nn.Parameter],
    labels: FisherLabels = "empirical",
    generator: torch.Generator | None = None,
) -> dict[str, Tensor]:
    r"""Diagonal of the Fisher information of a task, over all its training samples.

    .. math:: F = \frac{1}{N} \sum_n \sum_k w_k(x_n) \left(\partial \log p_k(x_n) / \partial\theta\right)^2

    with p the softmax over the task's active classes. See :func:`mean_over_task` for modes and side
    effects.

    Args:
        host: the module; each process sums over its shard.
        task_id: ID of the task.
        parameters: by name within the host.
        labels: w is 1 for the ``empirical`` (true), the ``predicted`` or one ``sampled`` label, and
            p_k for all labels with ``exact``.
        generator: for ``sampled``, on the host's device; in the same state on every process, since each
            draws for the global batch and uses its shard.

    Returns:
        One tensor per parameter, same shape.

    Raises:
        DataError: the task has no samples.
    """
    sums_of = _measured(host.network, parameters, cross_entropies, torch.square)

    def squares(batch: Batch, columns: slice) -> dict[str, Tensor]:
        draws = batch.inputs.new_empty(0)
        if labels == "sampled":
            whole = torch.rand(batch.global_size, generator=generator, device=host.device)
            draws = whole[batch.start : batch.start + len(batch.targets)]
        choose = _label_choice(labels, batch.targets - columns.start, draws)
        return sums_of(batch.inputs, choose, columns)

    return mean_over_task(host, task_id, parameters, squares)


def _label_choice(
    labels: FisherLabels, targets: Tensor, draws: Tensor
) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """A function of logits ``(n, classes)`` that returns labels and weights, ``(n, labels per sample)``.

    ``draws`` are ``(n,)`` uniform random numbers, for ``sampled`` only.
    """

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
            passed = probabilities.cumsum(1) <= draws[:, None]
            chosen = passed.sum(1, keepdim=True).clamp(max=logits.shape[1] - 1)  # rounding
        return chosen, torch.ones_like(chosen, dtype=logits.dtype)

    return choose


# --- memory aware synapses -----------------------------------------------------------------------


def output_sensitivity(
    host: ContinualHost, task_id: int, parameters: Mapping[str, nn.Parameter]
) -> dict[str, Tensor]:
    r"""Sensitivity of the squared norm of a task's logits to each parameter.

    .. math:: \Omega = \frac{1}{N} \sum_n \left|\partial \|f(x_n)\|_2^2 / \partial\theta\right|

    with f the logits of the task's active classes. The absolute value is per sample; labels are not
    used. See :func:`mean_over_task` for modes and side effects.

    Args:
        host: the module; each process sums over its shard.
        task_id: ID of the task.
        parameters: by name within the host.

    Returns:
        One tensor per parameter, same shape.

    Raises:
        DataError: the task has no samples.
    """
    sums_of = _measured(host.network, parameters, squared_lengths, torch.abs)

    def absolutes(batch: Batch, columns: slice) -> dict[str, Tensor]:
        return sums_of(batch.inputs, _no_label, columns)

    return mean_over_task(host, task_id, parameters, absolutes)


def squared_lengths(logits: Tensor, _: Tensor) -> Tensor:
    """Squared norms of logits, ``(n, classes)`` to ``(n,)``; labels are ignored."""
    return logits.square().sum(1)


def _no_label(logits: Tensor) -> tuple[Tensor, Tensor]:
    """A single dummy label per sample, with weight 1."""
    labels = torch.zeros(len(logits), 1, dtype=torch.long, device=logits.device)
    return labels, torch.ones_like(labels, dtype=logits.dtype)
