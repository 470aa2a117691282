r"""Quadratic penalties :math:`\lambda \sum_i \Omega_i (\theta_i - \mu_i)^2`: their sum, gradient and proximal step."""

from collections.abc import Sequence
from math import fsum

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
    r"""Merge two quadratic penalties into one plus a constant.

    .. math:: A (\theta - \mu)^2 + F (\theta - \theta^*)^2
        = (A + F) (\theta - \mu')^2 + C, \quad \mu' = \mu + \frac{F}{A + F} (\theta^* - \mu)

    Computed as a running mean, which avoids the cancellation in sums of F theta. Where both importances
    are 0 the anchor is the last solution.

    Args:
        importance: A, at least 0, any shape, the same for all arguments.
        anchor: mu.
        added: F, at least 0.
        solution: theta*.

    Returns:
        A + F and mu', in the precision of the arguments, and the sum of C, a scalar in double precision.
    """
    total, gap = importance.double() + added, solution.double() - anchor
    weight = torch.where(total > 0, added.double() / total, torch.ones_like(total))
    constant = _sum_by_row(importance * weight * gap.square())
    mean = torch.lerp(anchor.double(), solution.double(), weight)  # exact at a weight of 0 and of 1
    return total.to(added.dtype), mean.to(solution.dtype), constant


def _sum_by_row(terms: Tensor) -> Tensor:
    """The sum of double-precision terms, whose last bits do not depend on rows of zeros."""
    rows = terms.flatten(1).sum(1) if terms.dim() > 1 else terms
    return terms.new_tensor(fsum(rows.tolist()) if rows.dim() else float(rows))


def gradient_coefficients(
    importances: Sequence[Tensor], strength: float, rates: Sequence[float] | None = None
) -> list[Tensor]:
    r"""The coefficients of :math:`\theta - \mu` in the gradient: :math:`2 \lambda \Omega`.

    Args:
        importances: one tensor per parameter.
        strength: lambda.
        rates: learning rates; if given, coefficients are limited to 1 / rate, so that one step of plain
            gradient descent does not overshoot the anchor.

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
    r"""The fraction of the distance to the anchor that a proximal step on the penalty covers.

    .. math:: \frac{2 \eta\lambda\Omega}{1 + 2 \eta\lambda\Omega}

    The minimizer of :math:`\eta\lambda\Omega (\theta - \mu)^2 + \frac12 (\theta - \theta_0)^2` is at
    this fraction of the way from :math:`\theta_0` to mu; for any strength it is between the two.

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
    """Add coefficient * (parameter - anchor) to each gradient, in place."""
    with torch.no_grad():
        gaps = torch._foreach_sub(list(parameters), list(anchors))
        torch._foreach_addcmul_(list(gradients), list(coefficients), gaps)


def proximal_step_(
    parameters: Sequence[Tensor], anchors: Sequence[Tensor], weights: Sequence[Tensor]
) -> None:
    """Move each parameter by this fraction of its distance to the anchor, in place."""
    with torch.no_grad():
        torch._foreach_lerp_(list(parameters), list(anchors), list(weights))
