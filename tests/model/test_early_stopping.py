"""A phase ends after so many epochs without a lower loss."""

from math import inf

import pytest

from bpn_lightning.errors import ConfigurationError
from bpn_lightning.model.early_stopping import PhaseEarlyStopping


@pytest.mark.parametrize(
    ("patience", "losses", "ends"),
    [
        (1, [1.0, 0.5, 0.5], [False, False, True]),  # equal is no improvement
        (2, [1.0, 2.0, 0.5, 3.0, 3.0], [False, False, False, False, True]),
        (1, [float("nan")], [True]),
        (None, [1.0, 2.0, 3.0], [False, False, False]),
    ],
)
def test_a_phase_ends(patience: int | None, losses: list[float], ends: list[bool]) -> None:
    stopping = PhaseEarlyStopping(patience)
    assert [stopping.update(loss) for loss in losses] == ends
    again = PhaseEarlyStopping(patience)
    again.load_state_dict(stopping.state_dict())
    assert vars(again) == vars(stopping)
    stopping.reset()
    assert stopping.state_dict() == {"best_loss": inf, "bad_epochs": 0}


def test_patience_below_one_is_refused() -> None:
    with pytest.raises(
        ConfigurationError, match="patience to be at least 1 epoch or null, but got 0"
    ):
        PhaseEarlyStopping(0)
