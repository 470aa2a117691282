"""A Gaussian of each class's own, whose covariance is shrunk and normalized."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from bpn_lightning.checks import check_above_zero, check_number
from bpn_lightning.errors import DataError
from bpn_lightning.functional.gaussians import (
    Whitening,
    correlation,
    shrink_apart,
    whitening,
)
from bpn_lightning.functional.moments import GroupSums, SecondMoments
from bpn_lightning.functional.row_scores import own_gaussian_scores
from bpn_lightning.strategies.gates.features import FLOAT32, FeatureGate

__all__ = ["FeCAM"]


@dataclass(eq=False, repr=False)
class FeCAM(FeatureGate):
    r"""Mahalanobis distances to class means, each by the class's own normalized covariance.

    .. math:: -\tfrac12 (\tilde x - \tilde\mu_c)^T \hat\Sigma_c^{-1} (\tilde x - \tilde\mu_c), \quad
        \hat\Sigma_{ij} = \frac{\Sigma_{ij}}{\sqrt{\Sigma_{ii} \Sigma_{jj}}}, \quad
        \Sigma = S_c + \gamma V_1 I + \gamma V_2 (1 - I)

    Goswami, Liu, Twardowski, van de Weijer, "FeCAM: Exploiting the heterogeneity of class
    distributions in exemplar-free continual learning" (2023), https://arxiv.org/abs/2309.14062.
    :math:`\tilde x = x^\lambda` is Tukey's transform, V1 and V2 the means of the covariance's diagonal
    and off-diagonal entries.

    Differs from the paper: one gamma for both means; lambda is 1 by default, since features that are
    standardized are negative as well; no features are scaled to length 1.

    Args:
        shrinkage: gamma, at least 0; 1 as in the paper. It is not chosen on held-out samples: they are
            likeliest, each under its own class, at a gamma that is too small to discriminate classes.
        tukey: lambda, above 0; 1 leaves the features as they are.
        normalize: whether covariances become correlations; without it the scores are the Gaussians'
            log-likelihoods.
        project, per, held_out, modes, name: see :class:`FeatureGate`.

    State:
        ``means`` (rows, d), ``whitening`` (rows, d, d) and ``log_determinant`` (rows,), float32:
        4 (d^2 + d + 1) bytes for each row, nothing shared and nothing more to go on learning.

    Raises:
        ConfigurationError: an argument is out of range, or a covariance cannot be inverted.
        DataError: features are negative where tukey is not 1.
    """

    second_moments: ClassVar[SecondMoments] = "group"
    least: ClassVar[int] = 2

    shrinkage: float = 1.0
    tukey: float = field(default=1.0, kw_only=True)
    normalize: bool = field(default=True, kw_only=True)

    def __post_init__(self) -> None:
        check_number("shrinkage", self.shrinkage, "Leave it out for the paper's 1.")
        check_above_zero(
            "tukey",
            self.tukey,
            "1 leaves features as they are; 0.5 is for features that are not negative.",
        )
        super().__post_init__()

    def _projected(self, features: Tensor) -> Tensor:
        """Through the projection, after Tukey's transform."""
        if self.tukey == 1:
            return super()._projected(features)
        if bool((features < 0).any()):
            raise DataError(
                f"Expected features of at least 0 where tukey of gate {self.name} is {self.tukey:g}, "
                f"but got {float(features.min()):g}. Set tukey to 1."
            )
        return super()._projected(features**self.tukey)

    def fitted(self, moments: GroupSums) -> dict[str, Tensor]:
        """Mean and whitening matrix of each new row."""
        covariances = moments.scatter() / moments.counts[:, None, None]
        found = [self._whitening(covariance) for covariance in covariances]
        return {
            "means": moments.means.float(),
            "whitening": torch.stack([each.matrix for each in found]).float(),
            "log_determinant": torch.stack([each.log_determinant for each in found]).float(),
        }

    def _whitening(self, covariance: Tensor) -> Whitening:
        shrunk = shrink_apart(covariance, self.shrinkage)
        positive = bool((shrunk.diagonal() > 0).all())
        found = whitening(correlation(shrunk) if self.normalize else shrunk) if positive else None
        if found is None:
            raise self.singular(
                "shrinkage", self.shrinkage, "Raise it, or project to fewer dimensions."
            )
        return found

    def scores(self, features: Tensor, rows: Mapping[str, Tensor]) -> Tensor:
        """Minus half the squared distances; log-likelihoods where covariances are not normalized."""
        return own_gaussian_scores(features, rows, distances_alone=self.normalize)

    def row_bytes(self, width: int) -> int:
        """A mean, a matrix and a determinant."""
        return FLOAT32 * (width * width + width + 1)
