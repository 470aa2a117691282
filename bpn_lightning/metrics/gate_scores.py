"""How well gates name tasks: records of every moment, and the sums that they are computed from."""

from typing import TypedDict

import torch
from torch import Tensor

from bpn_lightning.metrics.scores import Calibration

__all__ = ["GateScores", "auroc", "calibration"]


class GateScores(TypedDict):
    """What a gate answers for test samples at one moment of a stream.

    Lists have a number for each task of the stream, a fraction of its test samples; None where the task
    is not learned yet, or was not tested.

    Attributes:
        after: tasks learned by then.
        epoch: epochs of the stream done by then.
        gate: its name.
        modes: m, of ``mixture``.
        samples: tested of each task.
        task_accuracy: whose task is named.
        end_to_end: whose class is named by the mode of the likeliest task.
        mixture: whose class is named by p(task) p(class | task), summed over the m likeliest tasks.
        own_class: whose class is that of the likeliest row of the gate; None where rows are tasks.
        own_class_task_given: the same among the rows of the sample's task.
        calibration: of the task probabilities of all learned tasks' samples; None where none was tested.
        rejection: area under the ROC curve by which the largest task score tells samples of learned tasks
            from those of tasks that are not; None where no such task was tested, as after the last.
        bytes_held: of the gate at inference.
        bytes_per_task: which one task adds.
    """

    after: int
    epoch: int
    gate: str
    modes: int
    samples: list[int | None]
    task_accuracy: list[float | None]
    end_to_end: list[float | None]
    mixture: list[float | None]
    own_class: list[float | None] | None
    own_class_task_given: list[float | None] | None
    calibration: Calibration | None
    rejection: float | None
    bytes_held: int
    bytes_per_task: int


def calibration(sums: Tensor) -> Calibration | None:
    r"""The expected calibration error, :math:`\sum_b \frac{n_b}{n} |\mathrm{acc}_b - \mathrm{conf}_b|`.

    Args:
        sums: counts, summed confidences and right answers of each bin, ``(3, bins)`` float64.

    Returns:
        None where nothing was counted.

    >>> calibration(torch.tensor([[0.0, 4.0], [0.0, 3.0], [0.0, 2.0]]))["error"]
    0.25
    """
    counts, confidence, right = sums.double().cpu()
    if counts.sum() == 0:
        return None
    return Calibration(
        error=float((right - confidence).abs().sum() / counts.sum()),
        counts=[int(count) for count in counts],
        confidence=_ratios(confidence, counts),
        accuracy=_ratios(right, counts),
    )


def auroc(positive: Tensor, negative: Tensor) -> float | None:
    """The probability that a positive's score is larger than a negative's; equal ones count half.

    Args:
        positive: scores, ``(n,)``.
        negative: scores, ``(m,)``.

    Returns:
        None where one of the two has none.

    >>> auroc(torch.tensor([1.0, 2.0]), torch.tensor([0.0, 1.0]))
    0.875
    """
    if not len(positive) or not len(negative):
        return None
    # torchmetrics takes scores outside 0 to 1 for logits, and its sigmoid makes large ones equal.
    ordered = negative.sort().values
    below = torch.searchsorted(ordered, positive, right=False)
    not_above = torch.searchsorted(ordered, positive, right=True)
    wins = (below + not_above).double().sum() / 2
    return float(wins / (len(positive) * len(negative)))


def _ratios(sums: Tensor, counts: Tensor) -> list[float | None]:
    return [float(a / n) if n else None for a, n in zip(sums, counts, strict=True)]
