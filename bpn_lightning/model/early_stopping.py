"""When a phase of a task ends before its planned length."""

from collections.abc import Mapping
from math import inf
from typing import Any

from bpn_lightning.errors import ConfigurationError

__all__ = ["PhaseEarlyStopping"]


class PhaseEarlyStopping:
    """Ends a phase after some epochs in a row without a lower validation loss.

    Args:
        patience: so many epochs; None trains every phase to its full length.

    State: the lowest loss of the phase, and how many epochs ago it was.

    Raises:
        ConfigurationError: patience is below 1.

    >>> stopping = PhaseEarlyStopping(patience=2)
    >>> [stopping.update(loss) for loss in (0.5, 0.4, 0.4, 0.6)]
    [False, False, False, True]
    """

    def __init__(self, patience: int | None) -> None:
        if patience is not None and patience < 1:
            raise ConfigurationError(
                f"Expected patience to be at least 1 epoch or null, but got {patience}. null trains "
                "every phase to its full length."
            )
        self.patience = patience
        self.reset()

    def reset(self) -> None:
        """Begin another phase."""
        self.best_loss, self.bad_epochs = inf, 0

    def update(self, loss: float) -> bool:
        """Take the validation loss of an epoch; whether the phase ends with it."""
        if self.patience is None:
            return False
        self.bad_epochs = 0 if loss < self.best_loss else self.bad_epochs + 1
        self.best_loss = min(loss, self.best_loss)
        return self.bad_epochs >= self.patience

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"best_loss": self.best_loss, "bad_epochs": self.bad_epochs}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over :meth:`state_dict`."""
        self.best_loss, self.bad_epochs = state["best_loss"], state["bad_epochs"]
