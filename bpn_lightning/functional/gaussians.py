r"""Gaussians from sums: covariances that are shrunk, their likelihoods, and scores of samples.

.. math:: \log p(x) = -\tfrac12 \left[d \log 2\pi + \log|\Sigma|
    + (x - \mu)^T \Sigma^{-1} (x - \mu)\right]
"""

from collections.abc import Sequence
from math import log, pi
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = [
    "PrincipalSubspaces",
    "Whitening",
    "correlation",
    "principal_subspaces",
    "shrink",
    "shrink_apart",
    "shrinkage_log_likelihoods",
    "squared_distances",
    "subspace_log_likelihoods",
    "whitening",
]

LOG_2PI = log(2 * pi)


def shrink(covariance: Tensor, shrinkage: float) -> Tensor:
    r"""A covariance shrunk toward a multiple of the identity with the same trace.

    .. math:: (1 - \alpha) S + \alpha \frac{\operatorname{tr} S}{d} I

    Args:
        covariance: S, ``(d, d)``.
        shrinkage: alpha, from 0 to 1.

    >>> shrink(torch.tensor([[3.0, 1.0], [1.0, 1.0]]), 0.5)
    tensor([[2.5000, 0.5000],
            [0.5000, 1.5000]])
    """
    shrunk = (1 - shrinkage) * covariance
    shrunk.diagonal().add_(shrinkage * covariance.trace() / len(covariance))
    return shrunk


def shrink_apart(covariance: Tensor, shrinkage: float) -> Tensor:
    r"""A covariance with the means of its variances and of its covariances added to them.

    .. math:: S + \gamma V_1 I + \gamma V_2 (1 - I)

    Goswami et al. (2023), https://arxiv.org/abs/2309.14062, whose two factors are one here.

    Args:
        covariance: S, ``(d, d)``; V1 is the mean of its diagonal, V2 of its off-diagonal entries.
        shrinkage: gamma, at least 0.
    """
    width = len(covariance)
    variance = covariance.trace() / width
    apart = (covariance.sum() - covariance.trace()) / max(width * (width - 1), 1)
    shrunk = covariance + shrinkage * apart
    shrunk.diagonal().add_(shrinkage * (variance - apart))
    return shrunk


def correlation(covariance: Tensor) -> Tensor:
    """A covariance divided by the products of its standard deviations, ``(d, d)``."""
    deviation = covariance.diagonal().sqrt()
    return covariance.div(torch.outer(deviation, deviation))


# --- whitening -----------------------------------------------------------------------------------


class Whitening(NamedTuple):
    """What turns a covariance into the identity.

    Attributes:
        matrix: W, ``(d, d)``: :math:`W S W^T = I`, rows by falling variance.
        log_determinant: of S, a scalar.
    """

    matrix: Tensor
    log_determinant: Tensor


def whitening(covariance: Tensor) -> Whitening | None:
    """Turn a covariance into the identity.

    Args:
        covariance: S, ``(d, d)`` float64.

    Returns:
        None where S cannot be inverted in its precision.
    """
    variances, directions = torch.linalg.eigh(covariance)
    smallest = variances[-1] * len(variances) * torch.finfo(variances.dtype).eps
    if not variances[0] > smallest.clamp(min=0):  # NaN among them
        return None
    matrix = directions.T / variances.sqrt()[:, None]
    return Whitening(matrix.flip(0).contiguous(), variances.log().sum())


def squared_distances(features: Tensor, centers: Tensor) -> Tensor:
    """Squared Euclidean distances, ``(n, groups)``, never negative.

    Both are first moved so that the centers' mean is 0: a common offset would cost digits.

    Args:
        features: ``(n, d)``.
        centers: ``(groups, d)``.
    """
    middle = centers.mean(0)
    x, c = features - middle, centers - middle
    products = torch.addmm(c.square().sum(1)[None], x, c.T, alpha=-2)
    return (products + x.square().sum(1, keepdim=True)).clamp(min=0)


# --- the likelihood of held-out samples, from their sums -----------------------------------------


def shrinkage_log_likelihoods(
    covariance: Tensor, scatter: Tensor, count: float, shrinkages: Sequence[float]
) -> Tensor:
    r"""Mean log-likelihoods of held-out samples at several shrinkages, by one eigendecomposition.

    .. math:: -\tfrac12 \sum_i \left[\log 2\pi + \log l_i + h_i / (n\, l_i)\right], \quad
        l_i = (1 - \alpha) \lambda_i + \alpha \operatorname{tr}(S) / d

    with the covariance's eigenvalues :math:`\lambda` and the diagonal h of the scatter in its axes.

    Args:
        covariance: S, ``(d, d)``, of the samples that were fitted.
        scatter: of the held-out ones about the fitted means, ``(d, d)``.
        count: n, how many of those, at least 1.
        shrinkages: alphas, as in :func:`shrink`.

    Returns:
        ``(shrinkages,)``; minus infinity where the covariance cannot be inverted.
    """
    variances, directions = torch.linalg.eigh(covariance)
    spread = (directions * (scatter @ directions)).sum(0) / count
    alphas = torch.as_tensor(shrinkages).to(variances)[:, None]
    shrunk = (1 - alphas) * variances + alphas * variances.mean()
    likelihoods: Tensor = -0.5 * (LOG_2PI + shrunk.log() + spread / shrunk).sum(1)
    smallest = shrunk.amax(1) * len(variances) * torch.finfo(variances.dtype).eps
    return likelihoods.masked_fill(shrunk.amin(1) <= smallest, -torch.inf)


# --- probabilistic principal components ----------------------------------------------------------


class PrincipalSubspaces(NamedTuple):
    """Gaussians with a few directions of their own and the same variance in all others.

    Attributes:
        means: ``(groups, d)``.
        directions: orthonormal, ``(groups, rank, d)``.
        variances: along each of them, ``(groups, rank)``.
        noise: the variance in all others, ``(groups,)``.
    """

    means: Tensor
    directions: Tensor
    variances: Tensor
    noise: Tensor


def principal_subspaces(means: Tensor, covariances: Tensor, rank: int) -> PrincipalSubspaces:
    r"""The maximum-likelihood solution of probabilistic PCA.

    The largest eigenvalues stay, and the mean of the others is the noise (Tipping and Bishop, 1999).

    Args:
        means: ``(groups, d)``.
        covariances: ``(groups, d, d)``, sums over n and not n - 1.
        rank: how many directions, below d.
    """
    variances, directions = torch.linalg.eigh(covariances)
    kept = directions[:, :, -rank:].mT.flip(1).contiguous()
    noise = variances[:, :-rank].mean(1)
    return PrincipalSubspaces(means, kept, variances[:, -rank:].flip(1), noise)


def subspace_log_likelihoods(features: Tensor, subspaces: PrincipalSubspaces) -> Tensor:
    r"""Log-likelihoods under probabilistic PCA.

    .. math:: -\tfrac12 \left[d \log 2\pi + \sum_i \log \lambda_i + (d - q) \log \sigma^2
        + \sum_i \frac{(u_i^T \delta)^2}{\lambda_i}
        + \frac{|\delta|^2 - \sum_i (u_i^T \delta)^2}{\sigma^2}\right], \quad \delta = x - \mu

    Args:
        features: ``(n, d)``.
        subspaces: of ``groups``.

    Returns:
        ``(n, groups)``.
    """
    means, directions, variances, noise = subspaces
    rank, width = directions.shape[1:]
    offsets = torch.einsum("gqd,gd->gq", directions, means)
    along = torch.einsum("nd,gqd->ngq", features, directions) - offsets
    squares = along.square()
    rest = (squared_distances(features, means) - squares.sum(2)).clamp(min=0)
    determinant = variances.log().sum(1) + (width - rank) * noise.log()
    distances = (squares / variances).sum(2) + rest / noise
    return -0.5 * (width * LOG_2PI + determinant + distances)
