"""The LightningModule of a stream: wires what learns it to Lightning's hooks."""

from collections.abc import Sequence
from typing import Any, Literal, cast

from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim import Optimizer

from bpn_lightning.losses import LossFunction
from bpn_lightning.metrics.settling import Unsettled
from bpn_lightning.metrics.task_metrics import Metrics
from bpn_lightning.model.checkpoint import ENTRY, load_state, loading, save_state
from bpn_lightning.model.early_stopping import PhaseEarlyStopping
from bpn_lightning.model.evaluation import evaluate
from bpn_lightning.model.history import History
from bpn_lightning.model.launch import check_fit, check_strategies, configure_network, find_stream
from bpn_lightning.model.network import ContinualNetwork
from bpn_lightning.model.optimization import Optimization, sgd
from bpn_lightning.model.prediction import check_predictable, predict, raw_inputs
from bpn_lightning.model.rules import check_overrides
from bpn_lightning.model.scoring import TaskScores
from bpn_lightning.model.step import Step
from bpn_lightning.model.task_loop import TaskLoop
from bpn_lightning.random_state import restore_random_state
from bpn_lightning.strategies.base import ContinualStrategy
from bpn_lightning.tasks import Batch, Mask, Position, Split
from bpn_lightning.trainer.lightning import (
    datamodule_of,
    mark_epoch_unfinished,
    set_max_epochs,
    start_next_epoch,
    stopped_mid_epoch,
)

__all__ = ["ContinualModule"]


class ContinualModule(ContinualNetwork):
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
        task_agnostic: whether every task is also scored, at the stream's end, without the task id,
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
        task_agnostic: bool | int = True,
        check_processes: bool = False,
    ) -> None:
        super().__init__(backbone, mask, loss)
        self.history = History(evaluate_every)
        self.optimization = Optimization(
            self, optimizer, scheduler, scheduler_interval, scheduler_monitor
        )
        self.step = Step(self, self.optimization, self.history.settling)
        self.task_loop = TaskLoop(
            self,
            self.optimization,
            self.step,
            self.history,
            PhaseEarlyStopping(patience),
            metrics=metrics,
            evaluate_on=evaluate_on,
            task_agnostic=task_agnostic,
            check_processes=check_processes,
        )
        self._scores = TaskScores()
        self._random_state: dict[str, Any] | None = None  # of a checkpoint, until training starts

    @property
    def evaluate_every(self) -> str:
        """How often test accuracies are taken."""
        return self.history.evaluate_every

    @property
    def curve(self) -> list[dict[str, Any]]:
        """Accuracies over the stream.

        Dictionaries with ``epoch`` (epochs done), ``task`` (the one being learned) and ``accuracy`` (one
        number per task, None where not measured).
        """
        return self.history.curve(self)

    @property
    def task_metrics(self) -> list[dict[str, Any]]:
        """What ``metrics`` measured.

        Dictionaries with ``after`` (tasks learned by then), ``task`` (the one that was tested) and
        ``values`` (by name: a number, or for the newest moment also lists of numbers).
        """
        return self.history.metrics

    @property
    def unsettled(self) -> Sequence[Unsettled]:
        """The tasks whose accuracy fell by more than 0.1 in the last epoch of their training.

        Of the training samples, as they were answered in the updates themselves; of the held-out part
        where there is one.
        """
        return self.history.settling.unsettled

    @property
    def position(self) -> Position:
        """Task, phase and epoch of the trainer's current epoch; outside a fit, the task opened last."""
        if self.trainer.state.fn != "fit":
            return Position(self.cursor.task, "train", 0)
        return self.cursor.locate(self.trainer.current_epoch)

    def evaluate(self, tasks: Sequence[int] | None = None, split: Split = "test") -> Tensor:
        """Accuracy on some tasks, each in its own mode; see :func:`bpn_lightning.model.evaluation.evaluate`."""
        return evaluate(self, tasks, split)

    def predict(self, images: Tensor, task: "int | Tensor | None" = None) -> Tensor:
        """Logits of raw inputs; see :func:`bpn_lightning.model.prediction.predict`."""
        return predict(self, images, task)

    # --- training --------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Build the structure, and check that the trainer, the stream and the strategies fit."""
        stream = find_stream(self, stage)
        if stream is None:
            return  # of raw inputs, whose preparation the module knows
        callbacks = self.trainer.callbacks  # type: ignore[attr-defined]
        self.strategies = [c for c in callbacks if isinstance(c, ContinualStrategy)]
        self.step.find_hooks()
        configure_network(self, stream, stage)
        if stage == "fit":
            check_overrides(self, ContinualModule)
            check_fit(self, self.task_loop, stream)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """A fresh optimizer, over everything trainable but M, and its scheduler.

        In a phase that trains a strategy, that strategy's own.
        """
        return self.optimization.configure()

    def on_fit_start(self) -> None:
        """Let strategies refuse what cannot be right, and move their tensors to the device."""
        check_strategies(self, self.optimization)
        for strategy in self.strategies:
            strategy.move_state(self)

    def on_train_start(self) -> None:
        """Go on where the checkpoint was, or begin."""
        self.task_loop.check_start(self.position.task)
        set_max_epochs(self.trainer, self.schedule.total)
        self._restore_random_state()
        start_next_epoch(self.trainer)
        self.advance()

    def _restore_random_state(self) -> None:
        """Last of all that resuming does: building the structure draws random numbers too."""
        state, self._random_state = self._random_state, None
        if state is not None:
            restore_random_state(state)

    def advance(self) -> None:
        """Close every finished task, open the one that the current epoch belongs to.

        Idempotent, and called wherever training can begin or go on, since no single hook of Lightning
        fires after every way of resuming.
        """
        epoch = self.trainer.current_epoch
        self.task_loop.end_epoch(epoch)
        task = self.position.task
        if self.closed < task - 1:
            self.close(task - 1)
        self.task_loop.enter(epoch)

    def close(self, task_id: int) -> None:
        """Consolidate a task in every strategy and fill its row of the matrix, each exactly once."""
        self.task_loop.close(task_id)

    def on_train_epoch_start(self) -> None:
        """Enter the epoch's task."""
        self.advance()

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Enter the task too where a run resumes without an epoch's start."""
        self.step.begin_batch()
        if not self.step.is_prepared(self.trainer.current_epoch):
            self.advance()

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The loss on the active columns, and the strategies' terms; see :class:`~bpn_lightning.model.step.Step`."""
        return self.step.loss(batch, batch_idx)

    def on_after_backward(self) -> None:
        """Reduce what DDP does not."""
        self.step.reduce_gradients()

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Let the strategies see and change the gradients."""
        self.step.edit_gradients(optimizer)

    def on_train_epoch_end(self) -> None:
        """Leave the task after its last epoch."""
        if stopped_mid_epoch(self.trainer):
            return
        self.broadcast_buffers()
        epochs_done = self.trainer.current_epoch + 1
        self.task_loop.end_epoch(epochs_done)
        if epochs_done > self.schedule.last_epoch(self.opened):
            self.close(self.opened)

    def on_train_end(self) -> None:
        """Close the last task where a run resumed at its end."""
        done = self.trainer.current_epoch >= self.schedule.total
        if done and not stopped_mid_epoch(self.trainer):
            self.close(len(self.tasks) - 1)

    def on_fit_end(self) -> None:
        """The same where nothing was left to train; say which tasks were not learned, if any."""
        self._restore_random_state()
        self.on_train_end()
        self.task_loop.warn_of_unlearned_tasks()

    # --- validation, test, prediction ------------------------------------------------------------

    def on_validation_epoch_start(self) -> None:
        """Start counting."""
        self._scores.reset(self)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Count losses and right answers, each sample in its own task's mode."""
        self._scores.add(self, batch)

    def on_validation_epoch_end(self) -> None:
        """Log loss and accuracy of the open task, and the mean accuracy over it and those before."""
        losses, accuracy = self._scores.compute(self)
        task = self.cursor.task
        self.log("val/loss", float(losses[task]))
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
        _, accuracy = self._scores.compute(self)
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
        """Save all that is no tensor of the module; see :mod:`bpn_lightning.model.checkpoint`."""
        checkpoint[ENTRY] = save_state(self.task_loop)
        if stopped_mid_epoch(self.trainer):
            mark_epoch_unfinished(checkpoint)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Rebuild the structure, with or without a trainer, and take over the cursor.

        Raises:
            CheckpointError: the checkpoint is of another schema, stream, mask or list of strategies, was
                taken inside an update, or has weights alone where a run is to go on.
        """
        resuming = self.has_trainer and self.trainer.state.fn == "fit"
        self._random_state = load_state(self.task_loop, checkpoint, resuming)

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Lightning's; by default nothing but tensors and plain values is loaded, and nothing damaged.

        Raises:
            CheckpointError: the file is damaged, of another kind, or with code in it, or does not fit
                the arguments.
        """
        kwargs.setdefault("weights_only", True)
        with loading(checkpoint_path, kwargs["weights_only"]):
            return super().load_from_checkpoint(checkpoint_path, *args, **kwargs)
