r"""A quadratic pull towards past solutions: what is remembered of them, and three ways to apply it.

EWC, SI, MAS and SLNID differ in how much each parameter matters, :math:`\Omega`, and share the rest:
:math:`\lambda \sum_i \Omega_i (\theta_i - \mu_i)^2`, with its gradient in closed form. Added to the
gradients after they are reduced over processes and unscaled, it is the same on every process and
never leaves fp16's range.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from bpn_lightning.costs import Bytes
from bpn_lightning.errors import ConfigurationError
from bpn_lightning.tasks import ContinualHost

__all__ = [
    "UPDATES",
    "PenaltyStrategy",
    "QuadraticPenalty",
    "Update",
    "add_pull_",
    "collapsed",
    "explicit_pulls",
    "implicit_shares",
    "refuse_fused",
    "step_back_",
]

Update = Literal["proximal", "clamped", "gradient"]
UPDATES = ("proximal", "clamped", "gradient")


# --- two quadratics as one -----------------------------------------------------------------------


def collapsed(
    importance: Tensor, anchor: Tensor, added: Tensor, solution: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    r"""The sum of two penalties as one with a constant.

    .. math:: A (\theta - \mu)^2 + F (\theta - \theta^*)^2
        = (A + F) (\theta - \mu')^2 + C, \quad \mu' = \mu + \frac{F}{A + F} (\theta^* - \mu)

    As a moving mean, which keeps differences small where sums of F theta would cancel. Where nothing is
    important the anchor is the last solution.

    Args:
        importance: A, at least 0, any shape, as all of them.
        anchor: mu.
        added: F, at least 0.
        solution: theta*.

    Returns:
        A + F and mu', in the precision of the arguments, and C summed, a scalar in double precision.
    """
    total, gap = importance.double() + added, solution.double() - anchor
    share = torch.where(total > 0, added.double() / total, torch.ones_like(total))
    constant = (importance * share * gap.square()).sum()
    mean = torch.lerp(anchor.double(), solution.double(), share)  # exact at a share of 0 and of 1
    return total.to(added.dtype), mean.to(solution.dtype), constant


# --- three updates -------------------------------------------------------------------------------


def explicit_pulls(
    importances: Sequence[Tensor], strength: float, rates: Sequence[float] | None = None
) -> list[Tensor]:
    r"""What gaps :math:`\theta - \mu` are multiplied by in the gradient: :math:`2 \lambda \Omega`.

    Args:
        importances: one tensor per parameter.
        strength: lambda.
        rates: learning rates; with them, a pull is at most 1 / rate: one step of plain gradient descent
            reaches the anchor and does not pass it.

    >>> explicit_pulls([torch.tensor([1.0, 9.0])], 0.5, [0.5])
    [tensor([1., 2.])]
    """
    pulls = list(torch._foreach_mul(list(importances), 2 * strength))
    for pull, rate in zip(pulls, rates or [0.0] * len(pulls), strict=True):
        if rate > 0:
            pull.clamp_(max=1 / rate)
    return pulls


def implicit_shares(
    importances: Sequence[Tensor], strength: float, rates: Sequence[float]
) -> list[Tensor]:
    r"""The share of each gap that an implicit step on the penalty closes.

    .. math:: \frac{2 \eta\lambda\Omega}{1 + 2 \eta\lambda\Omega}

    The minimiser of :math:`\eta\lambda\Omega (\theta - \mu)^2 + \frac12 (\theta - \theta_0)^2` lies
    so far from :math:`\theta_0` towards mu; at any strength it is between the two.

    >>> implicit_shares([torch.tensor([1.0, 1.5])], 1.0, [0.5])
    [tensor([0.5000, 0.6000])]
    """
    pulls = torch._foreach_mul(list(importances), [2 * strength * rate for rate in rates])
    return [pull / (1 + pull) for pull in pulls]


def add_pull_(
    gradients: Sequence[Tensor],
    parameters: Sequence[Tensor],
    anchors: Sequence[Tensor],
    pulls: Sequence[Tensor],
) -> None:
    """Add pull times gap to each gradient, in place."""
    with torch.no_grad():
        gaps = torch._foreach_sub(list(parameters), list(anchors))
        torch._foreach_addcmul_(list(gradients), list(pulls), gaps)


def step_back_(
    parameters: Sequence[Tensor], anchors: Sequence[Tensor], shares: Sequence[Tensor]
) -> None:
    """Move each parameter that share of its way to the anchor, in place."""
    with torch.no_grad():
        torch._foreach_lerp_(list(parameters), list(anchors), list(shares))


def refuse_fused(name: str, host: ContinualHost, optimizer: Optimizer) -> None:
    """Refuse an optimizer that takes off fp16's loss scale in its step, after gradients were edited.

    Raises:
        ConfigurationError: names the strategy that edits them.
    """
    if getattr(optimizer, "_step_supports_amp_scaling", False) and host.loss_scale != 1:
        raise ConfigurationError(
            f"Expected the optimizer not to be fused where {name} runs in 16-mixed precision, but "
            f"got a fused {type(optimizer).__name__}. Set fused to False, or use bf16-mixed."
        )


# --- what is remembered --------------------------------------------------------------------------


class QuadraticPenalty:
    r"""All tasks' penalties as one, :math:`\sum_i \Omega_i (\theta_i - \mu_i)^2 + C`.

    No larger after the hundredth task than after the first. It counts as empty until a task is in it.

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
            total, mean, left = collapsed(old, anchor, added, theta)
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
            keep: gamma, what the importances so far are multiplied by.
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


class PenaltyStrategy:
    """The hooks of a strategy that is a quadratic penalty; which tasks it holds is for it to say.

    Mixed into a :class:`~bpn_lightning.strategies.base.ContinualStrategy`, which fills ``penalty`` when
    a task ends and documents the arguments.

    Args:
        strength: lambda; 0 stores nothing and does nothing.
        update: ``proximal``, ``clamped`` or ``gradient``.
        include_head: whether the head is held; None: unless each task has its own rows.
        usual: a strength to begin with, for the message where it is none.
    """

    regulariser: ClassVar[bool] = True
    needs_full_precision: ClassVar[bool] = True
    null_arguments: ClassVar[Mapping[str, Any] | None] = {"strength": 0.0}
    #: The penalty's name in logs.
    penalty_name: ClassVar[str]
    #: Tensors of a parameter's size that are kept for it.
    copies: ClassVar[int] = 2

    def __init__(
        self, strength: float, update: Update, include_head: bool | None, usual: str
    ) -> None:
        if not 0 <= strength < float("inf"):
            raise ConfigurationError(
                f"Expected strength to be 0 or a positive number, but got {strength}. "
                f"0 is fine-tuning; {usual}."
            )
        if update not in UPDATES:
            raise ConfigurationError(
                f"Expected update to be one of {', '.join(UPDATES)}, but got {update!r}."
            )
        self.strength = strength
        self.update: Update = update
        self.include_head = include_head
        self.reset()

    def reset(self) -> None:
        """Hold nothing."""
        self.penalty = QuadraticPenalty()
        # What gaps are multiplied by: a function of these importances, names and learning rates.
        self._factors: list[Tensor] = []
        self._factors_of: tuple[dict[str, Tensor], dict[str, float]] = ({}, {})

    # --- what it is ------------------------------------------------------------------------------

    @property
    def corrects_weights(self) -> bool:
        """Whether it takes a step of its own after the optimizer's."""
        return self.update == "proximal" and self.strength > 0

    @property
    def pull_strength(self) -> float:
        """What the penalty is multiplied by."""
        return self.strength

    def check(self, host: ContinualHost, optimizer: Optimizer) -> None:
        """Refuse optimizers beside which the update would be another one than it says.

        The implicit step is the minimiser of its objective beside plain SGD only; and a fused
        optimizer takes off fp16's loss scale in its step, after the gradients were penalised.
        """
        if self.strength == 0:
            return
        name = type(self).__name__
        momentum = max(group.get("momentum", 0) for group in optimizer.param_groups)
        if self.update == "proximal" and (type(optimizer) is not SGD or momentum):
            got = type(optimizer).__name__ + (f" with momentum {momentum}" if momentum else "")
            raise ConfigurationError(
                "Expected the optimizer to be torch.optim.SGD without momentum where "
                f"{name}'s update is 'proximal', but got {got}. Set update to 'clamped'."
            )
        refuse_fused(name, host, optimizer)

    def parameters(self, host: ContinualHost) -> dict[str, nn.Parameter]:
        """What is held: the shared parameters, with or without the head."""
        include = host.mask != "task" if self.include_head is None else self.include_head
        return host.shared_parameters(include_head=include)

    # --- an update -------------------------------------------------------------------------------

    def penalty_grad(self, host: ContinualHost, parameters: Mapping[str, nn.Parameter]) -> None:
        """Add 2 lambda Omega (theta - mu), with 2 lambda Omega at most 1 / lr when clamped."""
        if self.update == "proximal" or not self.penalty or self.pull_strength == 0:
            return
        held = {n: p for n, p in self._held(parameters).items() if p.grad is not None}
        if held:
            gradients = [value.grad for value in held.values() if value.grad is not None]
            anchors = [self.penalty.anchor[name] for name in held]
            add_pull_(gradients, list(held.values()), anchors, self._update_factors(host, held))

    def correct_step(self, host: ContinualHost, parameters: Mapping[str, nn.Parameter]) -> None:
        """Take the implicit step on the penalty alone: its exact minimiser near theta."""
        if self.update != "proximal" or not self.penalty or self.pull_strength == 0:
            return
        held = self._held(parameters)
        if held:
            anchors = [self.penalty.anchor[name] for name in held]
            step_back_(list(held.values()), anchors, self._update_factors(host, held))

    def _held(self, parameters: Mapping[str, nn.Parameter]) -> dict[str, nn.Parameter]:
        """What has importance and trains now: a frozen layer needs no pull."""
        return {name: parameters[name] for name in self.penalty.importance if name in parameters}

    def _update_factors(
        self, host: ContinualHost, held: Mapping[str, nn.Parameter]
    ) -> list[Tensor]:
        """Pulls or shares of what is held now, computed where anything has changed."""
        importance = self.penalty.importance
        rates = {name: host.learning_rate(value) for name, value in held.items()}
        if self._factors_of[0] is not importance or self._factors_of[1] != rates:
            tensors, by_name = [importance[name] for name in held], list(rates.values())
            if self.update == "proximal":
                self._factors = implicit_shares(tensors, self.pull_strength, by_name)
            else:
                limits = by_name if self.update == "clamped" else None
                self._factors = explicit_pulls(tensors, self.pull_strength, limits)
            self._factors_of = (importance, rates)
        return self._factors

    # --- what it costs, what it says -------------------------------------------------------------

    def declared_bytes(self, host: ContinualHost) -> Bytes:
        """Training: ``copies`` of every parameter that is held; nothing for use after it."""
        if self.strength == 0:
            return Bytes(0, 0)
        held = self.parameters(host).values()
        return Bytes(self.copies * sum(p.numel() * p.element_size() for p in held), 0)

    def logs(self, host: ContinualHost) -> dict[str, Tensor]:
        """The penalty's value, strength included."""
        if not self.penalty:
            return {}
        value = self.pull_strength * self.penalty.value(self.parameters(host))
        return {f"penalty/{self.penalty_name}": value}

    def state_dict(self) -> dict[str, Any]:
        """What is remembered."""
        return self.penalty.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what was remembered."""
        self.penalty.load_state_dict(state_dict)

    def move_state(self, host: ContinualHost) -> None:
        """Move what is remembered to the host's device."""
        self.penalty.to(host.device)
