"""The LightningModule of a stream: the cursor that opens and closes its tasks, and what it saves."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from math import isnan, nan
from pathlib import Path
from typing import Any, Literal, cast

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

from bpn_lightning.costs import bytes_held, bytes_per_task
from bpn_lightning.errors import BPNLightningError, CheckpointError, ConfigurationError
from bpn_lightning.files import why_unreadable
from bpn_lightning.losses import LossFunction
from bpn_lightning.metrics.accuracy_matrix import AccuracyMatrix
from bpn_lightning.metrics.settling import Unsettled
from bpn_lightning.metrics.task_metrics import Metrics, TaskMetrics, named_metrics
from bpn_lightning.model.evaluation import evaluate, evaluate_without_oracle, validation_scores
from bpn_lightning.model.prediction import check_predictable, predict, raw_inputs
from bpn_lightning.model.rebuilding import rebuild
from bpn_lightning.model.rules import check_overrides
from bpn_lightning.model.steps import ContinualSteps, sgd
from bpn_lightning.nn.execution import check_layers_are_called
from bpn_lightning.preparation import read_preparations
from bpn_lightning.random_state import random_state, restore_random_state
from bpn_lightning.run.checkpoints import read_checkpoint
from bpn_lightning.run.identity import differences, flatten
from bpn_lightning.strategies.base import ContinualStrategy
from bpn_lightning.tasks import (
    Batch,
    Mask,
    Phase,
    Position,
    Schedule,
    Split,
    Task,
    dry_inputs,
    named_dtype,
)
from bpn_lightning.trainer.callbacks import check_callbacks, check_rate_monitor
from bpn_lightning.trainer.composition import check_composition, check_phases, check_precision
from bpn_lightning.trainer.flags import check_lengths, check_trainer
from bpn_lightning.trainer.launch import check_batches
from bpn_lightning.trainer.lightning import (
    datamodule_of,
    is_attached,
    is_compiled,
    mark_epoch_unfinished,
    progress_in_update,
    reload_train_loader_every_epoch,
    set_max_epochs,
    start_next_epoch,
    stopped_mid_epoch,
)
from bpn_lightning.trainer.optimizers import check_optimizer
from bpn_lightning.trainer.processes import check_processes

__all__ = ["ContinualModule"]


class ContinualModule(ContinualSteps):
    """A network that learns a stream of tasks in one fit.

    A backbone maps inputs to features; one linear head over all classes of the stream stands on it.
    The methods are the trainer's :class:`~bpn_lightning.strategies.base.ContinualStrategy` callbacks.

    Args:
        backbone: maps ``(batch, *input_shape)`` to features ``(batch, features)``.
        optimizer: called with the parameters at the start of every task (LightningCLI's convention).
        scheduler: called with the optimizer at the same moments. Its ``num_steps``, ``total_steps``,
            ``T_max`` or ``total_iters``, if left without a value or -1, is the number of times that it
            will step.
        scheduler_interval: whether the scheduler steps after every update or every epoch.
        scheduler_monitor: the loss of the open task that a ``ReduceLROnPlateau``, which steps after every
            epoch, is given: ``val/loss`` or ``train/loss``; by default the former where a part is held
            out for validation, and the latter where none is.
        mask: the columns of the head that take part: ``all`` from the first task on (single head),
            ``seen`` (classes of the tasks opened so far), ``task`` (multi-head: the mode's own), or
            ``shared`` (every task has the same classes).
        loss: maps logits ``(batch, columns)`` and targets ``(batch,)``, both of the active columns only, to
            losses ``(batch,)``; a module of torch.nn, whose class weights are those of the stream's
            classes, or a function. None: cross-entropy.
        metrics: of torchmetrics, by name or in a list, taken of each task wherever its test accuracy is:
            they see probabilities ``(batch, num_classes)`` and targets ``(batch,)``.
        evaluate_every: test accuracies are taken after every ``task``, or also after every ``epoch``.
        evaluate_on: the tasks that are tested after every task: ``all`` of the stream, those
            ``seen_and_next``, which halves the work on long streams, or the ``current`` one alone, for
            streams of thousands; before training and at the stream's end it is all. With
            ``seen_and_next`` only forgetting, which takes each task's best accuracy of all that are
            known, sees less; with ``current`` there is no forgetting and no forward transfer.
        patience: epochs without a lower validation loss after which a phase of a task ends; None
            trains each to its full length.
        without_oracle: whether every task is also scored, at the stream's end, without the task id,
            which takes a forward for every mode; a number: on so many test samples of each task,
            drawn alike for every method.
        check_processes: whether processes compare, after every task, all that they must hold alike, and
            stop where they differ; for whoever writes a strategy.

    Attributes:
        accuracy_matrix: accuracies of every task before training and after each task.
        opened: the task that was opened last, -1 before the first.
        closed: the last task that is learned, consolidated and evaluated, -1 before the first.

    Raises:
        ConfigurationError: a choice is unknown, or patience is below 1.
    """

    accuracy_matrix: AccuracyMatrix

    def __init__(
        self,
        backbone: nn.Module,
        *,
        optimizer: OptimizerCallable = sgd,
        scheduler: LRSchedulerCallable | None = None,
        scheduler_interval: Literal["step", "epoch"] = "step",
        scheduler_monitor: Literal["val/loss", "train/loss"] | None = None,
        mask: Mask = "all",
        loss: LossFunction | None = None,
        metrics: Metrics | None = None,
        evaluate_every: Literal["task", "epoch"] = "task",
        evaluate_on: Literal["all", "seen_and_next", "current"] = "all",
        patience: int | None = None,
        without_oracle: bool | int = True,
        check_processes: bool = False,
    ) -> None:
        super().__init__(
            backbone,
            mask,
            optimizer=optimizer,
            scheduler=scheduler,
            scheduler_interval=scheduler_interval,
            scheduler_monitor=scheduler_monitor,
            loss=loss,
        )
        if evaluate_every not in ("task", "epoch"):
            raise ConfigurationError(
                f"Expected evaluate_every to be 'task' or 'epoch', but got {evaluate_every!r}."
            )
        if evaluate_on not in ("all", "seen_and_next", "current"):
            raise ConfigurationError(
                "Expected evaluate_on to be 'all', 'seen_and_next' or 'current', but got "
                f"{evaluate_on!r}."
            )
        if patience is not None and patience < 1:
            raise ConfigurationError(
                f"Expected patience to be at least 1 epoch or null, but got {patience}. null trains "
                "every phase to its full length."
            )
        if without_oracle is not True and without_oracle is not False and without_oracle < 1:
            raise ConfigurationError(
                f"Expected without_oracle to be true, false or at least 1 sample of each task, but got "
                f"{without_oracle}. Use false for no score without the task id."
            )
        self.evaluate_every = evaluate_every
        self.evaluate_on = evaluate_on
        self.patience = patience
        self.without_oracle = without_oracle
        self.check_processes = check_processes
        self._metrics = named_metrics(metrics)

        self.closed = -1
        self._measured: list[dict[str, Any]] = []  # of metrics
        self._curve: list[dict[str, Any]] = []  # only what the matrix lacks
        self._done: list[str] = []  # what closing the open task has finished
        self._judged = 0  # epochs that early stopping has looked at
        self._entered = -1  # the epoch for which task, phase and optimizer are known to be right
        self._best_loss, self._bad_epochs = float("inf"), 0
        self._saved_random: dict[str, Any] | None = None  # from a checkpoint, until training starts

        self._counts = torch.zeros(3, 0)

    def _build(
        self, tasks: list[Task], num_classes: int, input_shape: tuple[int, ...], dtype: torch.dtype
    ) -> None:
        super()._build(tasks, num_classes, input_shape, dtype)
        if not hasattr(self, "accuracy_matrix"):
            self.accuracy_matrix = AccuracyMatrix(len(tasks))

    @property
    def curve(self) -> list[dict[str, Any]]:
        """Accuracies over the stream.

        Dictionaries with ``epoch`` (epochs done), ``task`` (the one being learned) and ``accuracy`` (one
        number per task, None where not measured).
        """
        if self.evaluate_every == "epoch" or self.opened < 0:
            return self._curve
        ends = [0, *(self.schedule.last_epoch(task) + 1 for task in range(self.closed + 1))]
        rows = self.accuracy_matrix.accuracy
        return [_point(rows[k], max(k - 1, 0), epoch) for k, epoch in enumerate(ends)]

    def evaluate(self, tasks: Sequence[int] | None = None, split: Split = "test") -> Tensor:
        """Accuracy on some tasks, each in its own mode; see :func:`bpn_lightning.model.evaluation.evaluate`."""
        return evaluate(self, tasks, split)

    def predict(self, images: Tensor, task: "int | Tensor | None" = None) -> Tensor:
        """Logits of raw inputs; see :func:`bpn_lightning.model.prediction.predict`."""
        return predict(self, images, task)

    @property
    def unsettled(self) -> Sequence[Unsettled]:
        """The tasks whose accuracy fell by more than 0.1 in the last epoch of their training.

        Of the training samples, as they were answered in the updates themselves; of the held-out part
        where there is one.
        """
        return self._settling.unsettled

    @property
    def task_metrics(self) -> list[dict[str, Any]]:
        """What ``metrics`` measured.

        Dictionaries with ``after`` (tasks learned by then), ``task`` (the one that was tested) and
        ``values`` (by name: a number, or for the newest moment also lists of numbers).
        """
        return self._measured

    # --- launch ----------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Build the structure, and check that the trainer, the stream and the strategies fit."""
        trainer = self.trainer
        if is_compiled(self):
            raise ConfigurationError(
                f"Expected trainer.{trainer.state.fn} to get the module itself, but got "
                "torch.compile(module), which is compiled again at every update. Compile its backbone: "
                "ContinualModule(torch.compile(backbone))."
            )
        stream: Any = datamodule_of(trainer)
        if stream is None or not hasattr(stream, "tasks"):
            if stage == "predict":
                return  # of raw inputs, whose preparation the module knows
            verb = getattr(stage, "value", stage)  # Lightning's own are of an enumeration
            raise ConfigurationError(
                f"Expected trainer.{verb} to get a ContinualDataModule, whose batches say their task, but "
                f"got {'dataloaders alone' if stream is None else type(stream).__name__}. Pass a "
                "stream of bpn_lightning.datamodules; module.predict(images, task) answers other images."
            )
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        self._strategies = [c for c in callbacks if isinstance(c, ContinualStrategy)]
        self._find_hooks()
        self.attach(stream)
        if stage == "fit" and self.opened < 0:  # else it goes on with what it has learned
            for strategy in self._strategies:
                strategy.reset()
        for strategy in self._strategies:
            strategy.configure(self, stream)
        self._switch(max(self.opened, 0))
        check_layers_are_called(self, dry_inputs(stream, 2, self.device))
        if stage == "fit":
            check_overrides(self, ContinualModule)
            self._loss.check(self._head.out_features, self._column_sets())
            self._check_metrics()
            check_composition(self, self._strategies)
            self._plan()
            if self.patience and not stream.has_validation:
                raise ConfigurationError(
                    f"Expected validation_fraction to be more than 0 where patience is set, but "
                    f"patience is {self.patience} and the stream has no validation split."
                )
            check_trainer(trainer, self.schedule.total)
            check_callbacks(trainer)
            check_precision(trainer, self._strategies)
            held_out = len(stream.val_dataloader()) if stream.has_validation else 0
            check_lengths(trainer, *self._count_updates(), held_out)
            inputs = dry_inputs(stream, 1, self.device)
            check_batches(trainer, self.backbone, inputs, len(self._tasks), self._smallest_batch)
            set_max_epochs(trainer, self.schedule.total)
            reload_train_loader_every_epoch(trainer)

    def _check_metrics(self) -> None:
        """Refuse metrics that would fail in the first evaluation."""
        if not self._metrics:
            return
        processes = self.trainer.world_size
        tasks = self._tasks if processes > 1 else []
        firsts = (next(iter(self.stream.loader(task.id, "test"))).global_size for task in tasks)
        TaskMetrics(self._metrics).check(self._head.out_features, firsts, processes)

    def _plan(self) -> None:
        """Lay out the schedule; a module that learned before keeps the one it has."""
        if self.opened >= 0:
            return
        phases = []
        for task in self._tasks:
            of_task = [Phase("train", task.epochs)]
            for strategy in self._strategies:
                before = of_task
                of_task = strategy.phases(task, of_task)
                for phase in of_task:
                    if phase not in before:
                        self._phase_owners[task.id, phase.name] = strategy
            phases.append(of_task)
        self.schedule = Schedule(phases)
        check_phases(self.schedule, self.stream, self.trainer)
        self._phase = phases[0][0]

    # --- the cursor of tasks ---------------------------------------------------------------------

    @property
    def position(self) -> Position:
        """Task, phase and epoch of the trainer's current epoch; outside a fit, the task opened last."""
        if self.trainer.state.fn != "fit":
            return Position(max(self.opened, 0), "train", 0)
        return self.schedule.locate(self.trainer.current_epoch)

    def advance(self) -> None:
        """Close every finished task, open the one that the current epoch belongs to.

        Idempotent, and called wherever training can begin or go on, since no single hook of Lightning
        fires after every way of resuming.
        """
        self._judge_epoch(self.trainer.current_epoch)
        task, phase, _ = self.position
        if self.closed < task - 1:
            self.close(task - 1)
        self._open(task)
        self._enter_phase(phase)
        self._follow_optimizer()
        self._entered = self.trainer.current_epoch
        counted = self._may_settle(self.trainer.current_epoch)
        self._settling.counting = counted and not self.stream.has_validation

    def _open(self, task_id: int) -> None:
        if task_id <= self.opened:
            return
        task = self._tasks[task_id]
        if task_id == 0:
            for strategy in self._strategies:
                strategy.on_stream_start(self, self.stream)
            untrained = self._test(range(len(self._tasks)), after=0)
            self.accuracy_matrix.update(0, untrained)
            self._add_to_curve(untrained, task_id, epoch=0)
            self._log_stream(self._stream_metrics())
        self._exchange_weights(self._training_weights)
        self._training_weights = {}
        self.opened = task_id
        self._phase = self.schedule.phases[task_id][0]
        self._done = []
        self._switch(task_id)
        for strategy in self._strategies:
            strategy.on_task_start(self, task)
        if self.stream.reset_optimizer == "always":
            self.trainer.strategy.setup_optimizers(self.trainer)
        else:
            self._clear_optimizer_state()
        self._hooked = None

    def _enter_phase(self, name: str) -> None:
        """Let the next phase of the open task begin, with an optimizer of its own."""
        if name == self._phase.name:
            return
        kinds = {self._phase.trains}
        self._phase = self.schedule.phase(self.opened, name)
        if self.stream.reset_optimizer == "always" or "strategy" in kinds | {self._phase.trains}:
            self.trainer.strategy.setup_optimizers(self.trainer)
        self._hooked = None

    def close(self, task_id: int) -> None:
        """Consolidate a task in every strategy and fill its row of the matrix, each exactly once.

        What is finished is noted as it happens, so a run that stops in between goes on from there.
        """
        if task_id <= self.closed:
            return
        self._check_finite(task_id)
        for strategy in self._strategies:
            if strategy.state_key not in self._done:
                strategy.on_task_end(self, self._tasks[task_id])
                self._done.append(strategy.state_key)
        self._switch(task_id)
        self._serve_merged_weights()
        last = task_id + 1 == len(self._tasks)
        row = self._test(self._tested_after(task_id), after=task_id + 1)
        if last and self.without_oracle and self._mask != "task":
            at_most = None if self.without_oracle is True else self.without_oracle
            alone = evaluate_without_oracle(self, range(len(self._tasks)), at_most=at_most)
            self.accuracy_matrix.update_without_oracle(alone)
        self.accuracy_matrix.update(task_id + 1, row)
        self._add_to_curve(row, task_id, self.schedule.last_epoch(task_id) + 1)
        self._settling.end_task(task_id, "val" if self.stream.has_validation else "train")
        self.closed = task_id
        if self.check_processes and self.trainer.world_size > 1:
            check_processes(self._held_alike(), f"after task {task_id}")
        self._log_stream(self._stream_metrics())

    def _held_alike(self) -> dict[str, Any]:
        """What must be the same in every process, by whose it is."""
        optimizer = self.trainer.optimizers[0]
        own = {type(strategy).__name__: strategy.state_dict() for strategy in self._strategies}
        return {
            "the network": self.state_dict(),
            type(optimizer).__name__: optimizer.state_dict(),
            "the weights of training": self._training_weights,
            **own,
        }

    def _serve_merged_weights(self) -> None:
        """Put a strategy's merged weights, if any has some, in the place of those of training."""
        if self._training_weights:
            return
        for strategy in self._strategies:
            merged = strategy.merged_weights(self)
            if merged is not None:
                parts = self.state_dict()
                self._training_weights = {name: parts[name].clone() for name in merged}
                self._exchange_weights(merged)

    def _exchange_weights(self, weights: Mapping[str, Tensor]) -> None:
        parts = self.state_dict() if weights else {}
        with torch.no_grad():
            for name, value in weights.items():
                parts[name].copy_(value)

    def _check_finite(self, task_id: int) -> None:
        for name, parameter in self.named_parameters():
            if not parameter.detach().isfinite().all():
                raise ConfigurationError(
                    f"Expected the weights to be finite after task {task_id}, but {name} is not: "
                    "training diverged. Lower the learning rate or the strategies' strength; EWC's "
                    "update 'proximal' is stable at any strength."
                )

    def _judge_epoch(self, epochs_done: int) -> None:
        """After an epoch of the open task: end its phase when patience runs out, add to the curve.

        Not in Lightning's validation loop, which a run resumed from an epoch's last batch skips.
        """
        if epochs_done <= self._judged or self.closed == self.opened:
            return
        done, name, _ = self.schedule.locate(epochs_done - 1)
        learns = self.schedule.phase(done, name).trains != "strategy"
        wanted = learns and (self.patience is not None or self._plateau == "val/loss")
        accuracy, loss = self._epoch_scores(epochs_done - 1, with_loss=wanted)
        if accuracy is not None:
            self._settling.end_epoch(accuracy)
        if learns and self._plateau is not None:
            scheduler = cast(ReduceLROnPlateau, self.trainer.lr_scheduler_configs[0].scheduler)
            scheduler.step(loss if self._plateau == "val/loss" else self._take_epoch_loss())
        if self.patience is not None and learns:
            improved = loss < self._best_loss
            self._bad_epochs = 0 if improved else self._bad_epochs + 1
            self._best_loss = min(loss, self._best_loss)
            if self._bad_epochs >= self.patience:
                self.schedule.end_phase(epochs_done - 1)
            if epochs_done == self.schedule.phase_epochs(epochs_done - 1).stop:
                self._best_loss, self._bad_epochs = float("inf"), 0
        if self.evaluate_every == "epoch" and epochs_done <= self.schedule.last_epoch(self.opened):
            row = self._test(range(self.opened + 1))
            self._add_to_curve(row, self.opened, epochs_done)
            self._log_stream(_per_task("accuracy", row[: self.opened + 1]))
        self._judged = epochs_done
        # The end of a stream that early stopping shortens, before Lightning asks whether to go on.
        set_max_epochs(self.trainer, self.schedule.total)

    def _may_settle(self, epoch: int) -> bool:
        """Whether it may be one of the last two in which its task trains the whole network.

        With patience any epoch of that phase may be.
        """
        task, name, _ = self.schedule.locate(epoch)
        phases = [phase.name for phase in self.schedule.phases[task] if phase.trains == "network"]
        late = epoch >= self.schedule.phase_epochs(epoch).stop - 2
        return phases[-1:] == [name] and (late or self.patience is not None)

    def _epoch_scores(self, epoch: int, with_loss: bool) -> tuple[float | None, float]:
        """Accuracy of an epoch that may be one of a task's last two, and the validation loss if asked for."""
        settles = self._may_settle(epoch)
        if not self.stream.has_validation:
            return self._settling.accuracy(self._right()), nan
        if not (settles or with_loss):
            return None, nan
        loss, accuracy = validation_scores(self, self.opened)
        return (accuracy if settles else None), loss

    def _right(self) -> int:
        """Answers of all processes that were right since counting, or this run, began."""
        if not self._settling.counting:
            return 0
        return int(self.all_reduce(self._settling.right.to(self.device)))

    def _tested_after(self, task_id: int) -> range:
        tasks = range(len(self._tasks))
        if self.evaluate_on == "all" or task_id == tasks[-1]:
            return tasks
        return tasks[: task_id + 2] if self.evaluate_on == "seen_and_next" else tasks[task_id:][:1]

    def _test(self, tasks: range, after: int | None = None) -> Tensor:
        """A row of the matrix: accuracies of these tasks, NaN for the others.

        Args:
            tasks: what is tested.
            after: how many tasks are learned, where the metrics are taken too.
        """
        row = torch.full((len(self._tasks),), float("nan"), dtype=torch.float64)
        taken = TaskMetrics(self._metrics) if self._metrics and after is not None else None
        observe = None if taken is None else taken.update
        row[tasks.start : tasks.stop] = evaluate(self, tasks, "test", observe)
        if taken is not None:
            self._measured = [
                {**one, "values": _numbers(one["values"])}
                for one in self._measured
                if one["after"] != after
            ]
            self._measured += [
                {"after": after, "task": task, "values": values}
                for task, values in taken.compute().items()
            ]
        return row

    def _add_to_curve(self, accuracy: Tensor, task: int, epoch: int) -> None:
        new = not self._curve or self._curve[-1]["epoch"] < epoch
        if self.evaluate_every == "epoch" and new:
            self._curve.append(_point(accuracy, task, epoch))

    def _log_stream(self, metrics: Mapping[str, float]) -> None:
        for logger in self.trainer.loggers:
            logger.log_metrics(dict(metrics), step=self.trainer.global_step)

    def _stream_metrics(self) -> dict[str, float]:
        """What is known between two tasks; figures that do not exist yet are left out.

        Before training that is the accuracy on every task, so that a file has all its columns at once: a
        new one with every task would rewrite it again and again.
        """
        learned, matrix = self.closed + 1, self.accuracy_matrix
        row = matrix.accuracy[learned]
        alone = self.evaluate_on == "current"
        metrics: dict[str, float] = {"stream/tasks_learned": learned}
        if not alone:
            metrics |= _per_task("accuracy", row[: learned or None])
        elif learned:
            metrics["accuracy/current"] = float(row[self.closed])
        if learned and (not alone or learned == len(self._tasks)):
            figures = {name: float(value) for name, value in matrix.compute().items()}
            names = ("average", "bwt", "fwt", "forgetting")
            metrics |= {f"accuracy/{name}": figures[name] for name in names}
            metrics["accuracy_after_learning/average"] = figures["after_learning"]
            metrics["accuracy_without_oracle/average"] = figures["without_oracle"]
        if learned and not alone:
            metrics |= _per_task("accuracy_without_oracle", matrix.without_oracle[:learned])
        if learned:
            held = bytes_held(self._strategies, self)._asdict()
            stored = bytes_per_task(self._strategies, self)
            metrics |= {f"bytes_held/{name}": value for name, value in held.items()}
            metrics |= {f"bytes_per_task/{name}": value for name, value in stored.items()}
        return {name: value for name, value in metrics.items() if not isnan(value)}

    # --- Lightning's hooks -----------------------------------------------------------------------

    def on_fit_start(self) -> None:
        """Let strategies refuse what cannot be right, and move their tensors to the device."""
        # A run that resumes in a strategy's own phase has that strategy's optimizer now.
        own = self._phase.trains == "strategy"
        optimizer = self._network_optimizer() if own else self.trainer.optimizers[0]
        check_optimizer(self.trainer, optimizer, self._strategies, self.stream)
        check_rate_monitor(self.trainer)
        for strategy in self._strategies:
            strategy.check(self, optimizer)
            strategy.move_state(self)

    def on_train_start(self) -> None:
        """Go on where the checkpoint was, or begin."""
        task = self.position.task
        if not self.opened <= task <= self.opened + 1:
            raise ConfigurationError(
                f"Expected a module that is about to learn task {task}, but it has opened task "
                f"{self.opened}. Make a new module, or go on with ckpt_path."
            )
        set_max_epochs(self.trainer, self.schedule.total)
        self._restore_random_state()
        start_next_epoch(self.trainer)
        self.advance()

    def _restore_random_state(self) -> None:
        """Last of all that resuming does: building the structure draws random numbers too."""
        if self._saved_random is not None:
            restore_random_state(self._saved_random)
            self._saved_random = None

    def on_train_epoch_start(self) -> None:
        """Enter the epoch's task."""
        self.advance()

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Enter the task too where a run resumes without an epoch's start."""
        super().on_train_batch_start(batch, batch_idx)
        epoch = self.trainer.current_epoch
        if self._hooked is not self.trainer.optimizers[0] or self._entered != epoch:
            self.advance()

    def on_train_epoch_end(self) -> None:
        """Leave the task after its last epoch."""
        if stopped_mid_epoch(self.trainer):
            return
        self._agree_on_buffers()
        epochs_done = self.trainer.current_epoch + 1
        self._judge_epoch(epochs_done)
        if epochs_done > self.schedule.last_epoch(self.opened):
            self.close(self.opened)

    def _agree_on_buffers(self) -> None:
        """Take the first process's running statistics, as DDP would at the next forward."""
        if self._world_size == 1:
            return
        for buffer in self.backbone.buffers():
            if buffer.is_floating_point():
                mine = buffer if self.global_rank == 0 else torch.zeros_like(buffer)
                buffer.copy_(self.all_reduce(mine))

    def on_train_end(self) -> None:
        """Close the last task where a run resumed at its end."""
        if self.trainer.current_epoch >= self.schedule.total and not stopped_mid_epoch(
            self.trainer
        ):
            self.close(len(self._tasks) - 1)

    def on_fit_end(self) -> None:
        """The same where nothing was left to train; say which tasks were not learned, if any."""
        self._restore_random_state()
        self.on_train_end()
        missing = [str(task.id + 1) for task in self._tasks[self.closed + 1 :]]
        if missing:
            warnings.warn(
                f"The stream stopped before its end: tasks {', '.join(missing)} of "
                f"{len(self._tasks)} are not learned and their rows of the accuracy matrix are empty. "
                "Go on with ckpt_path.",
                stacklevel=2,
            )

    # --- validation, test, prediction ------------------------------------------------------------

    def on_validation_epoch_start(self) -> None:
        """Start counting."""
        self._counts = torch.zeros(3, len(self._tasks), dtype=torch.float64, device=self.device)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Count losses and right answers, each sample in its own task's mode."""
        logits = self(batch.inputs, task=batch.task)
        tasks = torch.as_tensor(batch.task, device=self.device).expand(len(batch.targets))
        losses = self.losses(logits, batch.targets, tasks)
        right = logits.argmax(1) == batch.targets
        values = torch.stack([losses, right, torch.ones_like(losses)]).double()
        self._counts.index_add_(1, tasks, values)

    def on_validation_epoch_end(self) -> None:
        """Log loss and accuracy of the open task, and the mean accuracy over it and those before."""
        loss, right, total = self.all_reduce(self._counts)
        task = max(self.opened, 0)
        accuracy = right / total
        self.log("val/loss", float(loss[task] / total[task]))
        self.log("val/accuracy", float(accuracy[task]), prog_bar=True)
        self.log("val/average_accuracy", float(accuracy[: task + 1].mean()))

    def on_test_epoch_start(self) -> None:
        """Start counting."""
        self.on_validation_epoch_start()

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Count right answers, each sample in its own task's mode."""
        self.validation_step(batch, batch_idx)

    def on_test_epoch_end(self) -> None:
        """Log what `evaluate` gives: the accuracy of every task, and their mean."""
        _, right, total = self.all_reduce(self._counts)
        accuracy = right / total
        self.log_dict({f"test/accuracy/task_{k + 1}": float(a) for k, a in enumerate(accuracy)})
        self.log("test/accuracy", float(accuracy.nanmean()))

    def on_predict_start(self) -> None:
        """Refuse raw inputs that nobody could prepare, before the first."""
        if not hasattr(datamodule_of(self.trainer), "tasks"):
            check_predictable(self)

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Logits ``(batch, num_classes)``.

        Args:
            batch: of a stream, whose samples are answered each in the mode of its task id; or raw inputs,
                alone or first in a tuple or list, which are prepared and answered as by :meth:`predict`.
            batch_idx: its number.
        """
        if isinstance(batch, Batch):
            return cast(Tensor, self(batch.inputs, task=batch.task))
        return self.predict(raw_inputs(batch))

    # --- checkpoints -----------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save the cursor, the structure and the random states."""
        checkpoint["continual"] = {
            "opened": self.opened,
            "closed": self.closed,
            "done": list(self._done),
            "phase": self._phase.name,
            "training_weights": dict(self._training_weights),
            "lengths": list(self.schedule.lengths),
            "patience": [self._judged, self._best_loss, self._bad_epochs],
            "curve": [dict(point) for point in self._curve],
            "epoch_loss": self.all_reduce(self._epoch_loss.to(self.device)).tolist(),
            "mask": self._mask,
            "tasks": [(t.id, t.columns, t.class_names, t.epochs) for t in self._tasks],
            "num_classes": self._head.out_features,
            "seed": self.stream.seed,
            "input_shape": self._input_shape,
            "input_dtype": str(self._input_dtype),
            "preparation": [one.record() for one in self._preparations],
            "attached": [list(part) for part in self._attached],
            "settling": self._settling.state(self._right()),
            "metrics": [dict(one) for one in self._measured],
            "strategies": self._state_keys(),
            "random": self._random_states(),
            "unfinished": progress_in_update(self.trainer),
        }
        if stopped_mid_epoch(self.trainer):
            mark_epoch_unfinished(checkpoint)

    def _random_states(self) -> list[dict[str, Any]]:
        """Of every process: their shares of a batch may differ in size, and so in what they draw."""
        mine = random_state()
        if self.trainer.world_size == 1:
            return [mine]
        states: list[Any] = [None] * self.trainer.world_size
        torch.distributed.all_gather_object(states, mine)
        return states

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Lightning's; by default nothing but tensors and plain values is loaded, and nothing damaged.

        Raises:
            CheckpointError: the file is damaged, of another kind, or with code in it, or does not fit
                the arguments.
        """
        kwargs.setdefault("weights_only", True)
        remedy = "Pass one from a run's checkpoints folder, and what that run's module was made of."
        try:
            saved = {}
            if kwargs["weights_only"] and isinstance(checkpoint_path, str | Path):
                saved = read_checkpoint(Path(checkpoint_path))
        except CheckpointError as error:
            raise CheckpointError(f"{error} {remedy}") from error
        try:
            for part in ("state_dict", "continual", "pytorch-lightning_version") if saved else ():
                saved[part]
            return super().load_from_checkpoint(checkpoint_path, *args, **kwargs)
        except BPNLightningError:
            raise
        # Whatever is there instead makes torch and this raise nearly anything.
        except Exception as error:
            raise CheckpointError(
                f"Expected {checkpoint_path} to be a checkpoint of a ContinualModule with these "
                f"arguments, but got {type(error).__name__}: {why_unreadable(error)}. {remedy}"
            ) from error

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Rebuild the structure, with or without a trainer, and take over the cursor.

        Raises:
            CheckpointError: the checkpoint is of another stream, mask or list of strategies, was taken
                inside an update, or has weights alone where a run is to go on.
        """
        saved = checkpoint.get("continual")
        if saved is None:
            raise CheckpointError(
                "Expected a checkpoint of a ContinualModule, but it has no 'continual' entry. "
                "Pass one from a run's checkpoints folder."
            )
        tasks = [
            Task(id=i, columns=(c[0], c[1]), class_names=tuple(names), epochs=epochs)
            for i, c, names, epochs in saved["tasks"]
        ]
        attached = is_attached(self)
        resuming = attached and self.trainer.state.fn == "fit"
        here: dict[str, Any] = {"mask": self._mask}
        there = {"mask": saved["mask"]}
        if attached and self._tasks:
            here |= _table(self._tasks)
            there |= _table(tasks)
        if resuming:
            here |= {"strategies": self._state_keys(), "seed": self.stream.seed}
            there |= {"strategies": saved["strategies"], "seed": saved["seed"]}
        different = differences(here, there)
        if different:
            raise CheckpointError(
                f"Expected a checkpoint of this run, but they differ: {'; '.join(different)}. "
                "Resume with the configuration that wrote it, or start a new run."
            )
        if resuming and "optimizer_states" not in checkpoint:
            raise CheckpointError(
                "Expected a checkpoint of a whole run, but this one has the weights alone, without the "
                "optimizer and the strategies. Resume another one; load_from_checkpoint takes this one."
            )
        if resuming and saved["unfinished"]:
            done, needed = saved["unfinished"]
            raise CheckpointError(
                "Expected a checkpoint taken between two updates, but this one was taken inside of one, "
                f"after {done} of its {needed} batches, whose gradients are in no checkpoint. Resume "
                "another one; bpn-fit takes them after updates only."
            )
        shape, dtype = tuple(saved["input_shape"]), named_dtype(saved["input_dtype"])
        state = checkpoint["state_dict"]
        rebuild(self, tasks, saved["num_classes"], shape, dtype, saved["attached"], state)
        self._check_preparation(read_preparations(saved["preparation"], len(tasks)))
        self.opened, self.closed = saved["opened"], saved["closed"]
        self._done = list(saved["done"])
        self._training_weights = dict(saved["training_weights"])
        self._judged, self._best_loss, self._bad_epochs = saved["patience"]
        self._curve = [dict(point) for point in saved["curve"]]
        self._settling.load(saved["settling"])
        self._measured = [dict(one) for one in saved["metrics"]]
        if resuming:
            self.schedule.load_lengths(saved["lengths"])
            if self.opened >= 0:
                self._phase = self.schedule.phase(self.opened, saved["phase"])
            summed = saved["epoch_loss"] if self.global_rank == 0 else [0.0, 0.0]
            self._epoch_loss = torch.tensor(summed, dtype=torch.float64)
            states, processes = saved["random"], self.trainer.world_size
            same = len(states) == processes
            self._saved_random = states[self.global_rank if same else 0]
            if not same and self.global_rank == 0:
                warnings.warn(
                    f"The checkpoint is of {len(states)} and this run of {processes} processes. It goes on "
                    "to the same result up to rounding, unless something draws random numbers inside an "
                    "update, as dropout does: each process draws for its own share.",
                    stacklevel=2,
                )
        self._switch(max(self.opened, 0))

    def _state_keys(self) -> list[str]:
        return [strategy.state_key for strategy in self._strategies]


def _numbers(values: Mapping[str, Any]) -> dict[str, Any]:
    """Those that are single numbers: lists are kept of the newest moment only."""
    return {name: value for name, value in values.items() if isinstance(value, int | float)}


def _point(accuracy: Tensor, task: int, epoch: int) -> dict[str, Any]:
    values = [None if isnan(value) else value for value in accuracy.tolist()]
    return {"epoch": epoch, "task": task, "accuracy": values}


def _per_task(prefix: str, values: Tensor) -> dict[str, float]:
    return {f"{prefix}/task_{k}": value for k, value in enumerate(values.tolist(), start=1)}


def _table(tasks: Sequence[Task]) -> dict[str, Any]:
    """Tasks as keys and values, for comparison."""
    values = {f"task {task.id}": asdict(task) for task in tasks}
    return {"number of tasks": len(tasks), **flatten(values)}
