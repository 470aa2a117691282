"""Elastic weight consolidation, with one anchor per task or, online, a single one."""

from typing import ClassVar

from bpn_lightning.checks import check_choice, check_number
from bpn_lightning.functional.importance import FisherLabels, fisher_diagonal
from bpn_lightning.host import ContinualHost
from bpn_lightning.random_state import seeded_generator
from bpn_lightning.strategies.penalty import PenaltyStrategy, Update
from bpn_lightning.tasks import Task

__all__ = ["EWC"]

LABELS = ("empirical", "sampled", "exact", "predicted")


class EWC(PenaltyStrategy):
    r"""Elastic weight consolidation: a quadratic penalty towards each past task's solution.

    .. math:: \lambda \sum_k \sum_i F_{k,i} (\theta_i - \theta^*_{k,i})^2

    Eq. 3 of Kirkpatrick et al. (2017), https://arxiv.org/abs/1612.00796, without the 1/2, as in Alg. 2
    of Wen et al. F is the diagonal Fisher information of the finished task, from per-sample gradients
    of all its samples, in its mode. With ``gamma`` it is online EWC, which has a single anchor,

    .. math:: \lambda \gamma \sum_i \tilde F_{t-1,i} (\theta_i - \theta^*_{t-1,i})^2, \quad
        \tilde F_t = \gamma \tilde F_{t-1} + F_t

    of Schwarz et al. (2018), https://arxiv.org/abs/1805.06370.

    Differs from the papers: the sum over tasks is kept as two running sums (exact, at a cost
    independent of the number of tasks), and by default the penalty is an implicit (proximal) step after
    the optimizer's, because the explicit gradient diverges if lr * 2 lambda F exceeds 2.

    Args:
        strength: lambda, dimensionless; 0 is fine-tuning. Kirkpatrick's lambda is twice this value.
        gamma: decay of the past importances per task, in [0, 1]; 0 is fine-tuning, because gamma also
            multiplies the loss. None: one anchor per task, without decay.
        fisher: the labels used in the Fisher: the true ones (``empirical``), one sampled from the
            network's softmax (``sampled``), all classes weighted by it (``exact``), or the most likely
            class (``predicted``).
        update: ``proximal`` (after the optimizer's step, theta is set to
            (theta + 2 lr lambda A mu) / (1 + 2 lr lambda A); plain SGD only), ``gradient`` (add
            2 lambda A (theta - mu) to the gradient), or ``clamped`` (the same with 2 lambda A limited
            to 1 / lr).
        include_head: whether the head is penalized too; by default unless each task has its own rows
            (``mask="task"``).

    State:
        importance A, anchor mu: one tensor each per shared parameter, 8 bytes per parameter; nothing
        is needed for inference.

    Raises:
        ConfigurationError: strength is negative or not finite, gamma is outside [0, 1], or a choice is
            unknown.
    """

    penalty_name: ClassVar[str] = "ewc"

    def __init__(
        self,
        strength: float = 2000.0,
        *,
        gamma: float | None = None,
        fisher: FisherLabels = "empirical",
        update: Update = "proximal",
        include_head: bool | None = None,
    ) -> None:
        super().__init__(strength, update, include_head, usual="the paper uses 2000")
        if gamma is not None:
            check_number(
                "gamma",
                gamma,
                "1 keeps past importances without decay; None keeps one anchor per task.",
                at_most=1,
            )
        check_choice("fisher", fisher, LABELS)
        self.gamma = gamma
        self.fisher: FisherLabels = fisher

    @property
    def effective_strength(self) -> float:
        """Lambda, times gamma in online EWC."""
        return self.strength if self.gamma is None else self.strength * self.gamma

    def on_task_end(self, host: ContinualHost, task: Task) -> None:
        """Add the task's Fisher and its solution to the penalty."""
        parameters = self.parameters(host)
        if self.strength == 0 or not parameters:
            return
        generator = None
        if self.fisher == "sampled":
            key = ("fisher", host.stream.seed, task.id)
            generator = seeded_generator(*key, device=host.device)
        fisher = fisher_diagonal(host, task.id, parameters, self.fisher, generator)
        if self.gamma is None:
            self.penalty.add(fisher, parameters)
        else:
            self.penalty.accumulate(fisher, parameters, keep=self.gamma)
