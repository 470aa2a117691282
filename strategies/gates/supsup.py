"""One gradient step on the weights of a mixture of modes."""

from torch import Tensor

from bpn_lightning.functional.task_scores import mixed_logits, one_step_gradient
from bpn_lightning.strategies.gates.base import TaskGate

__all__ = ["SupSup"]


class SupSup(TaskGate):
    r"""The mode whose weight in an even mixture lowers the output's entropy fastest.

    .. math:: \arg\max_k \left(-\frac{\partial H(p(\alpha))}{\partial \alpha_k}\right), \quad
        \alpha = (1/T, \dots, 1/T)

    Wortsman et al., "Supermasks in superposition" (2020), https://arxiv.org/abs/2006.14769.

    Differs from the paper: the logits of the modes are mixed, and not their weights, so it costs a
    forward in each mode; :func:`~bpn_lightning.functional.task_scores.one_step_gradient` takes any
    other mixture.

    State:
        none.
    """

    looks_at = "logits"

    def task_scores(self, seen: Tensor) -> Tensor:
        """``(n, tasks)`` of logits ``(tasks, n, classes)``."""
        tasks, samples = seen.shape[:2]
        return one_step_gradient(mixed_logits(seen), samples, tasks, seen.device)
