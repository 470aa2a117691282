"""From scores to tasks: scores of modes' logits, sums over the rows of a task, temperatures.

A score is larger where a task is likelier. Logits of modes are ``(tasks, n, classes)``: those of the
same samples in the mode of every task, at that task's own classes.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

__all__ = [
    "TEMPERATURES",
    "by_class",
    "by_task",
    "confidence",
    "energy",
    "mixed_logits",
    "negative_entropy",
    "of_task",
    "one_step_gradient",
    "temperature_log_likelihoods",
]

#: From 1/1000 to 1000, in steps of a quarter.
TEMPERATURES: tuple[float, ...] = tuple(10 ** (step / 10) for step in range(-30, 31))


def confidence(logits: Tensor) -> Tensor:
    r"""The log of each mode's largest probability, :math:`\max_c \log p_c` (Hendrycks and Gimpel, 2017).

    Args:
        logits: of modes, ``(tasks, n, classes)``.

    Returns:
        ``(n, tasks)``.

    >>> confidence(torch.tensor([[[0.0, 0.0]], [[0.0, 9.0]]])).argmax(1)
    tensor([1])
    """
    return logits.log_softmax(2).amax(2).T


def negative_entropy(logits: Tensor) -> Tensor:
    r"""Minus the entropy of each mode's output, :math:`\sum_c p_c \log p_c`.

    Args:
        logits: of modes, ``(tasks, n, classes)``.

    Returns:
        ``(n, tasks)``.
    """
    return -_entropy(logits).T


def energy(logits: Tensor) -> Tensor:
    r"""Minus the free energy, :math:`\log \sum_c e^{f_c}`, at temperature 1 (Liu et al., 2020).

    Args:
        logits: of modes, ``(tasks, n, classes)``.

    Returns:
        ``(n, tasks)``.
    """
    return logits.logsumexp(2).T


def one_step_gradient(
    forward: Callable[[Tensor], Tensor], samples: int, tasks: int, device: torch.device | str
) -> Tensor:
    r"""How fast the entropy of a mixture of modes falls when a mode gets more of it.

    .. math:: -\frac{\partial H(p(\alpha))}{\partial \alpha_k} \quad\text{at}\quad
        \alpha = (1/T, \dots, 1/T)

    Wortsman et al. (2020), https://arxiv.org/abs/2006.14769.

    Args:
        forward: maps weights of modes, ``(n, tasks)``, to the mixture's logits, ``(n, classes)``.
        samples: n.
        tasks: T.
        device: where the weights are to lie.

    Returns:
        ``(n, tasks)``.
    """
    with torch.enable_grad():
        alphas = torch.full((samples, tasks), 1 / tasks, device=device, requires_grad=True)
        (slope,) = torch.autograd.grad(_entropy(forward(alphas)).sum(), alphas)
    return -slope


def mixed_logits(logits: Tensor) -> Callable[[Tensor], Tensor]:
    """What :func:`one_step_gradient` asks for, where the modes' logits are what is mixed.

    Args:
        logits: of modes, ``(tasks, n, classes)``.
    """
    return lambda alphas: torch.einsum("nt,tnc->nc", alphas, logits.detach().to(alphas))


def _entropy(logits: Tensor) -> Tensor:
    # What is masked has logits of minus infinity, and 0 log 0 is 0.
    logs = logits.log_softmax(-1)
    return -(logs.exp() * logs.masked_fill(logs == -torch.inf, 0)).sum(-1)


# --- rows of a gate ------------------------------------------------------------------------------


def by_class(scores: Tensor, columns: Tensor, num_classes: int) -> Tensor:
    """The largest score of each class's rows, ``(n, num_classes)``; -inf where a class has none.

    Args:
        scores: of rows, ``(n, rows)``.
        columns: of each row, ``(rows,)`` int64.
        num_classes: at least the largest column and 1.

    >>> by_class(torch.tensor([[1.0, 3.0, 2.0]]), torch.tensor([0, 2, 0]), 3)
    tensor([[2., -inf, 3.]])
    """
    logits = scores.new_full((len(scores), num_classes), -torch.inf)
    places = columns.to(scores.device).expand(len(scores), -1)
    return logits.scatter_reduce(1, places, scores, "amax")


def of_task(scores: Tensor, tasks: Sequence[int], task: "int | Tensor | None") -> Tensor:
    """Scores of rows, with -inf for those of other tasks than the one that is given, if one is.

    Args:
        scores: of rows, ``(n, rows)``.
        tasks: of each row.
        task: of all samples, or ``(n,)``, one of each.

    >>> of_task(torch.zeros(2, 3), [0, 0, 1], torch.tensor([1, 0]))
    tensor([[-inf, -inf, 0.],
            [0., 0., -inf]])
    """
    if task is None:
        return scores
    given = torch.as_tensor(task, device=scores.device).reshape(-1, 1)
    return scores.masked_fill(torch.tensor(tasks, device=scores.device) != given, -torch.inf)


def by_task(scores: Tensor, tasks: Tensor, num_tasks: int) -> Tensor:
    """The log of the sum of what rows of the same task have.

    Args:
        scores: logs, ``(n, rows)``.
        tasks: of each row, ``(rows,)`` int64.
        num_tasks: how many columns to return; a task without rows has minus infinity.

    Returns:
        ``(n, num_tasks)``.

    >>> by_task(torch.zeros(1, 3), torch.tensor([0, 0, 1]), 2).exp()
    tensor([[2., 1.]])
    """
    index = tasks[None].expand(len(scores), -1)
    top = scores.new_full((len(scores), num_tasks), -torch.inf)
    top = top.scatter_reduce(1, index, scores, "amax")
    relative = (scores - top.gather(1, index)).exp()
    return top + torch.zeros_like(top).scatter_add(1, index, relative).log()


def temperature_log_likelihoods(scores: Tensor, tasks: Tensor, targets: Tensor) -> Tensor:
    """Summed log-probabilities of the tasks that samples are from, at each temperature.

    Args:
        scores: of rows, ``(n, rows)``.
        tasks: of each row, ``(rows,)`` int64.
        targets: of each sample, ``(n,)`` int64.

    Returns:
        ``(len(TEMPERATURES),)`` float64, sums over the samples.
    """
    scores = scores.double()
    own = (tasks[None] == targets[:, None]).log()  # 0 of the sample's own rows, else minus infinity
    sums = []
    for temperature in TEMPERATURES:
        heated = scores / temperature
        sums.append(((heated + own).logsumexp(1) - heated.logsumexp(1)).sum())
    return torch.stack(sums)
