"""Linear discriminant analysis with one covariance for all classes of all tasks."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from bpn_lightning.checks import check_number
from bpn_lightning.functional.gaussians import (
    shrink,
    shrinkage_log_likelihoods,
    whitening,
)
from bpn_lightning.functional.moments import GroupSums, SecondMoments
from bpn_lightning.functional.row_scores import shared_gaussian_scores
from bpn_lightning.strategies.gates.features import FLOAT32, FeatureGate

__all__ = ["SHRINKAGES", "SLDA"]

#: What held-out samples choose among.
SHRINKAGES = (*(10 ** (step / 4) for step in range(-24, 0)), 1.0)


@dataclass(eq=False, repr=False)
class SLDA(FeatureGate):
    r"""Gaussian classes that share one covariance, which all samples so far are summed for.

    .. math:: \log N(x; \mu_c, \Sigma), \quad \Sigma = (1 - \alpha) S + \alpha \frac{\operatorname{tr} S}{d} I,
        \quad S = \frac1n \sum_c \sum_{x \in c} (x - \mu_c)(x - \mu_c)^T

    Hayes and Kanan, "Lifelong machine learning with deep streaming linear discriminant analysis"
    (2020), https://arxiv.org/abs/1909.01520.

    Differs from the paper: the covariance is that about the final means, from sums, so that it does
    not depend on the order of samples; shrinkage is relative to the features' mean variance, and all
    classes count as equally frequent.

    Args:
        shrinkage: alpha, 0 to 1; None is the one of 25 between 1e-6 and 1 at which held-out samples of
            all tasks so far are likeliest, chosen again at each task.
        project, per, held_out, modes, name: see :class:`FeatureGate`.

    State:
        ``means`` (rows, d), ``whitening`` (d, d) and ``log_determinant`` (1,), float32: 4 d bytes for
        each row, 4 d^2 + 4 shared; to go on learning, 16 (d + 1) for each row and 16 d^2.

    Raises:
        ConfigurationError: shrinkage is no fraction, or too small for the covariance to be inverted.
    """

    second_moments: ClassVar[SecondMoments] = "shared"
    shared_rows: ClassVar[Sequence[str]] = ("whitening", "log_determinant")

    shrinkage: float | None = None

    def __post_init__(self) -> None:
        if self.shrinkage is not None:
            remedy = "Null chooses it on held-out samples."
            check_number("shrinkage", self.shrinkage, remedy, at_most=1)
        super().__post_init__()

    @property
    def open_argument(self) -> str | None:
        """Shrinkage, unless it was given."""
        return "shrinkage" if self.shrinkage is None else None

    def choose(self, fit: GroupSums, held: GroupSums) -> float:
        """The shrinkage at which held-out samples are likeliest."""
        covariance = fit.scatter()[0] / fit.counts.sum()
        scatter, count = held.scatter(fit.means)[0], float(held.counts.sum())
        likelihoods = shrinkage_log_likelihoods(covariance, scatter, count, SHRINKAGES)
        return SHRINKAGES[int(likelihoods.argmax())]

    def fitted(self, moments: GroupSums) -> dict[str, Tensor]:
        """The means of all rows, and what whitens the covariance."""
        shrinkage = self.chosen if self.shrinkage is None else self.shrinkage
        covariance = moments.scatter()[0] / moments.counts.sum()
        whitened = whitening(shrink(covariance, shrinkage or 0.0))
        if whitened is None:
            raise self.singular(
                "shrinkage", shrinkage, "Raise it, leave it out, or project to fewer dimensions."
            )
        return {
            "means": moments.means.float(),
            "whitening": whitened.matrix.float(),
            "log_determinant": whitened.log_determinant.float()[None],
        }

    def scores(self, features: Tensor, rows: Mapping[str, Tensor]) -> Tensor:
        """Log-likelihoods."""
        return shared_gaussian_scores(features, rows)

    def row_bytes(self, width: int) -> int:
        """One mean."""
        return FLOAT32 * width

    def shared_bytes(self, width: int) -> int:
        """The whitening matrix and a determinant."""
        return FLOAT32 * (width * width + 1)
