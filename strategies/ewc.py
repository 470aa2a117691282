"""Elastic weight consolidation, with an anchor for every task or, online, with one."""

from typing import ClassVar

from bpn_lightning.errors import ConfigurationError
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

    Eq. 3 of Kirkpatrick et al. (2017), https://arxiv.org/abs/1612.00796, without its 1/2, as in Alg. 2
    of Wen et al. F is the diagonal Fisher information of the finished task from per-sample gradients,
    over all its samples, in its mode. With ``gamma`` it is online EWC, which has one anchor,

    .. math:: \lambda \gamma \sum_i \tilde F_{t-1,i} (\theta_i - \theta^*_{t-1,i})^2, \quad
        \tilde F_t = \gamma \tilde F_{t-1} + F_t

    of Schwarz et al. (2018), https://arxiv.org/abs/1805.06370.

    Differs from the papers: the sum over tasks is kept as two running sums (exact, and the same cost
    at any number of tasks), and by default the penalty is an implicit (proximal) step after the optimizer's,
    because the explicit gradient diverges once the learning rate times 2 lambda F exceeds 2.

    Args:
        strength: lambda, dimensionless; 0 is fine-tuning. Kirkpatrick's lambda is twice this value.
        gamma: the fraction of the past importances that each task keeps, in [0, 1]; 0 is fine-tuning,
            for it is in the loss too. None: an anchor for every task, whose importances all stay.
        fisher: the labels that the Fisher is taken over: the true ones (``empirical``), one drawn from
            the network's output (``sampled``), all of them, weighted by it (``exact``), or its largest
            (``predicted``).
        update: ``proximal`` (after the optimizer's step, theta goes to
            (theta + 2 lr lambda A mu) / (1 + 2 lr lambda A); plain SGD only), ``gradient`` (add
            2 lambda A (theta - mu) to the gradient), or ``clamped`` (the same with 2 lambda A at most
            1 / lr).
        include_head: whether the head is held too; by default unless each task has its own rows
            (``mask="task"``).

    State:
        importance A, anchor mu: one tensor each per shared parameter, 8 bytes per parameter; nothing
        that has to be stored for use after training.

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
        if gamma is not None and not 0 <= gamma <= 1:
            raise ConfigurationError(
                f"Expected gamma to be from 0 to 1, or None, but got {gamma}. "
                "1 keeps all of the past importances; None gives every task an anchor of its own."
            )
        if fisher not in LABELS:
            raise ConfigurationError(
                f"Expected fisher to be one of {', '.join(LABELS)}, but got {fisher!r}."
            )
        self.gamma = gamma
        self.fisher: FisherLabels = fisher

    @property
    def effective_strength(self) -> float:
        """Lambda, times gamma online."""
        return self.strength if self.gamma is None else self.strength * self.gamma

    def on_task_end(self, host: ContinualHost, task: Task) -> None:
        """Add the task's Fisher and its solution to what is remembered."""
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
