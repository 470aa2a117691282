r"""Quadratic penalties :math:`\lambda \sum_i \Omega_i (\theta_i - \mu_i)^2`: their sum, gradient and proximal step."""

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = [
    "add_penalty_grad_",
    "gradient_coefficients",
    "merged_quadratic",
    "proximal_step_",
    "proximal_weights",
]


def merged_quadratic(
    importance: Tensor, anchor: Tensor, added: Tensor, solution: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    r"""The sum of two penalties as one with a constant.

    .. math:: A (\theta - \mu)^2 + F (\theta - \theta^*)^2
        = (A + F) (\theta - \mu')^2 + C, \quad \mu' = \mu + \frac{F}{A + F} (\theta^* - \mu)

    As a moving mean, which keeps differences small where sums of F theta would cancel. Where nothing is
    important the anchor is the last solution.

    Args:
        importance: A, at least 0, any shape, as all of them.
        anchor: mu.
        added: F, at least 0.
        solution: theta*.

    Returns:
        A + F and mu', in the precision of the arguments, and C summed, a scalar in double precision.
    """
    total, gap = importance.double() + added, solution.double() - anchor
    weight = torch.where(total > 0, added.double() / total, torch.ones_like(total))
    constant = (importance * weight * gap.square()).sum()
    mean = torch.lerp(anchor.double(), solution.double(), weight)  # exact at a weight of 0 and of 1
    return total.to(added.dtype), mean.to(solution.dtype), constant


def gradient_coefficients(
    importances: Sequence[Tensor], strength: float, rates: Sequence[float] | None = None
) -> list[Tensor]:
    r"""What gaps :math:`\theta - \mu` are multiplied by in the gradient: :math:`2 \lambda \Omega`.

    Args:
        importances: one tensor per parameter.
        strength: lambda.
        rates: learning rates; with them, a coefficient is at most 1 / rate: one step of plain gradient descent
            reaches the anchor and does not pass it.

    >>> gradient_coefficients([torch.tensor([1.0, 9.0])], 0.5, [0.5])
    [tensor([1., 2.])]
    """
    coefficients = list(torch._foreach_mul(list(importances), 2 * strength))
    rates = rates or [0.0] * len(coefficients)
    for coefficient, rate in zip(coefficients, rates, strict=True):
        if rate > 0:
            coefficient.clamp_(max=1 / rate)
    return coefficients


def proximal_weights(
    importances: Sequence[Tensor], strength: float, rates: Sequence[float]
) -> list[Tensor]:
    r"""The fraction of each gap that a proximal step on the penalty closes.

    .. math:: \frac{2 \eta\lambda\Omega}{1 + 2 \eta\lambda\Omega}

    The minimizer of :math:`\eta\lambda\Omega (\theta - \mu)^2 + \frac12 (\theta - \theta_0)^2` lies
    so far from :math:`\theta_0` towards mu; at any strength it is between the two.

    >>> proximal_weights([torch.tensor([1.0, 1.5])], 1.0, [0.5])
    [tensor([0.5000, 0.6000])]
    """
    scaled = torch._foreach_mul(list(importances), [2 * strength * rate for rate in rates])
    return [value / (1 + value) for value in scaled]


def add_penalty_grad_(
    gradients: Sequence[Tensor],
    parameters: Sequence[Tensor],
    anchors: Sequence[Tensor],
    coefficients: Sequence[Tensor],
) -> None:
    """Add coefficient times gap to each gradient, in place."""
    with torch.no_grad():
        gaps = torch._foreach_sub(list(parameters), list(anchors))
        torch._foreach_addcmul_(list(gradients), list(coefficients), gaps)


def proximal_step_(
    parameters: Sequence[Tensor], anchors: Sequence[Tensor], weights: Sequence[Tensor]
) -> None:
    """Move each parameter that fraction of its way to the anchor, in place."""
    with torch.no_grad():
        torch._foreach_lerp_(list(parameters), list(anchors), list(weights))
