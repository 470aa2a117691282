"""Scores of a gate's rows, from what the gate stores of them."""

from collections.abc import Mapping

import torch
from torch import Tensor

from bpn_lightning.functional.gaussians import (
    LOG_2PI,
    PrincipalSubspaces,
    squared_distances,
    subspace_log_likelihoods,
)

__all__ = [
    "linear_scores",
    "nearest_mean_scores",
    "own_gaussian_scores",
    "shared_gaussian_scores",
    "subspace_scores",
]


def nearest_mean_scores(features: Tensor, rows: Mapping[str, Tensor]) -> Tensor:
    """Minus half the squared distances to ``means``, ``(n, rows)``, of features ``(n, d)``."""
    return -squared_distances(features, rows["means"]) / 2


def shared_gaussian_scores(features: Tensor, rows: Mapping[str, Tensor]) -> Tensor:
    """Log-likelihoods under ``means`` and one covariance, by its ``whitening`` and ``log_determinant``."""
    matrix, middle = rows["whitening"], rows["means"].mean(0)
    centered, means = features - middle, rows["means"] - middle
    distances = squared_distances(centered @ matrix.T, means @ matrix.T)
    return -0.5 * (distances + rows["log_determinant"] + len(matrix) * LOG_2PI)


def own_gaussian_scores(
    features: Tensor, rows: Mapping[str, Tensor], distances_alone: bool
) -> Tensor:
    """Log-likelihoods under each row's own covariance, or minus half the squared distances alone."""
    distances = torch.stack(
        [
            ((features - mean) @ matrix.T).square().sum(1)
            for mean, matrix in zip(rows["means"], rows["whitening"], strict=True)
        ],
        1,
    )
    if distances_alone:
        return -0.5 * distances
    return -0.5 * (distances + rows["log_determinant"] + features.shape[1] * LOG_2PI)


def subspace_scores(features: Tensor, rows: Mapping[str, Tensor]) -> Tensor:
    """Log-likelihoods under probabilistic principal components."""
    return subspace_log_likelihoods(features, PrincipalSubspaces(**rows))


def linear_scores(features: Tensor, rows: Mapping[str, Tensor]) -> Tensor:
    """Outputs of a regression with ``weights``."""
    return features @ rows["weights"].T
