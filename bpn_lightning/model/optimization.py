"""The optimizer of a task or phase, and its scheduler."""

from collections.abc import Iterable, Mapping
from math import ceil
from operator import mul
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from bpn_lightning.checks import check_choice, check_number
from bpn_lightning.errors import ConfigurationError
from bpn_lightning.model.host import Host
from bpn_lightning.nn.layers import BiasUnits
from bpn_lightning.tasks import Phase
from bpn_lightning.trainer.schedulers import (
    MONITORS,
    build_scheduler,
    plateau_monitor,
    scheduler_config,
)

if TYPE_CHECKING:
    from bpn_lightning.datamodules.base import ContinualDataModule
    from bpn_lightning.datamodules.loading import TrainLoader

__all__ = ["GROUPS", "Optimization", "sgd"]

GROUPS = ("core", "modes", "head")
"""Which parameters may have a learning rate of their own, in the order of the optimizer's groups."""


def sgd(params: Iterable[nn.Parameter]) -> Optimizer:
    """The paper's optimizer: plain SGD, learning rate 0.01."""
    return torch.optim.SGD(params, lr=0.01)


class Optimization:
    """Makes optimizers and schedulers, and steps the schedulers that wait for a loss.

    Args:
        host: of the network whose parameters are trained.
        optimizer: called with the parameters.
        scheduler: called with the optimizer; see :func:`~bpn_lightning.trainer.schedulers.build_scheduler`.
        interval: whether the scheduler steps after every update or every epoch.
        monitor: the loss that a ``ReduceLROnPlateau`` takes after every epoch.
        group_lr: learning rates by the names of :data:`GROUPS`.

    Attributes:
        plateau: the loss that decides over the learning rate, if one does.

    State: the training loss of the epoch so far, two numbers.

    Raises:
        ConfigurationError: a choice is unknown.
    """

    def __init__(
        self,
        host: Host,
        optimizer: OptimizerCallable,
        scheduler: LRSchedulerCallable | None,
        interval: Literal["step", "epoch"],
        monitor: Literal["val/loss", "train/loss"] | None,
        group_lr: Mapping[str, float] | None = None,
    ) -> None:
        if interval not in ("step", "epoch"):
            raise ConfigurationError(
                f"Expected scheduler_interval to be 'step' or 'epoch', but got {interval!r}."
            )
        if monitor not in (None, *MONITORS):
            raise ConfigurationError(
                f"Expected scheduler_monitor to be one of {', '.join(MONITORS)}, but got "
                f"{monitor!r}. null takes the validation loss where a part is held out."
            )
        for name, rate in (group_lr or {}).items():
            check_choice("a name in group_lr", name, GROUPS)
            check_number(
                f"group_lr[{name!r}]", rate, "It is the learning rate of these parameters."
            )
        self.host = host
        self.optimizer = optimizer
        self.group_lr = dict(group_lr or {})
        self.scheduler = scheduler
        self.interval = interval
        self.monitor = monitor
        self.plateau: str | None = None
        self._epoch_loss = torch.zeros(2, dtype=torch.float64)  # its sum, and of how many samples

    def configure(self) -> OptimizerLRScheduler:
        """A fresh optimizer and its scheduler; in a phase that trains a strategy, that strategy's own."""
        host = self.host
        self.plateau = None
        if host.phase.trains == "strategy":
            return host.phase_owner.phase_optimizer(host, host.phase)
        optimizer = self.network_optimizer()
        if self.scheduler is None:
            return optimizer
        made = build_scheduler(self.scheduler, optimizer, *self._scheduler_lengths())
        if isinstance(made, ReduceLROnPlateau):
            stream = host.stream
            self.plateau = plateau_monitor(
                made, self.monitor, stream.has_validation, stream.reset_optimizer
            )
        return {
            "optimizer": optimizer,
            "lr_scheduler": scheduler_config(made, self.interval, self.plateau),
        }

    def network_optimizer(self) -> Optimizer:
        """A fresh one, over everything trainable but M, whatever the phase.

        Raises:
            ConfigurationError: the optimizer does not take its arguments, or a learning rate is for modes
                that the network has not.
        """
        parameters = self._with_rates() if self.group_lr else self.parameters()
        try:
            return self.optimizer(parameters)
        except (TypeError, ValueError) as error:
            raise ConfigurationError(
                f"Expected optimizer to take the parameters and its arguments, but it raised "
                f"{type(error).__name__}: {error}. Correct that argument."
            ) from error

    def parameters(self) -> list[nn.Parameter]:
        """What the network's optimizer is over, in its order."""
        if self.group_lr:
            return [p for own in self._groups().values() for p in own]
        return [p for _, p in self._trained()]

    def _with_rates(self) -> Any:
        """The same in groups, with their learning rates."""
        groups = self._groups()
        if "modes" in self.group_lr and not groups["modes"]:
            raise ConfigurationError(
                "Expected group_lr to name parameters that there are, but got 'modes', and the network has no "
                "modes that the optimizer trains. Leave it out, or add a strategy such as bitfit or lora."
            )
        return [
            {"name": name, "params": own}
            | ({"lr": self.group_lr[name]} if name in self.group_lr else {})
            for name, own in groups.items()
            if own
        ]

    def _trained(self) -> list[tuple[str, nn.Parameter]]:
        network = self.host.network
        outside = {id(part.M) for part in network.modules() if isinstance(part, BiasUnits)}
        named = network.named_parameters()
        return [(name, p) for name, p in named if p.requires_grad and id(p) not in outside]

    def _groups(self) -> dict[str, list[nn.Parameter]]:
        """What the optimizer is over, by the names of :data:`GROUPS`."""
        modes = {id(p) for part in self.host.network.task_modules() for p in part.parameters()}
        found: dict[str, list[nn.Parameter]] = {name: [] for name in GROUPS}
        for name, parameter in self._trained():
            own = "modes" if id(parameter) in modes else "core"
            own = "head" if own == "core" and name.startswith("head.") else own
            found[own].append(parameter)
        return found

    def _scheduler_lengths(self) -> tuple[int, int]:
        """How often a scheduler steps until its optimizer is replaced: this one, and the longest."""
        cursor, by_epoch = self.host.cursor, self.interval == "epoch"

        def steps(task: int, phase: Phase) -> int:
            return phase.epochs * (1 if by_epoch else cursor.updates_per_epoch[task])

        lengths = [
            steps(task, phase)
            for task, phases in enumerate(cursor.schedule.phases)
            for phase in phases
            if phase.trains != "strategy"
        ]
        if self.host.stream.reset_optimizer == "never":
            return sum(lengths), sum(lengths)
        return steps(cursor.task, cursor.phase), max(lengths)

    def count_updates(self) -> tuple[dict[int, int], int]:
        """Batches of an epoch of each task to be learned, and updates of all of them.

        A task of the past has no updates where the stream has not its data.
        """
        host = self.host
        first = cast("ContinualDataModule", host.stream).first_task
        tasks = range(len(host.network.tasks))
        batches = {task: self._loader(task)[1] for task in tasks[first:]}
        several = host.trainer.accumulate_grad_batches
        host.cursor.updates_per_epoch = [ceil(batches.get(task, 0) / several) for task in tasks]
        phases = host.cursor.schedule.phases
        epochs = (sum(phase.epochs for phase in of_task) for of_task in phases)
        return batches, sum(map(mul, host.cursor.updates_per_epoch, epochs))

    def smallest_batch(self, task: int) -> int:
        """Samples of a task's smallest batch, of all processes."""
        loader, batches = self._loader(task)
        return loader.smallest(batches)

    def _loader(self, task: int) -> "tuple[TrainLoader, int]":
        """A task's loader, and how many of its batches an epoch trains on."""
        host = self.host
        stream = cast("ContinualDataModule", host.stream)
        limit = host.trainer.limit_train_batches
        loader = stream.train_loader(task, 0, host.training_tasks(task))
        batches = len(loader)
        return loader, min(limit, batches) if isinstance(limit, int) else int(batches * limit)

    def clip_norm(self, optimizer: Optimizer, max_norm: float) -> None:
        """Torch's ``clip_grad_norm_``, on what belongs to open columns of the head: the rest is 0.

        With the rest, the last bits of the norm would depend on how many tasks there will be.
        """
        network = self.host.network
        names = {id(parameter): name for name, parameter in network.named_parameters()}
        opened, copies = [], []
        for parameter in (p for group in optimizer.param_groups for p in group["params"]):
            part = parameter
            if parameter.grad is not None and id(parameter) in names:
                gradient = network.open_part(names[id(parameter)], parameter.grad)
                if gradient is not parameter.grad:
                    part = torch.empty_like(gradient)
                    part.grad = gradient
                    copies.append((parameter.grad, gradient))
            opened.append(part)
        nn.utils.clip_grad_norm_(opened, max_norm)
        for whole, gradient in copies:  # of columns of a matrix; rows are views
            whole[tuple(map(slice, gradient.shape))] = gradient

    # --- a scheduler that waits for a loss -------------------------------------------------------

    def add_loss(self, loss: Tensor, scale: float) -> None:
        """Count a batch, if the training loss is what the scheduler waits for.

        Args:
            loss: the sum over this process's samples, times ``scale``.
            scale: what makes the mean over processes the mean over samples.
        """
        if self.plateau == "train/loss":
            sums = torch.stack([loss.detach(), torch.ones_like(loss)]) / scale
            self._epoch_loss = self._epoch_loss.to(sums.device) + sums

    def end_epoch(self, val_loss: float) -> None:
        """Step such a scheduler.

        Args:
            val_loss: of the open task; used only where it is what the scheduler waits for.
        """
        if self.plateau is None:
            return
        config = self.host.trainer.lr_scheduler_configs[0]
        scheduler = cast(ReduceLROnPlateau, config.scheduler)
        scheduler.step(val_loss if self.plateau == "val/loss" else self._take_epoch_loss())

    def _take_epoch_loss(self) -> float:
        """Mean training loss since it was last taken, over all processes."""
        total, samples = self._reduced_loss().unbind()
        self._epoch_loss = torch.zeros_like(self._epoch_loss)
        return float(total / samples)

    def _reduced_loss(self) -> Tensor:
        return self.host.all_reduce(self._epoch_loss.to(self.host.device))

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps, of all processes: each of them calls this."""
        total, samples = self._reduced_loss().tolist()
        return {"loss_sum": total, "samples": samples}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over :meth:`state_dict`: the first process continues with what all had."""
        sums = [state["loss_sum"], state["samples"]] if self.host.global_rank == 0 else [0.0, 0.0]
        self._epoch_loss = torch.tensor(sums, dtype=torch.float64)
