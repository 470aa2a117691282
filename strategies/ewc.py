"""Elastic weight consolidation."""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from bpn_lightning.errors import ConfigurationError
from bpn_lightning.importance import FisherLabels, fisher_diagonal
from bpn_lightning.random_state import seeded_generator
from bpn_lightning.strategies.base import ContinualStrategy
from bpn_lightning.tasks import ContinualHost, Task

__all__ = ["EWC", "QuadraticPenalty"]

LABELS = ("empirical", "sampled", "exact", "predicted")
UPDATES = ("proximal", "clamped", "gradient")


class QuadraticPenalty:
    r"""The sum of all tasks' penalties :math:`\sum_k F_k (\theta - \theta^*_k)^2` as one.

    With :math:`A = \sum_k F_k` and :math:`\mu = \sum_k F_k \theta^*_k / A` the sum is
    :math:`A (\theta - \mu)^2 + C`: exact, and no larger after the hundredth task than after the first.

    State:
        ``importance`` A and ``anchor`` :math:`\mu`, one tensor each per parameter, and the scalar
        ``constant`` C: 8 bytes per float32 parameter.
    """

    def __init__(self) -> None:
        self.importance: dict[str, Tensor] = {}
        self.anchor: dict[str, Tensor] = {}
        self.constant = 0.0

    def __bool__(self) -> bool:
        return bool(self.importance)

    def add(self, importance: Mapping[str, Tensor], solution: Mapping[str, Tensor]) -> None:
        """Add a task: its importances and its solution, by parameter name."""
        new_importance, new_anchor = dict(self.importance), dict(self.anchor)
        constant = self.constant
        for name, added in importance.items():
            theta = solution[name].detach()
            old = self.importance.get(name, torch.zeros_like(added))
            anchor = self.anchor.get(name, theta)
            # The running mean keeps differences small where sums of F theta would cancel.
            total, share, gap = old.double() + added, added.double(), theta.double() - anchor
            weight = torch.where(total > 0, share / total, torch.ones_like(total))
            new_importance[name] = total.to(added.dtype)
            new_anchor[name] = (anchor + weight * gap).to(theta.dtype)
            constant += float((old * weight * gap.square()).sum())
        self.importance, self.anchor, self.constant = new_importance, new_anchor, constant

    def value(self, parameters: Mapping[str, Tensor]) -> Tensor:
        """The penalty of these parameters without its strength, a scalar."""
        terms = [
            (importance * (parameters[name].detach() - self.anchor[name]).square()).sum()
            for name, importance in self.importance.items()
            if name in parameters
        ]
        return (torch.stack(terms).sum() if terms else torch.zeros(())) + self.constant

    def state_dict(self) -> dict[str, Any]:
        """Everything that a restart needs."""
        return {
            "importance": self.importance,
            "anchor": self.anchor,
            "constant": self.constant,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what :meth:`state_dict` gave."""
        self.importance = dict(state["importance"])
        self.anchor = dict(state["anchor"])
        self.constant = float(state["constant"])

    def to(self, device: torch.device) -> None:
        """Move to a device."""
        self.importance = {name: value.to(device) for name, value in self.importance.items()}
        self.anchor = {name: value.to(device) for name, value in self.anchor.items()}


class EWC(ContinualStrategy):
    r"""Elastic weight consolidation: a quadratic pull towards each past task's solution.

    .. math:: \lambda \sum_k \sum_i F_{k,i} (\theta_i - \theta^*_{k,i})^2

    Eq. 3 of Kirkpatrick et al. (2017), https://arxiv.org/abs/1612.00796, without its 1/2, as in Alg. 2
    of Wen et al. F is the diagonal Fisher information of the finished task from per-sample gradients,
    over all its samples, in its mode.

    Differs from the paper: the sum over tasks is kept as two running sums (exact, and the same cost
    at any number of tasks), and by default the pull is an implicit step after the optimizer's,
    because the explicit gradient diverges once the learning rate times 2 lambda F exceeds 2.

    Args:
        strength: lambda, dimensionless; 0 is fine-tuning. Kirkpatrick's lambda is twice this value.
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
        ConfigurationError: strength is negative or not finite, or a choice is unknown.
    """

    def __init__(
        self,
        strength: float = 2000.0,
        *,
        fisher: FisherLabels = "empirical",
        update: Literal["proximal", "clamped", "gradient"] = "proximal",
        include_head: bool | None = None,
    ) -> None:
        if not 0 <= strength < float("inf"):
            raise ConfigurationError(
                f"Expected strength to be 0 or a positive number, but got {strength}. "
                "0 is fine-tuning; the paper uses 2000."
            )
        for argument, value, known in (("fisher", fisher, LABELS), ("update", update, UPDATES)):
            if value not in known:
                raise ConfigurationError(
                    f"Expected {argument} to be one of {', '.join(known)}, but got {value!r}."
                )
        self.strength = strength
        self.fisher: FisherLabels = fisher
        self.update = update
        self.include_head = include_head
        self.penalty = QuadraticPenalty()
        # The implicit step's weights, a function of the importances and of these learning rates.
        self._rates: dict[str, float] | None = None
        self._weights: list[Tensor] = []

    def check(self, host: ContinualHost, optimizer: Optimizer) -> None:
        """Refuse the implicit step beside anything but plain SGD: it would not be its minimiser."""
        if self.update != "proximal" or self.strength == 0:
            return
        momentum = max(group.get("momentum", 0) for group in optimizer.param_groups)
        if type(optimizer) is not SGD or momentum:
            got = type(optimizer).__name__ + (f" with momentum {momentum}" if momentum else "")
            raise ConfigurationError(
                "Expected the optimizer to be torch.optim.SGD without momentum where EWC's update is "
                f"'proximal', but got {got}. Set update to 'clamped'."
            )

    def parameters(self, host: ContinualHost) -> dict[str, nn.Parameter]:
        """What is held: the shared parameters, with or without the head."""
        include = host.mask != "task" if self.include_head is None else self.include_head
        return host.shared_parameters(include_head=include)

    def _held(self, parameters: Mapping[str, nn.Parameter]) -> list[str]:
        """Names of what has importance and is trainable now: a frozen layer needs no pull."""
        return [name for name in self.penalty.importance if name in parameters]

    def on_task_end(self, host: ContinualHost, task: Task) -> None:
        """Add the task's Fisher and its solution to the running sums."""
        parameters = self.parameters(host)
        if self.strength == 0 or not parameters:
            return
        generator = None
        if self.fisher == "sampled":
            key = ("fisher", host.stream.seed, task.id)
            generator = seeded_generator(*key, device=host.device)
        fisher = fisher_diagonal(host, task.id, parameters, self.fisher, generator)
        self.penalty.add(fisher, parameters)
        self._rates = None

    def penalty_grad(self, host: ContinualHost, parameters: Mapping[str, nn.Parameter]) -> None:
        """Add 2 lambda A (theta - mu), with 2 lambda A at most 1 / lr when clamped."""
        if self.update == "proximal" or not self.penalty:
            return
        held = [(name, parameters[name]) for name in self._held(parameters)]
        held = [(name, value) for name, value in held if value.grad is not None]
        if not held:
            return
        pull = torch._foreach_mul(
            [self.penalty.importance[name] for name, _ in held], 2 * self.strength
        )
        if self.update == "clamped":
            for value, (_, parameter) in zip(pull, held, strict=True):
                rate = host.learning_rate(parameter)
                if rate > 0:
                    value.clamp_(max=1 / rate)
        gaps = torch._foreach_sub(
            [value.detach() for _, value in held], [self.penalty.anchor[name] for name, _ in held]
        )
        gradients = [value.grad for _, value in held if value.grad is not None]
        torch._foreach_addcmul_(gradients, pull, gaps)

    def on_optimizer_stepped(
        self, host: ContinualHost, parameters: Mapping[str, nn.Parameter]
    ) -> None:
        """Take the implicit step on the penalty alone: its exact minimiser near theta."""
        if self.update != "proximal" or not self.penalty:
            return
        names = self._held(parameters)
        if not names:
            return
        rates = {name: host.learning_rate(parameters[name]) for name in names}
        if rates != self._rates:
            pulls = torch._foreach_mul(
                [self.penalty.importance[name] for name in names],
                [2 * self.strength * rate for rate in rates.values()],
            )
            self._weights = [pull / (1 + pull) for pull in pulls]
            self._rates = rates
        held: list[Tensor] = [parameters[name] for name in names]
        with torch.no_grad():
            torch._foreach_lerp_(held, [self.penalty.anchor[name] for name in names], self._weights)

    def logs(self, host: ContinualHost) -> dict[str, Tensor]:
        """The penalty's value, strength included."""
        if not self.penalty:
            return {}
        return {"penalty/ewc": self.strength * self.penalty.value(self.parameters(host))}

    def state_dict(self) -> dict[str, Any]:
        """The running sums."""
        return self.penalty.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over saved running sums."""
        self.penalty.load_state_dict(state_dict)
        self._rates = None

    def move_state(self, host: ContinualHost) -> None:
        """Move the running sums to the host's device."""
        self.penalty.to(host.device)
