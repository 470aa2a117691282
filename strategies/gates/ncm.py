"""Nearest class mean."""

from collections.abc import Mapping

from torch import Tensor

from bpn_lightning.functional.moments import GroupSums
from bpn_lightning.functional.row_scores import nearest_mean_scores
from bpn_lightning.strategies.gates.features import FLOAT32, FeatureGate

__all__ = ["NearestClassMean"]


class NearestClassMean(FeatureGate):
    r"""The task of the class whose mean is nearest.

    .. math:: -\tfrac12 |x - \mu_c|^2

    Mensink, Verbeek, Perronnin, Csurka (2013), "Distance-based image classification: Generalizing
    to new classes at near-zero cost", with the identity for their metric.

    Args:
        project, per, held_out, modes, name: see :class:`FeatureGate`.

    State:
        ``means`` (rows, d) float32: 4 d bytes for each row, nothing shared and nothing more to go on
        learning.
    """

    def fitted(self, moments: GroupSums) -> dict[str, Tensor]:
        """The means of each new row."""
        return {"means": moments.means.float()}

    def scores(self, features: Tensor, rows: Mapping[str, Tensor]) -> Tensor:
        """Minus half the squared distances."""
        return nearest_mean_scores(features, rows)

    def row_bytes(self, width: int) -> int:
        """One mean."""
        return FLOAT32 * width
