"""Gates that look at the logits of every learned task's mode and need no fit."""

from torch import Tensor

from bpn_lightning.functional.task_scores import confidence, energy, negative_entropy
from bpn_lightning.strategies.gates.base import TaskGate

__all__ = ["Confidence", "Energy", "Entropy"]


class Confidence(TaskGate):
    r"""The mode that is surest: the largest :math:`\max_c \log p_c`.

    Hendrycks and Gimpel, "A baseline for detecting misclassified and out-of-distribution examples"
    (2017), https://arxiv.org/abs/1610.02136.

    State:
        none.
    """

    looks_at = "logits"

    def task_scores(self, seen: Tensor) -> Tensor:
        """``(n, tasks)`` of logits ``(tasks, n, classes)``."""
        return confidence(seen)


class Entropy(TaskGate):
    r"""The mode of the least entropy: the largest :math:`\sum_c p_c \log p_c`.

    The score that Wortsman et al. (2020), https://arxiv.org/abs/2006.14769, compare theirs with.

    State:
        none.
    """

    looks_at = "logits"

    def task_scores(self, seen: Tensor) -> Tensor:
        """``(n, tasks)`` of logits ``(tasks, n, classes)``."""
        return negative_entropy(seen)


class Energy(TaskGate):
    r"""The mode of the least free energy: the largest :math:`\log \sum_c e^{f_c}`.

    Liu, Wang, Owens, Li, "Energy-based out-of-distribution detection" (2020),
    https://arxiv.org/abs/2010.03759, at temperature 1.

    State:
        none.
    """

    looks_at = "logits"

    def task_scores(self, seen: Tensor) -> Tensor:
        """``(n, tasks)`` of logits ``(tasks, n, classes)``."""
        return energy(seen)
