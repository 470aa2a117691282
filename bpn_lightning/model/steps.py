"""One update of a network: the loss, the strategies' hooks in their order, and the optimizer."""

from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from itertools import accumulate
from math import ceil
from operator import mul
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
import torch.nn.functional as F
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.utils.hooks import RemovableHandle

from bpn_lightning.errors import ConfigurationError
from bpn_lightning.losses import LossFunction, SampleLoss
from bpn_lightning.metrics.settling import Settling
from bpn_lightning.model.network import ContinualNetwork
from bpn_lightning.nn.execution import differentiable
from bpn_lightning.nn.layers import BiasUnits, evaluation_mode
from bpn_lightning.strategies.base import ContinualStrategy
from bpn_lightning.tasks import Batch, Mask, Phase, Schedule
from bpn_lightning.trainer.optimizers import check_repeated_evaluation
from bpn_lightning.trainer.schedulers import (
    MONITORS,
    build_scheduler,
    plateau_monitor,
    scheduler_config,
)

if TYPE_CHECKING:
    from bpn_lightning.datamodules.base import ContinualDataModule
    from bpn_lightning.datamodules.loading import TrainLoader

__all__ = ["ContinualSteps", "sgd"]

GRADIENT_EDITS = ("penalty_grad", "project_grad")
GRADIENT_HOOKS = ("capture_grad", *GRADIENT_EDITS, "consume_grad")
STEP_HOOKS = ("loss_terms", *GRADIENT_HOOKS, "correct_step", "observe_step", "logs")


def sgd(params: Iterable[nn.Parameter]) -> Optimizer:
    """The paper's optimizer: plain SGD, learning rate 0.01."""
    return torch.optim.SGD(params, lr=0.01)


class ContinualSteps(ContinualNetwork):
    """A step in phases; :class:`~bpn_lightning.model.module.ContinualModule` decides which task it is for.

    Args:
        backbone: maps ``(batch, *input_shape)`` to features ``(batch, features)``.
        mask: the columns of the head that take part.
        optimizer: called with the parameters.
        scheduler: called with the optimizer; see :func:`~bpn_lightning.trainer.schedulers.build_scheduler`.
        scheduler_interval: whether the scheduler steps after every update or every epoch.
        scheduler_monitor: the loss that a ``ReduceLROnPlateau`` takes after every epoch.
        loss: of each sample; see :class:`~bpn_lightning.losses.SampleLoss`.

    Raises:
        ConfigurationError: a choice is unknown, or the loss is none.
    """

    def __init__(
        self,
        backbone: nn.Module,
        mask: Mask = "all",
        *,
        optimizer: OptimizerCallable = sgd,
        scheduler: LRSchedulerCallable | None = None,
        scheduler_interval: Literal["step", "epoch"] = "step",
        scheduler_monitor: Literal["val/loss", "train/loss"] | None = None,
        loss: LossFunction | None = None,
    ) -> None:
        super().__init__(backbone, mask)
        if scheduler_interval not in ("step", "epoch"):
            raise ConfigurationError(
                "Expected scheduler_interval to be 'step' or 'epoch', but got "
                f"{scheduler_interval!r}."
            )
        self.optimizer = optimizer
        self.scheduler = scheduler
        if scheduler_monitor not in (None, *MONITORS):
            raise ConfigurationError(
                f"Expected scheduler_monitor to be one of {', '.join(MONITORS)}, but got "
                f"{scheduler_monitor!r}. null takes the validation loss where a part is held out."
            )
        self.scheduler_interval = scheduler_interval
        self.scheduler_monitor = scheduler_monitor
        self._loss = SampleLoss(loss)
        self._settling = Settling()
        self._strategies: list[ContinualStrategy] = []
        self.schedule = Schedule([[Phase("train", 1)]])
        self._phase = self.schedule.phases[0][0]
        self._phase_owners: dict[tuple[int, str], ContinualStrategy] = {}

        # What a step needs, gathered when a task opens: nothing is looked up twice.
        self._hooks: dict[str, list[Callable[..., Any]]] = {name: [] for name in STEP_HOOKS}
        self._hooked: Optimizer | None = None
        self._hook_handles: list[RemovableHandle] = []
        self._steps_under_way = 0  # a step may call the one of the class it is derived from
        self._groups: dict[int, dict[str, Any]] = {}
        self._step_parameters: dict[str, nn.Parameter] = {}
        self._updates_per_epoch: list[int] = []  # of each task
        self._plateau: str | None = (
            None  # the loss that decides over the learning rate, if one does
        )
        self._epoch_loss = torch.zeros(2, dtype=torch.float64)  # its sum, and of how many samples
        self._dropped: list[nn.Parameter] = []
        self._outside: list[nn.Parameter] = []
        self._evaluated = False  # whether this update's gradients were asked for before
        self._columns = (0, 0)
        self._in_step_forward = False
        self._world_size = 1
        self._other_rows: list[tuple[nn.Parameter, Tensor, Tensor]] = []

    @property
    def strategies(self) -> Sequence[ContinualStrategy]:
        """The continual strategies of the trainer, in the order of its callbacks."""
        return self._strategies

    @property
    def phase(self) -> Phase:
        """The phase that runs."""
        return self._phase

    def training_tasks(self, task_id: int) -> list[int]:
        """The tasks whose data a task is trained on: its own, and what a strategy adds."""
        wanted = (strategy.training_tasks(self._tasks[task_id]) for strategy in self._strategies)
        return sorted({task_id}.union(*wanted))

    def _find_hooks(self) -> None:
        """The hooks that strategies override: the others cost nothing."""

        def overriding(name: str) -> list[Callable[..., Any]]:
            base = getattr(ContinualStrategy, name)
            return [
                getattr(s, name) for s in self._strategies if getattr(type(s), name) is not base
            ]

        self._hooks = {name: overriding(name) for name in STEP_HOOKS}

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """The sum over all processes."""
        if self._trainer is None or self.trainer.world_size == 1:
            return tensor
        own = tensor.clone(memory_format=torch.contiguous_format)  # nccl takes no other
        return cast(Tensor, self.trainer.strategy.reduce(own, reduce_op="sum"))

    def losses(self, logits: Tensor, targets: Tensor, task: "int | Tensor") -> Tensor:
        """Each sample's loss on the columns of its task.

        Args:
            logits: ``(batch, num_classes)``; where samples have several tasks, with -inf outside of each
                one's columns.
            targets: ``(batch,)`` int64, columns of the head.
            task: of all samples, or ``(batch,)``, one of each.

        Returns:
            ``(batch,)``.
        """
        if isinstance(task, int):
            first, stop = self.columns(task)
            return self._loss(logits[:, first:stop], targets - first, first)
        if self._loss.loss is None or self._mask not in ("seen", "task"):
            return self._loss(logits, targets)
        losses = torch.zeros_like(targets, dtype=logits.dtype)
        ids = sorted(set(task.tolist()))
        for first, stop in sorted({self.columns(one) for one in ids}):
            same = [one for one in ids if self.columns(one) == (first, stop)]
            own = torch.isin(task.to(targets.device), torch.tensor(same, device=targets.device))
            of_own = self._loss(logits[own, first:stop], targets[own] - first, first)
            losses = losses.to(of_own.dtype).masked_scatter(own, of_own)
        return losses

    def _column_sets(self) -> set[tuple[int, int]]:
        """Every set of columns that a loss will be of."""
        if self._mask != "seen":
            return {self.columns(task.id) for task in self._tasks}
        stops = accumulate((task.columns[1] for task in self._tasks), max)
        return {(0, stop) for stop in stops}

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """A fresh optimizer, over everything trainable but M, and its scheduler.

        In a phase that trains a strategy, that strategy's own.
        """
        self._plateau = None
        if self._phase.trains == "strategy":
            return self._phase_owner.phase_optimizer(self, self._phase)
        optimizer = self._network_optimizer()
        if self.scheduler is None:
            return optimizer
        made = build_scheduler(self.scheduler, optimizer, *self._scheduler_lengths())
        if isinstance(made, ReduceLROnPlateau):
            self._plateau = plateau_monitor(
                made,
                self.scheduler_monitor,
                self.stream.has_validation,
                self.stream.reset_optimizer,
            )
        return {
            "optimizer": optimizer,
            "lr_scheduler": scheduler_config(made, self.scheduler_interval, self._plateau),
        }

    def _network_optimizer(self) -> Optimizer:
        """A fresh one, whatever the phase."""
        outside = {id(part.M) for part in self.modules() if isinstance(part, BiasUnits)}
        parameters = [p for p in self.parameters() if p.requires_grad and id(p) not in outside]
        try:
            return self.optimizer(parameters)
        except (TypeError, ValueError) as error:
            raise ConfigurationError(
                f"Expected optimizer to take the parameters and its arguments, but it raised "
                f"{type(error).__name__}: {error}. Correct that argument."
            ) from error

    def _scheduler_lengths(self) -> tuple[int, int]:
        """How often a scheduler steps until its optimizer is replaced: this one, and the longest."""
        by_epoch = self.scheduler_interval == "epoch"

        def steps(task: int, phase: Phase) -> int:
            return phase.epochs * (1 if by_epoch else self._updates_per_epoch[task])

        lengths = [
            steps(task, phase)
            for task, phases in enumerate(self.schedule.phases)
            for phase in phases
            if phase.trains != "strategy"
        ]
        if self.stream.reset_optimizer == "never":
            return sum(lengths), sum(lengths)
        return steps(max(self.opened, 0), self._phase), max(lengths)

    def _count_updates(self) -> tuple[list[int], int]:
        """Batches of an epoch of each task, and updates of the whole stream."""
        batches = [self._batches_of(task)[1] for task in range(len(self._tasks))]
        several = self.trainer.accumulate_grad_batches
        self._updates_per_epoch = [ceil(number / several) for number in batches]
        epochs = (sum(phase.epochs for phase in phases) for phases in self.schedule.phases)
        return batches, sum(map(mul, self._updates_per_epoch, epochs))

    def _batches_of(self, task: int) -> "tuple[TrainLoader, int]":
        """A task's loader, and how many of its batches an epoch trains on."""
        stream, limit = cast("ContinualDataModule", self.stream), self.trainer.limit_train_batches
        loader = stream.train_loader(task, 0, self.training_tasks(task))
        batches = len(loader)
        return loader, min(limit, batches) if isinstance(limit, int) else int(batches * limit)

    def _smallest_batch(self, task: int) -> int:
        """Samples of a task's smallest batch, of all processes."""
        loader, batches = self._batches_of(task)
        return loader.smallest(batches)

    def _follow_optimizer(self) -> None:
        """Put the step's hooks on the current optimizer, whichever way it came to be current."""
        optimizer = self.trainer.optimizers[0]
        if self._hooked is optimizer:
            return
        for handle in self._hook_handles:
            handle.remove()
        self._steps_under_way = 0
        self._hook_handles = [
            optimizer.register_step_pre_hook(self._on_optimizer_stepping),
            optimizer.register_step_post_hook(self._on_optimizer_stepped),
        ]
        self._hooked = optimizer
        self._groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
        self._outside = [p for p in self.parameters() if id(p) not in self._groups]
        self._columns = self.columns(self.opened)
        self._world_size = self.trainer.world_size
        head = {id(parameter) for parameter in self._head.parameters(recurse=False)}
        self._step_parameters = self.shared_parameters(include_head=True)
        self._dropped = []
        if self._phase.trains == "head":
            self._dropped = [p for p in self.parameters() if id(p) not in head]
            self._step_parameters = {
                name: p for name, p in self._step_parameters.items() if id(p) in head
            }
        self._other_rows = []
        if self._mask == "task" or self._phase.trains == "head":
            learning = [
                range(*self._tasks[task].columns) for task in self.training_tasks(self.opened)
            ]
            inside = {row for rows in learning for row in rows}
            outside = [row for row in range(self._head.out_features) if row not in inside]
            rows = torch.tensor(outside, device=self.device, dtype=torch.long)
            for parameter in self._head.parameters(recurse=False):
                self._other_rows.append((parameter, rows, parameter.detach()[rows].clone()))

    def _clear_optimizer_state(self) -> None:
        """Where the optimizer goes on: forget what it knows of bias units and of a multi-head.

        The head's counts of steps are not by row; the other rows do not move whatever it knows.
        """
        fresh = [p for part in self._task_modules() for p in part.parameters()]
        if self._mask == "task":
            fresh += self._head.parameters(recurse=False)
        for parameter in fresh:
            self.trainer.optimizers[0].state.pop(parameter, None)

    def learning_rate(self, parameter: nn.Parameter) -> float:
        """The current optimizer's learning rate of a parameter."""
        return float(self._groups[id(parameter)]["lr"])

    @property
    def loss_scale(self) -> float:
        """The scaler's factor, which parameters outside the optimizer keep in their gradients."""
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        return 1.0 if scaler is None else float(scaler.get_scale())

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The loss on the active columns, and the strategies' terms.

        The slice's sum is divided by the size of the batch over all processes, so that any number of
        processes follows the same gradient, on uneven slices too.
        """
        scale = self._world_size / batch.global_size
        share = self._share_of_update(batch, batch_idx)
        if self._phase.trains == "strategy":
            return self._strategy_step(batch, scale) * share
        # In a batch of several tasks each sample has its own mode, and -inf outside its columns.
        several = isinstance(batch.task, Tensor)
        first, stop = (0, self._head.out_features) if several else self._columns
        logits = self._training_logits(batch.inputs, batch.task if several else None)
        active, targets = logits, batch.targets
        if (first, stop) != (0, logits.shape[1]):
            active, targets = logits[:, first:stop], targets - first
        if self._loss.loss is None:
            loss = F.cross_entropy(active, targets, reduction="sum") * scale
        else:
            task = batch.task if several else self.opened
            loss = self.losses(logits, batch.targets, task).sum() * scale
        right = None
        if self._settling.counting and not self._evaluated:
            right = (active.detach().argmax(1) == targets).sum()
            self._settling.add(right, batch.global_size)
        terms = {"loss/task": loss}
        for hook in self._hooks["loss_terms"]:
            for name, term in hook(self, batch, logits).items():
                terms[f"loss/{name}"] = term.sum() * scale
        loss = torch.stack(list(terms.values())).sum() if len(terms) > 1 else loss
        if self._plateau == "train/loss" and not self._evaluated:
            sums = torch.stack([loss.detach(), torch.ones_like(loss)]) / scale
            self._epoch_loss = self._epoch_loss.to(sums.device) + sums
        every = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        if every and (self.trainer.global_step + 1) % every == 0:
            if right is None:
                right = (active.detach().argmax(1) == targets).sum()
            for hook in self._hooks["logs"]:
                terms.update(hook(self))
            # Means over processes, each of which has the whole batch's size in its scale.
            self.log_dict({name: term.detach() for name, term in terms.items()}, sync_dist=True)
            whole = {
                "train/loss": loss.detach(),
                "train/accuracy": right * self._world_size / batch.global_size,
            }
            self.log_dict(whole, prog_bar=True, sync_dist=True)
            self.log("stream/task", float(self.opened + 1))
        return loss if share == 1 else loss * share

    def _take_epoch_loss(self) -> float:
        """Mean training loss since it was last taken, over all processes."""
        total, samples = self.all_reduce(self._epoch_loss.to(self.device))
        self._epoch_loss = torch.zeros_like(self._epoch_loss)
        return float(total / samples)

    def _share_of_update(self, batch: Batch, batch_idx: int) -> float:
        """What makes an update the mean over all its samples where gradients accumulate; else 1.

        Lightning divides the loss by ``accumulate_grad_batches``, also in an epoch's last update, which
        may have fewer batches and whose last batch may have fewer samples.
        """
        several: int = self.trainer.accumulate_grad_batches
        if several == 1:
            return 1.0
        first = batch_idx // several * several
        stop = min(first + several, self.trainer.num_training_batches)
        loader = cast("TrainLoader", self.trainer.train_dataloader)
        return several * batch.global_size / loader.count(first, int(stop))

    def _training_logits(self, inputs: Tensor, tasks: "int | Tensor | None") -> Tensor:
        """Of all columns; on features that stay as they are where only the head trains."""
        fixed = self._phase.trains == "head"
        mode = evaluation_mode(self.backbone) if fixed else nullcontext()
        self._in_step_forward = True
        try:
            with mode, differentiable(self.backbone) if fixed else nullcontext():
                return self._logits(inputs) if tasks is None else self(inputs, task=tasks)
        finally:
            self._in_step_forward = False

    @property
    def in_step_forward(self) -> bool:
        """Whether the forward that runs is the training step's own, on its batch in its mode."""
        return self._in_step_forward

    @property
    def _phase_owner(self) -> ContinualStrategy:
        return self._phase_owners[max(self.opened, 0), self._phase.name]

    def _strategy_step(self, batch: Batch, scale: float) -> Tensor:
        """The loss of a phase in which only the strategy that declared it learns."""
        with evaluation_mode(self), differentiable(self):
            loss = self._phase_owner.phase_loss(self, self._phase, batch).sum() * scale
        every = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        if every and (self.trainer.global_step + 1) % every == 0:
            self.log(f"loss/{self._phase.name}", loss.detach(), prog_bar=True, sync_dist=True)
            self.log("stream/task", float(self.opened + 1))
        return loss

    def on_after_backward(self) -> None:
        """Reduce what DDP does not; before a scaler looks whether to skip the update on this process."""
        if self._phase.trains == "strategy":
            self._reduce_gradients(self.trainer.optimizers[0])

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """No gradients of the update that this batch ends were asked for yet."""
        self._evaluated = False

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Capture, penalize, project, consume: after unscaling and reducing, before clipping.

        An optimizer may ask for the gradients several times in one update, at other weights (LBFGS;
        sharpness-aware ones). It gets them penalized and projected each time; what is captured and
        consumed are the first ones, at the weights from which the update starts.

        Raises:
            ConfigurationError: it asks again for the gradient of one batch where gradients accumulate.
        """
        again, self._evaluated = self._evaluated, True
        if again:
            check_repeated_evaluation(self.trainer, optimizer)
        if self._phase.trains == "strategy":
            return
        for parameter in self._outside if again else ():
            parameter.grad = None  # nobody else does
        for parameter in self._dropped:
            parameter.grad = None
        for parameter, rows, _ in self._other_rows:  # do not move: not captured, not in the norm
            if parameter.grad is not None:
                parameter.grad[rows] = 0
        for phase in GRADIENT_EDITS if again else GRADIENT_HOOKS:
            for hook in self._hooks[phase]:
                hook(self, self._step_parameters)

    def _on_optimizer_stepping(self, optimizer: Optimizer, *_: Any) -> None:
        self._steps_under_way += 1

    def _on_optimizer_stepped(self, optimizer: Optimizer, *_: Any) -> None:
        """Called by the optimizer itself, so never for an update that a scaler skipped."""
        self._steps_under_way -= 1
        if self._phase.trains == "strategy" or self._steps_under_way:
            return
        for hook in self._hooks["correct_step"]:
            hook(self, self._step_parameters)
        for parameter, rows, values in self._other_rows:
            with torch.no_grad():
                parameter[rows] = values
        for hook in self._hooks["observe_step"]:
            hook(self, self._step_parameters)

    def _reduce_gradients(self, optimizer: Optimizer) -> None:
        """The mean over processes, which DDP takes of the module's own parameters only."""
        if self._world_size == 1:
            return
        for group in optimizer.param_groups:
            for p in group["params"]:
                gradient = torch.zeros_like(p) if p.grad is None else p.grad
                p.grad = self.all_reduce(gradient) / self._world_size
