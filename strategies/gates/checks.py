"""What gates refuse of the features that they are fitted on or asked about."""

from collections.abc import Sized

from torch import Tensor

from bpn_lightning.errors import ConfigurationError, DataError

__all__ = ["check_finite", "check_learned", "check_width"]


def check_finite(gate: str, features: Tensor, task: int) -> None:
    """Refuse features of a task that are not finite.

    Raises:
        DataError: names the gate and the task.
    """
    if not bool(features.isfinite().all()):
        raise DataError(
            f"Expected the features of task {task} to be finite for gate {gate}, but got "
            "NaN or infinite values. Look at the inputs, and at the front that made them."
        )


def check_learned(gate: str, rows: Sized) -> None:
    """Refuse a question before any task was learned.

    Raises:
        ConfigurationError: there are no rows.
    """
    if not rows:
        raise ConfigurationError(
            f"Expected gate {gate} to be asked after a task was learned, but got features "
            "before any was. Fit it on a task first."
        )


def check_width(gate: str, features: Tensor, width: int) -> None:
    """Refuse features that are not ``(n, width)``.

    Raises:
        DataError: names the gate and both shapes.
    """
    if features.ndim != 2 or features.shape[1] != width:
        raise DataError(
            f"Expected features of shape (n, {width}) for gate {gate}, but got "
            f"{tuple(features.shape)}. Use the front that it was fitted with."
        )
