"""Incremental moment matching."""

from collections.abc import Collection, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from bpn_lightning.checks import check_choice, check_number
from bpn_lightning.costs import DeclaredBytes, HeldTensors, tensor_bytes
from bpn_lightning.errors import ConfigurationError
from bpn_lightning.functional.importance import FisherLabels, fisher_diagonal
from bpn_lightning.functional.penalties import merged_quadratic
from bpn_lightning.host import ContinualHost
from bpn_lightning.nn.head import without_rows
from bpn_lightning.nn.layers import TaskModule
from bpn_lightning.random_state import seeded_generator
from bpn_lightning.strategies.base import ContinualStrategy, refuse_fused
from bpn_lightning.tasks import ContinualStream, Task

__all__ = ["IncrementalMomentMatching", "drop_transfer"]

MODES = ("mean", "mode")
LABELS = ("empirical", "sampled", "exact", "predicted")


def drop_transfer(output: Tensor, before: Tensor, rate: float) -> Tensor:
    r"""Dropout of the difference to the previous task: :math:`y_{k-1} + \mathrm{dropout}(y - y_{k-1})`.

    Args:
        output: y, of a layer with its current weights.
        before: y_{k-1}, of the same layer with the weights at the previous task's end, for the same input.
        rate: the fraction of the differences that is dropped; the rest are scaled by 1 / (1 - rate).

    Returns:
        The same shape; in expectation equal to the output.
    """
    return before + F.dropout(output - before, rate)


class IncrementalMomentMatching(ContinualStrategy):
    r"""IMM: train on the tasks in sequence, and predict with an average of the resulting networks.

    .. math:: \theta_{\mathrm{mean}} = \sum_k \alpha_k \theta_k, \quad
              \theta_{\mathrm{mode}} = \sum_k \alpha_k F_k \theta_k \Big/ \sum_k \alpha_k F_k

    Mean-IMM and mode-IMM of Lee et al. (2017), https://arxiv.org/abs/1703.08475, with their three
    transfers, which keep the networks close enough for their average to work: a task starts with the
    weights of the previous one (weight transfer, always), with a penalty
    :math:`\lambda \|\theta - \theta_{k-1}\|^2` towards them (L2-transfer), and with dropout of the
    difference to them (drop-transfer). F is the diagonal Fisher information of the finished task.

    The average is used for evaluation after a task, in checkpoints and by ``trainer.test``; the next
    task continues from the training weights. Accuracies within a task (``evaluate_every="epoch"``) and
    the validation loss are those of the training weights. With ``mask="task"`` the head is not
    averaged, because each task has its own rows. Running statistics of batch normalization are averaged
    with the alphas, in both modes.

    Differs from the paper: the averages are running ones, so memory does not grow with tasks; F is
    from per-sample gradients of all the task's samples, not of a batch's mean, by default with their
    true labels (the authors' code samples labels: ``sampled``); drop-transfer acts on hidden linear
    layers.

    Args:
        mode: ``mean`` or ``mode``.
        strength: lambda of the L2-transfer, dimensionless, on all shared parameters; 0 disables it.
        drop: rate of the drop-transfer, the fraction of the differences that is dropped, in [0, 1).
        weights: alpha of each task up to a common factor, positive; equal by default.
        fisher: the labels used in the Fisher of ``mode``, as in EWC.

    State:
        mean: one tensor per shared parameter and float buffer, 4 bytes per number; with ``mode`` the
        sums of the Fishers, 4 P more; with L2- or drop-transfer the weights at the previous task's
        end, 4 P more. Between tasks the module keeps the training weights, 4 P. Inference needs only
        the network.

    Raises:
        ConfigurationError: a value is out of range or unknown, there is not one weight per task, or
            there is no hidden linear layer for drop-transfer.
    """

    regularizer: ClassVar[bool] = True
    needs_full_precision: ClassVar[bool] = True
    needs_trainable_core: ClassVar[bool] = True
    weights_in_state: ClassVar[Collection[str]] = ("mean", "previous")

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
        check_choice("mode", mode, MODES)
        check_choice("fisher", fisher, LABELS)
        check_number("strength", strength, "It is the lambda of the L2-transfer; 0 disables it.")
        if not 0 <= drop < 1:
            raise ConfigurationError(
                f"Expected drop to be at least 0 and below 1, but got {drop}. "
                "It is the rate of the drop-transfer; 0 disables it."
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
        """Start with empty averages, and remove the hooks."""
        self.mean: dict[str, Tensor] = {}
        self.mass: dict[str, Tensor] = {}  # of tensors with one weight per element
        self.masses: dict[str, float] = {}  # of tensors with a single weight
        self.previous: dict[str, Tensor] = {}
        self._remove_hooks()
        self._comparing = False  # while a hook calls its own layer

    def configure(self, host: ContinualHost, stream: ContinualStream) -> None:
        """Check the weights, and hook the hidden linear layers for drop-transfer."""
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
                "Expected the backbone to have linear layers when drop is set, but it has none. "
                "Set drop to 0."
            )
        # Prepended, so that hooks of other strategies see the output that the next layer gets.
        self._handles = [
            layer.register_forward_hook(partial(self._drop, name), prepend=True)
            for name, layer in hidden.items()
        ]

    def check(self, host: ContinualHost, optimizer: Optimizer) -> None:
        """Refuse fused optimizers with a gradient scaler, if there is an L2-transfer."""
        if self.strength > 0:
            refuse_fused(type(self).__name__, host, optimizer)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Remove the hooks."""
        self._remove_hooks()

    def _remove_hooks(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = ()

    def _drop(
        self, name: str, layer: nn.Module, args: tuple[Tensor, ...], output: Tensor
    ) -> Tensor | None:
        """Apply drop-transfer to one layer, from the second task on."""
        if self._comparing or not layer.training:
            return None
        weights = {
            key: self.previous[f"{name}.{key}"]
            for key, _ in layer.named_parameters()  # a parametrized weight is in a submodule
            if f"{name}.{key}" in self.previous
        }
        if not weights:
            return None
        self._comparing = True
        try:  # the layer itself, with its current bias units and keys
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
        """Add the task's weights to the averages."""
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

    def forget(self, host: ContinualHost, task: Task) -> Sequence[str]:
        """Overwrite its rows of the head; the rest is averaged over tasks."""
        rows = host.network.structure.freed_columns(task.id)
        self.mean, self.mass = without_rows(self.mean, rows), without_rows(self.mass, rows)
        self.previous = without_rows(self.previous, rows)
        return ["the average of all tasks' weights, and the weights before the last task"]

    def merged_weights(self, host: ContinualHost) -> Mapping[str, Tensor]:
        """The averages."""
        return self.mean

    def held_tensors(self, host: ContinualHost) -> HeldTensors:
        """The averages, the previous weights, and the training weights that the module keeps."""
        return HeldTensors([*super().held_tensors(host).training, *host.training_weights.values()])

    def declared_bytes(self, host: ContinualHost) -> DeclaredBytes:
        """Training: 4 bytes per number, twice for the averages, and as in ``State``."""
        shared = host.network.shared_parameters(include_head=host.network.mask != "task").values()
        parameters, buffers = tensor_bytes(shared), tensor_bytes(_float_buffers(host).values())
        sums = parameters * ((self.mode == "mode") + bool(self.strength or self.drop))
        return DeclaredBytes(2 * (parameters + buffers) + sums)

    def logs(self, host: ContinualHost) -> dict[str, Tensor]:
        """The value of the L2-transfer penalty, including the strength."""
        if self.strength == 0 or not self.previous:
            return {}
        parameters = host.network.shared_parameters(include_head=True)
        gaps = [
            (parameters[name].detach() - value).square().sum()
            for name, value in self.previous.items()
            if name in parameters
        ]
        return {"penalty/imm": self.strength * torch.stack(gaps).sum()} if gaps else {}

    def training_state(self) -> str:
        """What the merged network is computed from."""
        return "averages of weights"

    def state_dict(self) -> dict[str, Any]:
        """The averages with their masses, and the previous weights."""
        return {
            "mean": self.mean,
            "mass": self.mass,
            "masses": self.masses,
            "previous": self.previous,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the averages and the previous weights."""
        for name, value in state_dict.items():
            setattr(self, name, dict(value))

    def move_state(self, host: ContinualHost) -> None:
        """Move the averages and the previous weights to the host's device."""
        for name in ("mean", "mass", "previous"):
            moved = {key: value.to(host.device) for key, value in getattr(self, name).items()}
            setattr(self, name, moved)


def _float_buffers(host: ContinualHost) -> dict[str, Tensor]:
    """The backbone's own float buffers, such as running statistics, without those of strategies."""
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
