r"""How much each parameter matters to a task: measures of per-sample gradients, averaged exactly.

.. math:: \Omega = \frac{1}{N} \sum_n m(\partial \ell_n / \partial \theta)

with squares of log-likelihoods' gradients for the Fisher information and absolute values of the
squared output's for memory aware synapses. How the gradients are had is in
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
    """Means over a task's whole training part of what is summed over each batch's samples.

    In evaluation mode, in the task's mode, without augmentation, in full precision; each sample of all
    processes counts once. Leaves gradients, running statistics and the global random state alone.

    Args:
        host: the module; every process sums its own share.
        task_id: whose data and mode.
        like: tensors of the shapes of what is summed, by name.
        sums_of: maps a batch and the task's active columns to sums over its samples, by name.

    Returns:
        One tensor per name, of its shape.

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
    module: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    loss: Loss,
    measure: Measure,
) -> Callable[[Tensor, Choose, slice], dict[str, Tensor]]:
    """Sums over the samples of a batch; the first batch tells whether closed forms hold."""
    known: list[bool] = []

    def sums(inputs: Tensor, choose: Choose, columns: slice) -> dict[str, Tensor]:
        if not known and len(inputs):  # this process's share of a batch may be none
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
    r"""Diagonal of the Fisher information of a task, over its whole training part.

    .. math:: F = \frac{1}{N} \sum_n \sum_k w_k(x_n) \left(\partial \log p_k(x_n) / \partial\theta\right)^2

    with p the softmax over the task's active columns. See :func:`mean_over_task` for what it leaves
    alone.

    Args:
        host: the module; every process sums its own share.
        task_id: whose data, mode and columns.
        parameters: by name within the host.
        labels: w is 1 for the ``empirical`` (true), the ``predicted`` or one ``sampled`` label and
            p_k for all of them in ``exact``.
        generator: for ``sampled``, on the host's device; the same on every process, which draws for
            whole batches and uses its share.

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
    """Map logits ``(n, classes)`` to labels and their weights, both ``(n, labels per sample)``.

    ``draws`` are ``(n,)`` uniform numbers, for ``sampled`` only.
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
    r"""How much the squared length of a task's logits follows each parameter.

    .. math:: \Omega = \frac{1}{N} \sum_n \left|\partial \|f(x_n)\|_2^2 / \partial\theta\right|

    with f the task's active columns. Each sample's gradient before its absolute value; no labels. See
    :func:`mean_over_task` for what it leaves alone.

    Args:
        host: the module; every process sums its own share.
        task_id: whose data, mode and columns.
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
    """``(n, columns)`` to ``(n,)``, whatever the labels."""
    return logits.square().sum(1)


def _no_label(logits: Tensor) -> tuple[Tensor, Tensor]:
    """One scalar per sample, of weight 1."""
    labels = torch.zeros(len(logits), 1, dtype=torch.long, device=logits.device)
    return labels, torch.ones_like(labels, dtype=logits.dtype)
