"""Incremental moment matching."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from bpn_lightning.costs import DeclaredBytes, HeldTensors, tensor_bytes
from bpn_lightning.errors import ConfigurationError
from bpn_lightning.functional.importance import FisherLabels, fisher_diagonal
from bpn_lightning.functional.penalties import merged_quadratic
from bpn_lightning.host import ContinualHost
from bpn_lightning.nn.layers import TaskModule
from bpn_lightning.random_state import seeded_generator
from bpn_lightning.strategies.base import ContinualStrategy, refuse_fused
from bpn_lightning.tasks import ContinualStream, Task

__all__ = ["IncrementalMomentMatching", "drop_transfer"]

MODES = ("mean", "mode")
LABELS = ("empirical", "sampled", "exact", "predicted")


def drop_transfer(output: Tensor, before: Tensor, rate: float) -> Tensor:
    r"""Dropout of what is new: :math:`y_{k-1} + \mathrm{dropout}(y - y_{k-1})`.

    Args:
        output: y, of a layer's weights as they are.
        before: of the weights at the previous task's end, for the same input.
        rate: the fraction of the differences that is dropped; the rest grow by 1 / (1 - rate).

    Returns:
        Of the same shape, the output in expectation.
    """
    return before + F.dropout(output - before, rate)


class IncrementalMomentMatching(ContinualStrategy):
    r"""IMM: train task after task, and serve an average of the networks that they ended with.

    .. math:: \theta_{\mathrm{mean}} = \sum_k \alpha_k \theta_k, \quad
              \theta_{\mathrm{mode}} = \sum_k \alpha_k F_k \theta_k \Big/ \sum_k \alpha_k F_k

    Mean-IMM and mode-IMM of Lee et al. (2017), https://arxiv.org/abs/1703.08475, with their three
    transfers, which keep the networks near enough to one another for an average to mean something: a
    task begins with the weights of the last one (weight transfer, always), is pulled to them by
    :math:`\lambda \|\theta - \theta_{k-1}\|^2` (L2-transfer), and trains with dropout of its
    difference to them (drop-transfer). F is the diagonal Fisher information of the finished task.

    The average is for use only: evaluation after a task, checkpoints and ``trainer.test`` see it, and
    the next task goes on from the weights that training had. Accuracies within a task
    (``evaluate_every="epoch"``) and the validation loss are those of the training weights. Under
    ``mask="task"`` the head is not averaged, for each task has its own rows of it. Running statistics
    of batch normalization are averaged with the alphas, in both modes.

    Differs from the paper: the averages are running ones, so memory does not grow with tasks; F is
    from per-sample gradients of all the task's samples, not of a batch's mean, by default with their
    true labels (the authors' code draws labels: ``sampled``); drop-transfer acts on hidden linear
    layers.

    Args:
        mode: ``mean`` or ``mode``.
        strength: lambda of the L2-transfer, dimensionless, on all shared parameters; 0 is none.
        drop: rate of the drop-transfer, fraction of the differences that is dropped, in [0, 1).
        weights: alpha of every task up to a common factor, positive; equal by default.
        fisher: the labels that the Fisher of ``mode`` is taken over, as in EWC.

    State:
        mean: one tensor per shared parameter and float buffer, 4 bytes per number; with ``mode`` the
        sums of the Fishers, 4 P more; with L2- or drop-transfer the weights at the previous task's
        end, 4 P more. Between tasks the module keeps the weights of training, 4 P. Nothing that has
        to be stored for use after training beside the network.

    Raises:
        ConfigurationError: a value is out of range or unknown, weights are not one per task, or there
            is no hidden linear layer for drop-transfer.
    """

    regularizer: ClassVar[bool] = True
    needs_full_precision: ClassVar[bool] = True

    _handles: Sequence[RemovableHandle] = ()  # of the hooks on the layers

    def __init__(
        self,
        mode: Literal["mean", "mode"] = "mode",
        strength: float = 1e-4,
        *,
        drop: float = 0.0,
        weights: Sequence[float] | None = None,
        fisher: FisherLabels = "empirical",
    ) -> None:
        for argument, value, known in (("mode", mode, MODES), ("fisher", fisher, LABELS)):
            if value not in known:
                raise ConfigurationError(
                    f"Expected {argument} to be one of {', '.join(known)}, but got {value!r}."
                )
        if not 0 <= strength < float("inf"):
            raise ConfigurationError(
                f"Expected strength to be 0 or a positive number, but got {strength}. "
                "It is the lambda of the L2-transfer; 0 switches it off."
            )
        if not 0 <= drop < 1:
            raise ConfigurationError(
                f"Expected drop to be at least 0 and below 1, but got {drop}. "
                "It is the rate of the drop-transfer; 0 switches it off."
            )
        if weights is not None and not all(0 < weight < float("inf") for weight in weights):
            raise ConfigurationError(
                f"Expected weights to be positive numbers, but got {list(weights)}. "
                "They are the alphas up to a common factor; leave them out for equal ones."
            )
        self.mode = mode
        self.strength = strength
        self.drop = drop
        self.weights = None if weights is None else list(weights)
        self.fisher: FisherLabels = fisher
        self.reset()

    def reset(self) -> None:
        """Average nothing yet, and leave the layers as they were."""
        self.mean: dict[str, Tensor] = {}
        self.mass: dict[str, Tensor] = {}  # of what has one number for each element
        self.masses: dict[str, float] = {}  # of what has one for all
        self.previous: dict[str, Tensor] = {}
        self._remove_hooks()
        self._comparing = False  # while a hook runs its own layer

    def configure(self, host: ContinualHost, stream: ContinualStream) -> None:
        """Check the weights, and put drop-transfer on the hidden linear layers."""
        if self.weights is not None and len(self.weights) != len(stream.tasks):
            raise ConfigurationError(
                f"Expected weights to have one number for each of the {len(stream.tasks)} tasks, but "
                f"got {len(self.weights)}. Leave them out for equal ones."
            )
        self._remove_hooks()
        if self.drop == 0:
            return
        hidden = {
            name: layer for name, layer in host.network.linear_layers().items() if name != "head"
        }
        if not hidden:
            raise ConfigurationError(
                "Expected the backbone to have linear layers where drop is set, but it has none. "
                "Set drop to 0."
            )
        # Before those who listen to a layer: the last that they hear of it is what goes on from it.
        self._handles = [
            layer.register_forward_hook(partial(self._drop, name), prepend=True)
            for name, layer in hidden.items()
        ]

    def check(self, host: ContinualHost, optimizer: Optimizer) -> None:
        """Refuse fused optimizers beside a scaler, where there is an L2-transfer."""
        if self.strength > 0:
            refuse_fused(type(self).__name__, host, optimizer)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave the layers as they were."""
        self._remove_hooks()

    def _remove_hooks(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = ()

    def _drop(
        self, name: str, layer: nn.Module, args: tuple[Tensor, ...], output: Tensor
    ) -> Tensor | None:
        """The drop-transfer of one layer, while a task after the first is trained."""
        if self._comparing or not layer.training:
            return None
        weights = {
            key: self.previous[f"{name}.{key}"]
            for key, _ in layer.named_parameters()  # a parametrized weight's lie in a part of it
            if f"{name}.{key}" in self.previous
        }
        if not weights:
            return None
        self._comparing = True
        try:  # the layer itself, with its bias units and keys of now
            before: Tensor = functional_call(layer, weights, args)
        finally:
            self._comparing = False
        return drop_transfer(output, before, self.drop)

    def penalty_grad(self, host: ContinualHost, parameters: Mapping[str, nn.Parameter]) -> None:
        """Add the gradient of the L2-transfer, 2 lambda (theta - theta_previous)."""
        if self.strength == 0 or not self.previous:
            return
        held = [
            (parameter.detach(), self.previous[name], parameter.grad)
            for name, parameter in parameters.items()
            if name in self.previous and parameter.grad is not None
        ]
        if held:
            here, there, gradients = map(list, zip(*held, strict=True))
            torch._foreach_add_(gradients, torch._foreach_sub(here, there), alpha=2 * self.strength)

    def on_task_end(self, host: ContinualHost, task: Task) -> None:
        """Add the task's network to the averages."""
        alpha = 1.0 if self.weights is None else self.weights[task.id]
        parameters = host.network.shared_parameters(include_head=host.network.mask != "task")
        fisher: dict[str, Tensor] = {}
        if self.mode == "mode" and parameters:
            key = ("imm fisher", host.stream.seed, task.id)
            generator = seeded_generator(*key, device=host.device)
            fisher = fisher_diagonal(host, task.id, parameters, self.fisher, generator)
        mean, mass, masses = dict(self.mean), dict(self.mass), dict(self.masses)
        for name, tensor in {**parameters, **_float_buffers(host)}.items():
            solution = tensor.detach()
            before = mean.get(name, solution)
            if name in fisher:
                old = mass.get(name, torch.zeros_like(fisher[name]))
                mass[name], mean[name], _ = merged_quadratic(
                    old, before, alpha * fisher[name], solution
                )
            else:
                weight = torch.tensor(alpha, dtype=torch.float64, device=solution.device)
                total = torch.full_like(weight, masses.get(name, 0.0))
                total, mean[name], _ = merged_quadratic(total, before, weight, solution)
                masses[name] = float(total)
        self.mean, self.mass, self.masses = mean, mass, masses
        if self.strength or self.drop:
            self.previous = {name: value.detach().clone() for name, value in parameters.items()}

    def merged_weights(self, host: ContinualHost) -> Mapping[str, Tensor]:
        """The averages."""
        return self.mean

    def held_tensors(self, host: ContinualHost) -> HeldTensors:
        """The averages, the previous weights, and those of training that the module keeps."""
        return HeldTensors([*super().held_tensors(host).training, *host.training_weights.values()])

    def declared_bytes(self, host: ContinualHost) -> DeclaredBytes:
        """Training: 4 bytes per number, twice for the averages, and as in ``State``."""
        shared = host.network.shared_parameters(include_head=host.network.mask != "task").values()
        parameters, buffers = tensor_bytes(shared), tensor_bytes(_float_buffers(host).values())
        sums = parameters * ((self.mode == "mode") + bool(self.strength or self.drop))
        return DeclaredBytes(2 * (parameters + buffers) + sums)

    def logs(self, host: ContinualHost) -> dict[str, Tensor]:
        """The value of the L2-transfer, strength included."""
        if self.strength == 0 or not self.previous:
            return {}
        parameters = host.network.shared_parameters(include_head=True)
        gaps = [
            (parameters[name].detach() - value).square().sum()
            for name, value in self.previous.items()
            if name in parameters
        ]
        return {"penalty/imm": self.strength * torch.stack(gaps).sum()} if gaps else {}

    def state_dict(self) -> dict[str, Any]:
        """The averages with their masses, and the previous weights."""
        return {
            "mean": self.mean,
            "mass": self.mass,
            "masses": self.masses,
            "previous": self.previous,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over saved averages."""
        for name, value in state_dict.items():
            setattr(self, name, dict(value))

    def move_state(self, host: ContinualHost) -> None:
        """Move the averages and the previous weights to the host's device."""
        for name in ("mean", "mass", "previous"):
            moved = {key: value.to(host.device) for key, value in getattr(self, name).items()}
            setattr(self, name, moved)


def _float_buffers(host: ContinualHost) -> dict[str, Tensor]:
    """The backbone's own, such as running statistics; not what other strategies keep there."""
    backbone = host.network.get_submodule("backbone")
    kept = {
        id(buffer)
        for part in backbone.modules()
        if isinstance(part, TaskModule)
        for buffer in part.buffers()
    }
    return {
        name: buffer
        for name, buffer in backbone.named_buffers(prefix="backbone")
        if buffer.is_floating_point() and id(buffer) not in kept
    }
