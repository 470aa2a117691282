"""Ridge regression on random features."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from bpn_lightning.checks import check_number, check_positive_int
from bpn_lightning.functional.moments import GroupSums, SecondMoments
from bpn_lightning.functional.ridge import held_out_errors, ridge_weights
from bpn_lightning.functional.row_scores import linear_scores
from bpn_lightning.strategies.gates.features import FLOAT32, FeatureGate

__all__ = ["RIDGES", "RanPAC"]

#: What held-out samples choose among, as in the paper.
RIDGES = tuple(10.0**power for power in range(-8, 9))


@dataclass(eq=False, repr=False)
class RanPAC(FeatureGate):
    r"""Ridge regression of the classes on random features, from sums.

    .. math:: h = \max(0, x R), \qquad s = h\, (G + \lambda I)^{-1} C, \quad
        G = \sum h^T h, \quad C = \sum h^T y

    McDonnell, Gong, Parvaneh, Abbasnejad, van den Hengel, "RanPAC: Random projections and pre-trained
    models for continual learning" (2023), https://arxiv.org/abs/2307.02251; y has a 1 at the sample's
    own row. RanDumb (Prabhu et al., 2024, https://arxiv.org/abs/2402.08823) is
    :class:`~bpn_lightning.strategies.gates.slda.SLDA` on a ``random`` front of cosines.

    Differs from the paper: R has variance 1 / d, so that the features keep their size; lambda is
    chosen among the same 17 on held-out samples of all tasks so far.

    Args:
        width: M, how many random features.
        ridge: lambda, at least 0; None is the one at which the squared error of held-out samples is
            smallest, chosen again at each task.
        project, per, held_out, modes, name: see :class:`FeatureGate`.

    State:
        ``weights`` (rows, M) float32: 4 M bytes for each row, solved again at each task; R is drawn
        from the seed and never stored. To go on learning, 16 (M + 1) for each row and 16 M^2.

    Raises:
        ConfigurationError: an argument is out of range, or G cannot be inverted.
    """

    second_moments: ClassVar[SecondMoments] = "shared"

    width: int = 1000
    ridge: float | None = None

    def __post_init__(self) -> None:
        check_positive_int("width", self.width)
        if self.ridge is not None:
            check_number("ridge", self.ridge, "Null chooses it on held-out samples.")
        super().__post_init__()

    def _projected(self, features: Tensor) -> Tensor:
        """The random features, after the projection."""
        projected = super()._projected(features)
        size = projected.shape[1]
        return self._times_random("random features", projected, self.width, size).relu()

    @property
    def dimensions(self) -> int:
        """As many as there are random features."""
        return self.width if self.inputs else 0

    @property
    def open_argument(self) -> str | None:
        """Ridge, unless it was given."""
        return "ridge" if self.ridge is None else None

    def choose(self, fit: GroupSums, held: GroupSums) -> float:
        """The ridge at which the squared error of held-out samples is smallest."""
        errors = held_out_errors(
            fit.second[0], fit.first, held.second[0], held.first, float(held.counts.sum()), RIDGES
        )
        return RIDGES[int(errors.argmin())]

    def fitted(self, moments: GroupSums) -> dict[str, Tensor]:
        """The weights of all rows."""
        ridge = self.chosen if self.ridge is None else self.ridge
        weights = ridge_weights(moments.second[0], moments.first, ridge or 0.0)
        if weights is None:
            raise self.singular("ridge", ridge, "Raise it, leave it out, or lower width.")
        return {"weights": weights.float()}

    def scores(self, features: Tensor, rows: Mapping[str, Tensor]) -> Tensor:
        """The regression's outputs."""
        return linear_scores(features, rows)

    def row_bytes(self, width: int) -> int:
        """One row of weights."""
        return FLOAT32 * width
