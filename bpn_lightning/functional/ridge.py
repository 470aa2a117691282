"""Ridge regression from sums, and its squared error on other samples from theirs."""

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["held_out_errors", "ridge_weights"]


def ridge_weights(gram: Tensor, sums: Tensor, ridge: float) -> Tensor | None:
    r"""The weights :math:`C (G + \lambda I)^{-1}` that map features to indicators of groups.

    Args:
        gram: :math:`G = \sum h h^T`, ``(d, d)`` float64.
        sums: C, the sum of the features of each group, ``(groups, d)`` float64.
        ridge: lambda, at least 0.

    Returns:
        ``(groups, d)``; None where the matrix cannot be inverted in its precision.

    >>> ridge_weights(torch.eye(2), torch.tensor([[2.0, 0.0]]), 1.0)
    tensor([[1., 0.]])
    """
    values, axes = torch.linalg.eigh(gram)
    raised = values + ridge
    if not raised[0] > raised[-1].clamp(min=0) * len(raised) * torch.finfo(raised.dtype).eps:
        return None
    weights: Tensor = (sums @ axes / raised) @ axes.T
    return weights


def held_out_errors(
    gram: Tensor,
    sums: Tensor,
    held_gram: Tensor,
    held_sums: Tensor,
    held_count: float,
    ridges: Sequence[float],
) -> Tensor:
    r"""Summed squared errors of other samples at several ridges, by one eigendecomposition.

    .. math:: \sum |y - W h|^2 = n - 2 \operatorname{tr}(W C_h^T) + \operatorname{tr}(W G_h W^T)

    Args:
        gram: of the fitted samples, ``(d, d)`` float64.
        sums: of the fitted samples, ``(groups, d)``.
        held_gram: of the others.
        held_sums: of the others.
        held_count: n, how many others there are.
        ridges: lambdas.

    Returns:
        ``(ridges,)`` float64; infinity where the matrix cannot be inverted.
    """
    values, axes = torch.linalg.eigh(gram)
    turned, held_turned = sums @ axes, held_sums @ axes
    held_gram = axes.T @ held_gram @ axes
    smallest = values[-1] * len(values) * torch.finfo(values.dtype).eps
    errors = []
    for ridge in ridges:
        weights = turned / (values + ridge)
        error = (
            held_count - 2 * (weights * held_turned).sum() + (weights @ held_gram * weights).sum()
        )
        errors.append(error if values[0] + ridge > smallest else torch.full_like(error, torch.inf))
    return torch.stack(errors)
