"""Synaptic intelligence."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from bpn_lightning.checks import check_above_zero, check_choice
from bpn_lightning.errors import ConfigurationError
from bpn_lightning.host import ContinualHost
from bpn_lightning.nn.head import without_rows
from bpn_lightning.strategies.penalty import PenaltyStrategy, Update
from bpn_lightning.tasks import Task

__all__ = ["Clamp", "SynapticIntelligence", "add_importance"]

Clamp = Literal["cumulative", "per_task", "none"]
CLAMPS = ("cumulative", "per_task", "none")


def add_importance(
    importance: Tensor, path: Tensor, change: Tensor, damping: float, clamp: Clamp
) -> Tensor:
    r"""The importances after one more task.

    .. math:: \Omega_t = \Omega_{t-1} + \frac{\omega}{\Delta^2 + \xi}

    Args:
        importance: of the previous tasks, any shape.
        path: omega, the task's path integral :math:`-\sum_s g_s \cdot \Delta\theta_s`.
        change: Delta, how far the task moved each parameter.
        damping: xi, above 0.
        clamp: where negative values are set to 0: in the sum (``cumulative``), in the task's
            contribution (``per_task``), or nowhere (``none``).

    >>> one, minus = torch.ones(1), -torch.ones(1)
    >>> [add_importance(one, minus * 2, one, 1.0, c).item() for c in ("per_task", "none")]
    [1.0, 0.0]
    """
    added = path / (change.square() + damping)
    if clamp == "per_task":
        return importance + added.relu()
    total = importance + added
    return total.relu() if clamp == "cumulative" else total


class SynapticIntelligence(PenaltyStrategy):
    r"""SI: a penalty towards the last solution, weighted by each parameter's contribution to the loss decrease.

    .. math:: c \sum_i \Omega_i (\theta_i - \tilde\theta_i)^2, \quad
        \Omega_i = \sum_k \frac{\omega_{k,i}}{\Delta_{k,i}^2 + \xi}, \quad
        \omega_{k,i} = -\sum_s g_{s,i} (\theta_{s+1,i} - \theta_{s,i})

    Zenke et al. (2017), https://arxiv.org/abs/1703.04200. The sum over s runs over the updates of task
    k, and Delta is how far they moved the parameter. g is the gradient of the task's loss only, over
    all processes and accumulated batches, before any penalty, projection or clipping; the change is
    the actual one, including momentum, weight decay, clipping and the penalties of this strategy and
    of others, also as proximal steps. An update that the gradient scaler skips adds nothing.

    Differs from the paper: negative sums are set to 0, as in the authors' code (``clamp``). The gradient
    coefficient is limited by default: below the limit there is no difference, and above twice the limit
    the explicit gradient diverges.

    Args:
        strength: c, dimensionless; 0 is fine-tuning.
        damping: xi, in units of squared weights, above 0.
        clamp: where negative values are set to 0: in the sum over tasks (``cumulative``), in each
            task's contribution (``per_task``), or nowhere (``none``).
        update: ``clamped`` (add 2 c Omega (theta - theta~) to the gradient, with 2 c Omega limited to
            1 / lr), ``gradient`` (the same without the limit), or ``proximal`` (an implicit step after
            the optimizer's; only with plain SGD and without negative importances).
        include_head: whether the head is penalized too; by default unless each task has its own rows
            (``mask="task"``).

    State:
        importance Omega, anchor theta~, path omega: one tensor each per shared parameter, 12 bytes per
        parameter, and 8 more during an update; nothing is needed for inference.

    Raises:
        ConfigurationError: strength is negative or not finite, damping is not above 0, or an option is
            unknown or incompatible with another.
    """

    penalty_name: ClassVar[str] = "si"
    copies: ClassVar[int] = 3

    def __init__(
        self,
        strength: float = 1.0,
        *,
        damping: float = 1e-3,
        clamp: Clamp = "cumulative",
        update: Update = "clamped",
        include_head: bool | None = None,
    ) -> None:
        super().__init__(strength, update, include_head, usual="the authors use 0.1 and 1")
        check_above_zero("damping", damping, "The authors use 0.1 and 0.001.")
        check_choice("clamp", clamp, CLAMPS)
        if clamp == "none" and update == "proximal":
            raise ConfigurationError(
                "Expected clamp to be cumulative or per_task when update is 'proximal', but got "
                "'none': a proximal step needs importances of at least 0. Set update to 'clamped'."
            )
        self.damping = damping
        self.clamp: Clamp = clamp

    def reset(self) -> None:
        """Start with an empty penalty and an empty path."""
        super().reset()
        self.path: dict[str, Tensor] = {}
        # Of the current update: names, gradients of the task's loss, weights before it.
        self._names: list[str] = []
        self._gradients: list[Tensor] = []
        self._before: list[Tensor] = []

    def on_task_start(self, host: ContinualHost, task: Task) -> None:
        """Start the path at the current weights."""
        if self.strength == 0:
            return
        parameters = self.parameters(host)
        self.penalty.replace({}, parameters)
        self.path = {name: torch.zeros_like(value) for name, value in parameters.items()}

    def capture_grad(self, host: ContinualHost, parameters: Mapping[str, nn.Parameter]) -> None:
        """Store the gradients of the task's loss, and the weights before the update."""
        moving = {
            name: parameters[name]
            for name in self.path
            if name in parameters and parameters[name].grad is not None
        }
        self._names = list(moving)
        self._gradients = [p.grad.clone() for p in moving.values() if p.grad is not None]
        self._before = [p.detach().clone() for p in moving.values()]

    def observe_step(self, host: ContinualHost, parameters: Mapping[str, nn.Parameter]) -> None:
        """Add the update's contribution to the path integral."""
        if not self._names:
            return
        after = [parameters[name].detach() for name in self._names]
        path = [self.path[name] for name in self._names]
        torch._foreach_sub_(self._before, after)
        torch._foreach_addcmul_(path, self._gradients, self._before)
        self._names, self._gradients, self._before = [], [], []

    def on_task_end(self, host: ContinualHost, task: Task) -> None:
        """Convert the path integral to importances, and move the anchor to the task's solution."""
        parameters = self.parameters(host)
        trained = {name: value for name, value in parameters.items() if name in self.path}
        importance = {
            name: add_importance(
                self.penalty.importance.get(name, torch.zeros_like(self.path[name])),
                self.path[name],
                value.detach() - self.penalty.anchor[name],
                self.damping,
                self.clamp,
            )
            for name, value in trained.items()
        }
        self.penalty.replace(importance, trained)
        self.path = {name: torch.zeros_like(value) for name, value in self.path.items()}

    def forget(self, host: ContinualHost, task: Task) -> Sequence[str]:
        """Overwrite its rows of the head, in the path as well."""
        self.path = without_rows(self.path, host.network.structure.freed_columns(task.id))
        return super().forget(host, task)

    def state_dict(self) -> dict[str, Any]:
        """Importances, anchors, and the path so far."""
        return {**super().state_dict(), "path": self.path}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore importances, anchors, and the path."""
        super().load_state_dict(state_dict)
        self.path = {name: value.clone() for name, value in state_dict["path"].items()}

    def move_state(self, host: ContinualHost) -> None:
        """Move importances, anchors and the path to the host's device."""
        super().move_state(host)
        self.path = {name: value.to(host.device) for name, value in self.path.items()}
