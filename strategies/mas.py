"""Memory aware synapses."""

from typing import ClassVar

from bpn_lightning.functional.importance import output_sensitivity
from bpn_lightning.host import ContinualHost
from bpn_lightning.strategies.penalty import PenaltyStrategy, Update
from bpn_lightning.tasks import Task

__all__ = ["MemoryAwareSynapses"]


class MemoryAwareSynapses(PenaltyStrategy):
    r"""MAS: a penalty towards the last solution, weighted by the sensitivity of the outputs.

    .. math:: \lambda \sum_i \Omega_i (\theta_i - \theta^*_i)^2, \quad
        \Omega_i = \sum_k \frac{1}{N_k} \sum_n
            \left| \partial \|f(x_n)\|_2^2 / \partial \theta_i \right|

    Aljundi et al. (2018), https://arxiv.org/abs/1711.09601. f are the logits of the task's active
    output units, in its mode, x the training inputs of each finished task; labels are not used. The
    importances of all tasks are summed, and theta* is the last task's solution.

    Differs from the published code, which takes the absolute value of a batch's summed gradient (so
    that it agrees only for batches of one sample): here the absolute value is per sample, and each
    sample is used once. The gradient coefficient is limited by default: below the limit there is no
    difference, and above twice the limit the explicit gradient diverges.

    Args:
        strength: lambda, dimensionless; 0 is fine-tuning.
        update: ``clamped`` (add 2 lambda Omega (theta - theta*) to the gradient, with 2 lambda Omega
            limited to 1 / lr), ``gradient`` (the same without the limit), or ``proximal`` (an implicit
            step after the optimizer's; plain SGD only).
        include_head: whether the head is penalized too; by default unless each task has its own rows
            (``mask="task"``).

    State:
        importance Omega, anchor theta*: one tensor each per shared parameter, 8 bytes per parameter;
        nothing is needed for inference.

    Raises:
        ConfigurationError: strength is negative or not finite, or a choice is unknown.
    """

    penalty_name: ClassVar[str] = "mas"

    def __init__(
        self,
        strength: float = 1.0,
        *,
        update: Update = "clamped",
        include_head: bool | None = None,
    ) -> None:
        super().__init__(strength, update, include_head, usual="the paper uses 1")

    def on_task_end(self, host: ContinualHost, task: Task) -> None:
        """Add the task's importances, and move the anchor to its solution."""
        parameters = self.parameters(host)
        if self.strength == 0 or not parameters:
            return
        self.penalty.accumulate(output_sensitivity(host, task.id, parameters), parameters)
