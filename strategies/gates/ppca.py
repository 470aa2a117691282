"""Probabilistic principal components of each class or task."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from bpn_lightning.checks import check_positive_int
from bpn_lightning.errors import ConfigurationError
from bpn_lightning.functional.gaussians import (
    principal_subspaces,
)
from bpn_lightning.functional.moments import GroupSums, SecondMoments
from bpn_lightning.functional.row_scores import subspace_scores
from bpn_lightning.strategies.gates.features import FLOAT32, FeatureGate

__all__ = ["ProbabilisticPCA"]


@dataclass(eq=False, repr=False)
class ProbabilisticPCA(FeatureGate):
    r"""The log-likelihood of a few principal directions of each class or task, and noise.

    .. math:: \log N(x; \mu_c, W_c W_c^T + \sigma_c^2 I)

    Tipping and Bishop, "Probabilistic principal component analysis" (1999), with their
    maximum-likelihood solution.

    Args:
        rank: q, directions of each row; below the dimensions and below each row's samples less 1.
        project, per, held_out, modes, name: see :class:`FeatureGate`.

    State:
        ``means`` (rows, d), ``directions`` (rows, q, d), ``variances`` (rows, q) and ``noise`` (rows,),
        float32: 4 (q + 1) (d + 1) bytes for each row, nothing shared and nothing more to go on
        learning.

    Raises:
        ConfigurationError: rank is not positive, or too large for the features or samples.
    """

    second_moments: ClassVar[SecondMoments] = "group"
    least: ClassVar[int] = 2

    rank: int = 16

    def __post_init__(self) -> None:
        check_positive_int("rank", self.rank)
        super().__post_init__()

    def fitted(self, moments: GroupSums) -> dict[str, Tensor]:
        """The principal directions of each new row."""
        limit = min(self.dimensions, int(moments.counts.min()) - 1) - 1
        if self.rank > limit:
            raise self._too_large(f"at most {limit}")
        covariances = moments.scatter() / moments.counts[:, None, None]
        found = principal_subspaces(moments.means, covariances, self.rank)
        smallest = found.variances[:, 0] * self.dimensions * 1e-14
        if not bool((found.noise > smallest).all()):
            raise self._too_large("below the number of directions in which every row varies")
        return {key: value.float() for key, value in found._asdict().items()}

    def _too_large(self, rule: str) -> ConfigurationError:
        return ConfigurationError(
            f"Expected rank of gate {self.name} to be {rule}, with {self.dimensions} features and the rarest "
            f"row's samples, but got {self.rank}. Lower it, or set per to 'task'."
        )

    def scores(self, features: Tensor, rows: Mapping[str, Tensor]) -> Tensor:
        """Log-likelihoods."""
        return subspace_scores(features, rows)

    def row_bytes(self, width: int) -> int:
        """A mean, directions, their variances and the noise."""
        return FLOAT32 * (self.rank + 1) * (width + 1)
