r"""A quadratic penalty towards past solutions: its state, and three ways to apply it.

EWC, SI, MAS and SLNID differ in the importance of each parameter, :math:`\Omega`, and share the rest:
:math:`\lambda \sum_i \Omega_i (\theta_i - \mu_i)^2`, with its gradient in closed form. The gradient is
added after gradients are reduced over processes and unscaled, so it is the same on every process and
cannot overflow in fp16.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from bpn_lightning.checks import check_choice, check_number
from bpn_lightning.costs import DeclaredBytes
from bpn_lightning.errors import ConfigurationError
from bpn_lightning.functional.penalties import (
    add_penalty_grad_,
    gradient_coefficients,
    merged_quadratic,
    proximal_step_,
    proximal_weights,
)
from bpn_lightning.host import ContinualHost
from bpn_lightning.nn.head import without_rows
from bpn_lightning.strategies.base import ContinualStrategy, refuse_fused
from bpn_lightning.tasks import Task

__all__ = ["UPDATES", "PenaltyStrategy", "QuadraticPenalty", "Update"]

Update = Literal["proximal", "clamped", "gradient"]
UPDATES = ("proximal", "clamped", "gradient")


# --- state ---------------------------------------------------------------------------------------


class QuadraticPenalty:
    r"""The merged penalty of all tasks, :math:`\sum_i \Omega_i (\theta_i - \mu_i)^2 + C`.

    Its size does not depend on the number of tasks. It is falsy until a task is added.

    State:
        ``importance`` :math:`\Omega` and ``anchor`` :math:`\mu`, one tensor each per parameter, and the
        scalar ``constant`` C: 8 bytes per float32 parameter.
    """

    def __init__(self) -> None:
        self.importance: dict[str, Tensor] = {}
        self.anchor: dict[str, Tensor] = {}
        self.constant = 0.0

    def __bool__(self) -> bool:
        return bool(self.importance)

    def add(self, importance: Mapping[str, Tensor], solution: Mapping[str, Tensor]) -> None:
        r"""Add a task that keeps its own anchor: :math:`\sum_k F_k (\theta - \theta^*_k)^2`, exactly."""
        new_importance, new_anchor = dict(self.importance), dict(self.anchor)
        constant = self.constant
        for name, added in importance.items():
            theta = solution[name].detach()
            old = self.importance.get(name, torch.zeros_like(added))
            anchor = self.anchor.get(name, theta)
            total, mean, left = merged_quadratic(old, anchor, added, theta)
            new_importance[name], new_anchor[name] = total, mean
            constant += float(left)
        self.importance, self.anchor, self.constant = new_importance, new_anchor, constant

    def accumulate(
        self,
        importance: Mapping[str, Tensor],
        solution: Mapping[str, Tensor],
        keep: float = 1.0,
    ) -> None:
        """Add a task and move the one anchor to its solution.

        Args:
            importance: what is added, by parameter name.
            solution: the last solution, by parameter name.
            keep: gamma, the factor applied to the importances so far.
        """
        kept = {name: value * keep for name, value in self.importance.items()}
        for name, added in importance.items():
            old = self.importance.get(name, torch.zeros_like(added))
            kept[name] = (keep * old.double() + added).to(added.dtype)
        self.replace(kept, {name: solution[name] for name in importance})

    def replace(self, importance: Mapping[str, Tensor], solution: Mapping[str, Tensor]) -> None:
        """Set importances, and anchors to copies of a solution; other names stay as they are."""
        anchor = {name: value.detach().clone() for name, value in solution.items()}
        self.importance = {**self.importance, **importance}
        self.anchor = {**self.anchor, **anchor}

    def forget_rows(self, rows: slice) -> None:
        """Overwrite rows of the head by 0, which nothing holds back."""
        self.importance = without_rows(self.importance, rows)
        self.anchor = without_rows(self.anchor, rows)

    def value(self, parameters: Mapping[str, Tensor]) -> Tensor:
        """The penalty of these parameters without its strength, a scalar."""
        terms = [
            (importance * (parameters[name].detach() - self.anchor[name]).square()).sum()
            for name, importance in self.importance.items()
            if name in parameters
        ]
        return (torch.stack(terms).sum() if terms else torch.zeros(())) + self.constant

    def state_dict(self) -> dict[str, Any]:
        """The state to save in a checkpoint."""
        return {
            "importance": self.importance,
            "anchor": self.anchor,
            "constant": self.constant,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the result of :meth:`state_dict`."""
        self.importance = dict(state["importance"])
        self.anchor = dict(state["anchor"])
        self.constant = float(state["constant"])

    def to(self, device: torch.device) -> None:
        """Move to a device."""
        self.importance = {name: value.to(device) for name, value in self.importance.items()}
        self.anchor = {name: value.to(device) for name, value in self.anchor.items()}


class PenaltyStrategy(ContinualStrategy):
    """Base of strategies with a quadratic penalty; subclasses fill ``penalty`` when a task ends.

    Args:
        strength: lambda; 0 stores nothing and does nothing.
        update: ``proximal``, ``clamped`` or ``gradient``.
        include_head: whether the head is penalized; None: unless each task has its own rows.
        usual: a typical strength, for the error message.
    """

    regularizer: ClassVar[bool] = True
    needs_full_precision: ClassVar[bool] = True
    null_arguments: ClassVar[Mapping[str, Any] | None] = {"strength": 0.0}
    weights_in_state: ClassVar[Collection[str]] = ("anchor",)
    #: The penalty's name in logs.
    penalty_name: ClassVar[str]
    #: Number of tensors kept per parameter, each of its size.
    copies: ClassVar[int] = 2

    def __init__(
        self, strength: float, update: Update, include_head: bool | None, usual: str
    ) -> None:
        check_number("strength", strength, f"0 is fine-tuning; {usual}.")
        check_choice("update", update, UPDATES)
        self.strength = strength
        self.update: Update = update
        self.include_head = include_head
        self.reset()

    def reset(self) -> None:
        """Start with an empty penalty."""
        self.penalty = QuadraticPenalty()
        # Cached coefficients: a function of these importances, names and learning rates.
        self._factors: list[Tensor] = []
        self._factors_of: tuple[dict[str, Tensor], dict[str, float]] = ({}, {})

    # --- properties ------------------------------------------------------------------------------

    @property
    def corrects_weights(self) -> bool:
        """Whether it takes a separate step after the optimizer's."""
        return self.update == "proximal" and self.strength > 0

    @property
    def effective_strength(self) -> float:
        """The factor of the penalty."""
        return self.strength

    def check(self, host: ContinualHost, optimizer: Optimizer) -> None:
        """Refuse optimizers with which the chosen update would not be the documented one.

        The implicit step minimizes its objective only after plain SGD; and a fused optimizer unscales
        fp16 gradients in its step, after the penalty was added.
        """
        if self.strength == 0:
            return
        name = type(self).__name__
        momentum = max(group.get("momentum", 0) for group in optimizer.param_groups)
        if self.update == "proximal" and (type(optimizer) is not SGD or momentum):
            got = type(optimizer).__name__ + (f" with momentum {momentum}" if momentum else "")
            raise ConfigurationError(
                "Expected the optimizer to be torch.optim.SGD without momentum when "
                f"{name}'s update is 'proximal', but got {got}. Set update to 'clamped'."
            )
        refuse_fused(name, host, optimizer)

    def parameters(self, host: ContinualHost) -> dict[str, nn.Parameter]:
        """The penalized parameters: the shared ones, with or without the head."""
        include = host.network.mask != "task" if self.include_head is None else self.include_head
        return host.network.shared_parameters(include_head=include)

    def forget(self, host: ContinualHost, task: Task) -> Sequence[str]:
        """Overwrite its rows of the head; the rest is of all tasks together."""
        self.penalty.forget_rows(host.network.structure.freed_columns(task.id))
        return ["importances and anchors, merged over tasks"] if self.penalty else []

    # --- an update -------------------------------------------------------------------------------

    def penalty_grad(self, host: ContinualHost, parameters: Mapping[str, nn.Parameter]) -> None:
        """Add 2 lambda Omega (theta - mu), with 2 lambda Omega limited to 1 / lr when clamped."""
        if self.update == "proximal" or not self.penalty or self.effective_strength == 0:
            return
        held = {n: p for n, p in self._held(parameters).items() if p.grad is not None}
        if held:
            gradients = [value.grad for value in held.values() if value.grad is not None]
            anchors = [self.penalty.anchor[name] for name in held]
            add_penalty_grad_(
                gradients, list(held.values()), anchors, self._update_factors(host, held)
            )

    def correct_step(self, host: ContinualHost, parameters: Mapping[str, nn.Parameter]) -> None:
        """Take the proximal step of the penalty: its exact minimizer near theta."""
        if self.update != "proximal" or not self.penalty or self.effective_strength == 0:
            return
        held = self._held(parameters)
        if held:
            anchors = [self.penalty.anchor[name] for name in held]
            proximal_step_(list(held.values()), anchors, self._update_factors(host, held))

    def _held(self, parameters: Mapping[str, nn.Parameter]) -> dict[str, nn.Parameter]:
        """Parameters that have an importance and are trained now; frozen ones need no penalty."""
        return {name: parameters[name] for name in self.penalty.importance if name in parameters}

    def _update_factors(
        self, host: ContinualHost, held: Mapping[str, nn.Parameter]
    ) -> list[Tensor]:
        """Gradient coefficients or proximal weights of the held parameters, cached until an input changes."""
        importance = self.penalty.importance
        rates = {name: host.learning_rate(value) for name, value in held.items()}
        if self._factors_of[0] is not importance or self._factors_of[1] != rates:
            tensors, by_name = [importance[name] for name in held], list(rates.values())
            if self.update == "proximal":
                self._factors = proximal_weights(tensors, self.effective_strength, by_name)
            else:
                limits = by_name if self.update == "clamped" else None
                self._factors = gradient_coefficients(tensors, self.effective_strength, limits)
            self._factors_of = (importance, rates)
        return self._factors

    # --- costs, logs and checkpoints -------------------------------------------------------------

    def declared_bytes(self, host: ContinualHost) -> DeclaredBytes:
        """Training: ``copies`` times the penalized parameters; inference: nothing."""
        if self.strength == 0:
            return DeclaredBytes()
        held = self.parameters(host).values()
        return DeclaredBytes(self.copies * sum(p.numel() * p.element_size() for p in held))

    def logs(self, host: ContinualHost) -> dict[str, Tensor]:
        """The penalty's value, strength included."""
        if not self.penalty:
            return {}
        value = self.effective_strength * self.penalty.value(self.parameters(host))
        return {f"penalty/{self.penalty_name}": value}

    def training_state(self) -> str:
        """The importances and their anchors."""
        return "importances"

    def state_dict(self) -> dict[str, Any]:
        """Importances and anchors."""
        return self.penalty.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore importances and anchors."""
        self.penalty.load_state_dict(state_dict)

    def move_state(self, host: ContinualHost) -> None:
        """Move importances and anchors to the host's device."""
        self.penalty.to(host.device)
