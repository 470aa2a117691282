"""The LightningModule of a stream: wires what learns it to Lightning's hooks."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from math import isnan
from pathlib import Path
from typing import Any, Literal, cast

from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim import Optimizer

from bpn_lightning.datamodules.base import ContinualDataModule
from bpn_lightning.metrics.accuracy_matrix import AccuracyMatrix
from bpn_lightning.metrics.gate_scores import GateScores
from bpn_lightning.metrics.settling import Unsettled
from bpn_lightning.metrics.task_metrics import Metrics
from bpn_lightning.model.checkpoint import load_state, loading, save_state
from bpn_lightning.model.early_stopping import PhaseEarlyStopping
from bpn_lightning.model.evaluation import evaluate
from bpn_lightning.model.extending import Extension
from bpn_lightning.model.forgetting import forget
from bpn_lightning.model.frozen_core import FrozenCore, Trains
from bpn_lightning.model.gating import evaluate_own_class
from bpn_lightning.model.history import History
from bpn_lightning.model.host import Host
from bpn_lightning.model.launch import (
    check_fit,
    check_strategies,
    configure,
    find_stream,
    shard_core,
)
from bpn_lightning.model.optimization import Optimization, sgd
from bpn_lightning.model.prediction import check_predictable, predict, predict_tasks, raw_inputs
from bpn_lightning.model.rules import check_overrides, refused_export
from bpn_lightning.model.scoring import TaskScores
from bpn_lightning.model.step import Step
from bpn_lightning.model.task_loop import TaskLoop
from bpn_lightning.nn.fronts import Front
from bpn_lightning.nn.losses import LossFunction
from bpn_lightning.nn.network import ContinualNetwork
from bpn_lightning.random_state import random_state
from bpn_lightning.strategies.gates.base import TaskGate
from bpn_lightning.tasks import Batch, ContinualStream, Mask, Position, Schedule, Split, Task
from bpn_lightning.trainer.lightning import (
    HookNameAsPlainAttribute,
    datamodule_of,
    start_next_epoch,
    stopped_mid_epoch,
)

__all__ = ["ContinualModule"]


class ContinualModule(HookNameAsPlainAttribute):
    """A network that learns a stream of tasks in one fit.

    A backbone maps inputs to features; one linear head over all classes of the stream stands on it.
    The methods are the trainer's :class:`~bpn_lightning.strategies.base.ContinualStrategy` callbacks.

    Args:
        backbone: maps ``(batch, *input_shape)``, or the front's ``(batch, width)``, to features ``(batch,
            features)``.
        front: a fixed feature extractor before backbone and gates, fitted once, when the first task
            opens, on its training part without augmentation; None for none.
        front_cache_gb: gigabytes of its features that a fit keeps on the network's device, in each
            process, so that each image goes through the front once; 0 for none. Augmented images, and
            tasks whose features do not fit, go through it each time.
        optimizer: called with the parameters at the start of every task (LightningCLI's convention).
        group_lr: learning rates of their own for parameters of ``modes`` (bias units, scales, low-rank
            products), of the ``head`` and of the ``core`` (all others), by these names: groups of the
            optimizer, which is then called with them.
        scheduler: called with the optimizer at the same moments. Its ``num_steps``, ``total_steps``,
            ``T_max`` or ``total_iters``, if it has no value, not even a default, or -1, is the number of
            times that it will step.
        scheduler_interval: whether the scheduler steps after every update or every epoch.
        scheduler_monitor: the loss of the open task that a ``ReduceLROnPlateau``, which steps after every
            epoch, is given: ``val/loss`` or ``train/loss``; by default the former where a part is held
            out for validation, and the latter where none is.
        mask: the columns of the head that take part: ``all`` from the first task on (single head),
            ``seen`` (classes of the tasks opened so far), ``task`` (multi-head: the mode's own), or
            ``shared`` (every task has the same classes).
        train: what a task trains: ``all``, or its ``modes`` alone: its mode and its own rows of the head, or
            its rows of the ``head`` alone. Backbone and running statistics, and a head that all tasks
            share, are frozen in both.
        train_first: the same of the stream's first task, so that a core is learned whole and then frozen;
            None: as ``train``.
        reserve_classes: columns of the head, if more than the stream has classes; with the mask ``all``
            only, where the classes of tasks to come take part from the first task on. A stream that goes
            on within them learns as if all its tasks had been known.
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
        network: what is trained, and answers.
        host: what strategies get: the network, the stream, the trainer.

    Raises:
        ConfigurationError: a choice is unknown, or patience is below 1.
    """

    def __init__(
        self,
        backbone: nn.Module,
        *,
        front: Front | None = None,
        front_cache_gb: float = 2.0,
        optimizer: OptimizerCallable = sgd,
        group_lr: dict[str, float] | None = None,
        scheduler: LRSchedulerCallable | None = None,
        scheduler_interval: Literal["step", "epoch"] = "step",
        scheduler_monitor: Literal["val/loss", "train/loss"] | None = None,
        mask: Mask = "all",
        train: Trains = "all",
        train_first: Trains | None = None,
        reserve_classes: int | None = None,
        loss: LossFunction | None = None,
        metrics: Metrics | None = None,
        evaluate_every: Literal["task", "epoch"] = "task",
        evaluate_on: Literal["all", "seen_and_next", "current"] = "all",
        patience: int | None = None,
        task_agnostic: bool | int = True,
        check_processes: bool = False,
    ) -> None:
        super().__init__()
        self.network = ContinualNetwork(backbone, mask, front, reserve_classes)
        core = FrozenCore(self.network, train, train_first)
        self.host = Host(self, self.network, loss, core, front_cache_gb)
        self.history = History(evaluate_every)
        self.optimization = Optimization(
            self.host, optimizer, scheduler, scheduler_interval, scheduler_monitor, group_lr
        )
        self.step = Step(self.host, self.optimization, self.history.settling)
        self.task_loop = TaskLoop(
            self.host,
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
        self._extension = Extension(self.host)

    def __getstate__(self) -> dict[str, Any]:
        """Copies and files hold no trainer."""
        return {**super().__getstate__(), "_extension": self._extension.path}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy continues from a checkpoint file, not from the trainer of the original."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._extension = Extension(self.host, state["_extension"])

    # --- what it knows ---------------------------------------------------------------------------

    @property
    def backbone(self) -> nn.Module:
        """The network without its head, where Lightning's own callbacks look for it."""
        return self.network.backbone

    @property
    def tasks(self) -> Sequence[Task]:
        """The tasks of the stream."""
        return self.network.tasks

    @property
    def opened(self) -> int:
        """The task that was opened last, -1 before the first."""
        return self.network.opened

    @property
    def closed(self) -> int:
        """The last task that is learned, consolidated and evaluated, -1 before the first."""
        return self.network.closed

    @property
    def accuracy_matrix(self) -> AccuracyMatrix:
        """Accuracies of every task before training and after each task."""
        return self.network.accuracy_matrix

    @property
    def schedule(self) -> Schedule:
        """Of the epochs of the stream."""
        return self.host.cursor.schedule

    @property
    def position(self) -> Position:
        """Task, phase and epoch of the trainer's current epoch; outside a fit, the task opened last."""
        return self.host.position

    @property
    def curve(self) -> list[dict[str, Any]]:
        """Accuracies over the stream.

        Dictionaries with ``epoch`` (epochs done), ``task`` (the one being learned) and ``accuracy`` (one
        number per task, None where not measured).
        """
        return self.history.curve(self.host)

    @property
    def task_metrics(self) -> list[dict[str, Any]]:
        """What ``metrics`` measured.

        Dictionaries with ``after`` (tasks learned by then), ``task`` (the one that was tested) and
        ``values`` (by name: a number, or for the newest moment also lists of numbers).
        """
        return self.history.metrics

    @property
    def gates(self) -> Mapping[str, TaskGate]:
        """What names tasks, by name: of the trainer's callbacks, or of the file that was loaded."""
        return self.host.gates

    @property
    def gate_scores(self) -> list[GateScores]:
        """What gates answered for test samples; see :class:`~bpn_lightning.metrics.gate_scores.GateScores`."""
        return self.history.gate_scores

    @property
    def unsettled(self) -> Sequence[Unsettled]:
        """The tasks whose accuracy fell by more than 0.1 in the last epoch of their training.

        Of the training samples, as they were answered in the updates themselves; of the held-out part
        where there is one.
        """
        return self.history.settling.unsettled

    @property
    def overtaken(self) -> Sequence[float | None]:
        """Of each learned task, the fraction of its test samples answered with a class of a later task.

        Where ``train`` is ``modes`` and all classes compete, all that is forgotten is forgotten so; else empty.
        """
        return self.history.overtaken

    # --- what it answers -------------------------------------------------------------------------

    def attach(self, stream: ContinualStream) -> None:
        """Use a stream without a trainer; see :meth:`bpn_lightning.nn.network.ContinualNetwork.build_for`."""
        self.host.attach(stream)

    def extend(
        self, stream: ContinualDataModule, past_data: ContinualDataModule | None = None
    ) -> None:
        """Continue with new tasks: the next ``trainer.fit(module, stream)`` learns them after those learned.

        With the same strategies it is bit for bit what one fit of all tasks would have learned. Numbers and
        columns of the tasks follow the past's, and so do random states, epochs and whatever strategies
        remember; in ``fit`` the network grows. A module that was loaded from an export, or copied, has no
        training state: it continues with strategies and gates that need none, such as BD, and others are
        refused in ``fit``.

        Args:
            stream: of the new tasks alone; set up or not.
            past_data: a stream of the learned tasks, to measure accuracies on them; None leaves those
                unmeasured, NaN in the matrix.

        Raises:
            ConfigurationError: a task is not learned to its end.
            CheckpointError: the module was loaded from weights alone, or from an export of another version.
        """
        self._extension.begin(stream, past_data)

    def forward(self, inputs: Tensor, task: "int | Tensor | None" = None) -> Tensor:
        """Logits of prepared inputs; see :meth:`bpn_lightning.nn.network.ContinualNetwork.forward`."""
        return cast(Tensor, self.network(inputs, task=task))

    def task_mode(self, task: "int | Tensor") -> AbstractContextManager[None]:
        """Whatever runs inside uses this task's mode; see :meth:`bpn_lightning.nn.network.ContinualNetwork.task_mode`."""
        return self.network.task_mode(task)

    def for_inference(self, task: int | None = None) -> nn.Module:
        """A copy that only answers; see :meth:`bpn_lightning.nn.network.ContinualNetwork.for_inference`."""
        return self.network.for_inference(task)

    def evaluate(self, tasks: Sequence[int] | None = None, split: Split = "test") -> Tensor:
        """Accuracy on some tasks, whose IDs are given; see :func:`bpn_lightning.model.evaluation.evaluate`.

        Of gates that learned alone: of the first gate's own class.
        """
        if self.host.classifier is not None:
            return evaluate_own_class(self.host, self.host.classifier, tasks, split)
        return evaluate(self.host, tasks, split)

    def forget(self, task: int) -> list[str]:
        """Overwrite what is stored of a task, and list what cannot be; see :func:`bpn_lightning.model.forgetting.forget`."""
        return forget(self.host, task)

    def predict(
        self, images: Tensor, task: "int | Tensor | None" = None, gate: str | None = None
    ) -> Tensor:
        """Logits of raw inputs; see :func:`bpn_lightning.model.prediction.predict`."""
        return predict(self.host, images, task, gate)

    def predict_tasks(self, images: Tensor, gate: str | None = None) -> Tensor:
        """Probabilities of tasks; see :func:`bpn_lightning.model.prediction.predict_tasks`."""
        return predict_tasks(self.host, images, gate)

    to_onnx = refused_export("to_onnx")
    to_torchscript = refused_export("to_torchscript")
    to_tensorrt = refused_export("to_tensorrt")

    # --- training --------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Build the structure, and check that the trainer, the stream and the strategies fit."""
        stream = find_stream(self.host, stage)
        if stream is not None:  # else raw inputs, whose preparation the module knows
            self._set_up(stage, stream)
        shard_core(self.host)

    def _set_up(self, stage: str, stream: ContinualDataModule) -> None:
        if stage == "fit":
            self._extension.check(self.trainer, stream)
        configure(self.host, stream, stage)
        if stage == "fit":
            check_overrides(self, ContinualModule)
            self._extension.lengthen(self.trainer)
            check_fit(self.host, self.task_loop, stream)
            self._extension.resume(self.trainer, self.history)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """A fresh optimizer and its scheduler; in a phase that trains a strategy, that strategy's own."""
        return self.optimization.configure()

    def on_fit_start(self) -> None:
        """Let strategies refuse what cannot be right, and move their tensors to the device."""
        self.host.mark_front(training=True)
        self.host.core.set_flags(training=True)
        self._extension.done()
        self.host.note_run()
        self.task_loop.end_random_state = None
        self.host.front_cache.clear()
        check_strategies(self.host, self.optimization)
        self.step.find_hooks()
        for strategy in self.host.strategies:
            strategy.move_state(self.host)

    def on_train_start(self) -> None:
        """Go on where the checkpoint was, or begin."""
        self.host.mark_front(training=False)
        if self.host.classifier is not None:
            self.task_loop.learn_without_training()
            return
        self.task_loop.begin(self.position.task)
        start_next_epoch(self.trainer)
        self.task_loop.advance(self.trainer.current_epoch)

    def on_train_epoch_start(self) -> None:
        """Enter the epoch's task."""
        self.task_loop.advance(self.trainer.current_epoch)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Enter the task too where a run resumes without an epoch's start."""
        self.step.begin_batch()
        if not self.step.is_prepared(self.trainer.current_epoch):
            self.task_loop.advance(self.trainer.current_epoch)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The loss on the active columns, and the strategies' terms; see :class:`~bpn_lightning.model.step.Step`."""
        return self.step.loss(self.host.apply_front(batch, "train"), batch_idx)

    def on_after_backward(self) -> None:
        """Reduce what DDP does not."""
        self.step.reduce_gradients()

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Let the strategies see and change the gradients."""
        self.step.edit_gradients(optimizer)

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip by value, or by the norm of what belongs to open columns of the head."""
        norm = (gradient_clip_algorithm or "norm") == "norm"
        if gradient_clip_val and norm and self.network.has_closed_columns:
            self.optimization.clip_norm(optimizer, gradient_clip_val)
        else:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def on_train_epoch_end(self) -> None:
        """Leave the task after its last epoch."""
        if not stopped_mid_epoch(self.trainer):
            self.host.broadcast_buffers()
            self.task_loop.leave(self.trainer.current_epoch + 1)

    def on_train_end(self) -> None:
        """Close the last task where a run resumed at its end."""
        if not stopped_mid_epoch(self.trainer):
            self.task_loop.finish(self.trainer.current_epoch)

    def on_fit_end(self) -> None:
        """The same where nothing was left to train; say which tasks were not learned, if any."""
        self.task_loop.restore_random_state()
        self.host.mark_front(training=False)
        self.on_train_end()
        self.host.core.set_flags(training=True)
        self.host.front_cache.clear()
        self.task_loop.warn_of_unlearned_tasks()
        self.task_loop.end_random_state = random_state()
        self._extension.remember()

    # --- validation, test, prediction ------------------------------------------------------------

    def on_validation_epoch_start(self) -> None:
        """Start counting."""
        self._scores.reset(self.host)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Count losses and right answers, each sample in its own task's mode."""
        if self.host.can_answer:
            self._scores.add(self.host, self.host.apply_front(batch, "val"))

    def on_validation_epoch_end(self) -> None:
        """Log loss and accuracy of the open task, and the mean accuracy over it and those before."""
        losses, accuracy = self._scores.compute(self.host)
        task = self.host.cursor.task
        self.log("val/loss", float(losses[task]))
        self.log("val/accuracy", float(accuracy[task]), prog_bar=True)
        known = self.network.structure.known(range(task + 1))
        average = float(accuracy[known].mean())
        if not isnan(average):  # the tasks of a run before this one are not validated
            self.log("val/average_accuracy", average)

    on_test_epoch_start = on_validation_epoch_start
    test_step = validation_step

    def on_test_epoch_end(self) -> None:
        """Log what `evaluate` gives: the accuracy of every task, and their mean."""
        _, accuracy = self._scores.compute(self.host)
        self.log_dict({f"test/accuracy/task_{k + 1}": float(a) for k, a in enumerate(accuracy)})
        self.log("test/accuracy", float(accuracy.nanmean()))

    def on_predict_start(self) -> None:
        """Refuse raw inputs that nobody could prepare, before the first."""
        if not hasattr(datamodule_of(self.trainer), "tasks"):
            check_predictable(self.host)

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Logits ``(batch, num_classes)`` of a stream's batch, each sample's in the mode of its task id.

        Raw inputs, alone or first in a tuple or list, are prepared and answered as by :meth:`predict`.
        """
        if isinstance(batch, Batch):
            return cast(Tensor, self(self.host.apply_front(batch).inputs, task=batch.task))
        return self.predict(raw_inputs(batch))

    # --- checkpoints -----------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save all that is no tensor of the module; see :mod:`bpn_lightning.model.checkpoint`."""
        save_state(self.task_loop, checkpoint)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Rebuild the structure, with or without a trainer; see :mod:`bpn_lightning.model.checkpoint`."""
        if (
            self.host.has_trainer
        ):  # later, Lightning would convert what was rounded when it was loaded
            self.trainer.precision_plugin.convert_module(self)
        load_state(self.task_loop, checkpoint)

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Lightning's; by default nothing but tensors and plain values is loaded, and nothing damaged.

        Raises:
            CheckpointError: the file is damaged, of another kind, or with code in it, or does not fit
                the arguments.
        """
        kwargs.setdefault("weights_only", True)
        with loading(checkpoint_path, kwargs["weights_only"]):
            module = super().load_from_checkpoint(checkpoint_path, *args, **kwargs)
        if isinstance(checkpoint_path, str | Path):
            module._extension.path = Path(checkpoint_path)
        return module
