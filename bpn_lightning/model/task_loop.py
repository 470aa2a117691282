"""What happens at the edges of tasks, phases and epochs, each exactly once."""

import warnings
from collections.abc import Sequence
from math import isnan, nan
from typing import Any, Literal

import torch
from torch import Tensor

from bpn_lightning.errors import ConfigurationError
from bpn_lightning.metrics.class_counts import CountClasses
from bpn_lightning.metrics.task_metrics import Metrics, TaskMetrics, named_metrics
from bpn_lightning.model.early_stopping import PhaseEarlyStopping
from bpn_lightning.model.evaluation import evaluate, evaluate_task_agnostic, validation_scores
from bpn_lightning.model.frozen_core import Overtaken
from bpn_lightning.model.gating import evaluate_gates, evaluate_own_class
from bpn_lightning.model.history import History, log_metrics, per_task, stream_metrics
from bpn_lightning.model.host import Host
from bpn_lightning.model.optimization import Optimization
from bpn_lightning.model.step import Step
from bpn_lightning.nn.sharding import replicated
from bpn_lightning.random_state import restore_random_state
from bpn_lightning.trainer.lightning import set_max_epochs, wrap_again
from bpn_lightning.trainer.processes import check_processes

__all__ = ["TaskLoop"]

EvaluateOn = Literal["all", "seen_and_next", "current"]


class TaskLoop:
    """Opens and closes tasks, begins phases and ends epochs; the host's cursor says which are done.

    Args:
        host: of the network that learns.
        optimization: makes a task's optimizer.
        step: is prepared for every phase.
        history: gets what is measured.
        early_stopping: ends phases.
        metrics: of torchmetrics, taken of each task wherever its test accuracy is.
        evaluate_on: the tasks that are tested after every task.
        task_agnostic: whether, or on how many samples, every task is also scored without the task ID.
        check_processes: whether processes compare their replicated state after every task.

    Raises:
        ConfigurationError: a choice is unknown.
    """

    def __init__(
        self,
        host: Host,
        optimization: Optimization,
        step: Step,
        history: History,
        early_stopping: PhaseEarlyStopping,
        *,
        metrics: Metrics | None,
        evaluate_on: EvaluateOn,
        task_agnostic: bool | int,
        check_processes: bool,
    ) -> None:
        if evaluate_on not in ("all", "seen_and_next", "current"):
            raise ConfigurationError(
                "Expected evaluate_on to be 'all', 'seen_and_next' or 'current', but got "
                f"{evaluate_on!r}."
            )
        if task_agnostic is not True and task_agnostic is not False and task_agnostic < 1:
            raise ConfigurationError(
                f"Expected task_agnostic to be true, false or at least 1 sample of each task, but got "
                f"{task_agnostic}. Use false for no score without the task id."
            )
        self.host = host
        self.network = host.network
        self.optimization = optimization
        self.step = step
        self.history = history
        self.early_stopping = early_stopping
        self.metrics = named_metrics(metrics)
        self.evaluate_on = evaluate_on
        self.task_agnostic = task_agnostic
        self.check_processes = check_processes
        self.random_state: dict[str, Any] | None = None  # of a checkpoint, until training starts
        self.end_random_state: dict[str, Any] | None = None  # of a fit that is over

    def begin(self, task: int) -> None:
        """Go on where the checkpoint was, or begin.

        Args:
            task: of the next update.

        Raises:
            ConfigurationError: the task is neither the open one nor the next.
        """
        opened = self.network.opened
        if not opened <= task <= opened + 1:
            raise ConfigurationError(
                f"Expected a module that is about to learn task {task}, but it has opened task "
                f"{opened}. Make a new module, continue with ckpt_path, or call module.extend for new tasks."
            )
        self.network.check_task_ids(task)
        set_max_epochs(self.host.trainer, self.host.cursor.schedule.total)
        self._warn_of_unmeasured_tasks()
        self.restore_random_state()

    def learn_without_training(self) -> None:
        """Open and close every task: gates are all that learns."""
        set_max_epochs(self.host.trainer, 0)
        self.restore_random_state()
        for task in range(self.network.closed + 1, len(self.network.tasks)):
            if task > self.network.opened:
                self._open(task)
            self.close(task)

    def restore_random_state(self) -> None:
        """Last of all that resuming does: building the structure draws random numbers too."""
        state, self.random_state = self.random_state, None
        if state is not None:
            restore_random_state(state)

    def _warn_of_unmeasured_tasks(self) -> None:
        stream, tasks = self.host.stream, self.network.tasks
        missing = [task.id + 1 for task in tasks if not stream.has_data(task.id)]
        if missing and self.evaluate_on != "current" and self.host.global_rank == 0:
            which = f"task {missing[0]}" if len(missing) == 1 else f"tasks 1 to {missing[-1]}"
            warnings.warn(
                f"The stream has no data of {which}, learned before: accuracies on them are not measured, "
                "and means over all tasks are not known. Give past_data to module.extend, or --past_data to "
                "bpn-fit, to measure them.",
                stacklevel=4,
            )

    def warn_of_unlearned_tasks(self) -> None:
        """Say which tasks a stream that stopped before its end has not learned, if any."""
        tasks = self.network.tasks
        missing = [str(task.id + 1) for task in tasks[self.network.closed + 1 :]]
        if missing:
            warnings.warn(
                f"The stream stopped before its end: tasks {', '.join(missing)} of "
                f"{len(tasks)} are not learned and their rows of the accuracy matrix are empty. "
                "Continue with ckpt_path.",
                stacklevel=3,
            )

    # --- a task ----------------------------------------------------------------------------------

    def advance(self, epoch: int) -> None:
        """Close every finished task, open the one that an epoch belongs to.

        Idempotent, and called wherever training can begin or go on, since no single hook of Lightning
        fires after every way of resuming.
        """
        self.end_epoch(epoch)
        before = self.host.cursor.locate(epoch).task - 1
        if self.network.closed < before:
            self.close(before)
        self._enter(epoch)

    def leave(self, epochs_done: int) -> None:
        """After an epoch: end it, and close its task where it was the last one."""
        self.end_epoch(epochs_done)
        opened = self.network.opened
        if epochs_done > self.host.cursor.schedule.last_epoch(opened):
            self.close(opened)

    def finish(self, epochs_done: int) -> None:
        """Close the last task where a run resumed at its end, or nothing was left to train."""
        if epochs_done >= self.host.cursor.schedule.total:
            self.close(len(self.network.tasks) - 1)

    def _enter(self, epoch: int) -> None:
        """Open the task of an epoch, begin its phase and prepare the updates, where that is to be done."""
        host, cursor = self.host, self.host.cursor
        task, phase, _ = cursor.locate(epoch)
        if task > self.network.opened:
            self._open(task)
        self._begin_phase(phase)
        host.core.set_flags(training=False)
        self.step.prepare(epoch)
        counted = cursor.may_end_training(epoch, self.early_stopping.patience is not None)
        self.history.settling.counting = counted and not host.stream.has_validation

    def _open(self, task_id: int) -> None:
        host, network = self.host, self.network
        if task_id == 0:
            host.fit_front()
            for strategy in host.strategies:
                strategy.on_stream_start(host, host.stream)
            known = range(len(network.tasks) if host.classifier is None else 0)
            untrained = self._test(known, after=0)
            network.accuracy_matrix.update(0, untrained)
            self.history.add_point(untrained, task_id, epoch=0)
            self._log_stream()
        host.merged.swap_out(network)
        host.cursor.begin_task(task_id)
        network.switch(task_id)
        if host.core.begin_task(task_id):
            wrap_again(host.trainer)
        for strategy in host.strategies:
            strategy.on_task_start(host, network.tasks[task_id])
        if host.stream.reset_optimizer == "always":
            host.trainer.strategy.setup_optimizers(host.trainer)
        else:
            self.step.clear_optimizer_state()
        self.step.forget_optimizer()

    def _begin_phase(self, name: str) -> None:
        """Begin a phase of the open task, with an optimizer of its own, unless it runs."""
        host = self.host
        before = host.phase
        if not host.cursor.begin_phase(name):
            return
        own = "strategy" in (before.trains, host.phase.trains)
        if host.stream.reset_optimizer == "always" or own:
            host.trainer.strategy.setup_optimizers(host.trainer)
        self.step.forget_optimizer()

    def close(self, task_id: int) -> None:
        """Consolidate a task in every strategy and fill its row of the matrix, each exactly once.

        What is finished is noted as it happens, so a run that stops in between continues from there.
        """
        host, network, cursor = self.host, self.network, self.host.cursor
        if task_id <= network.closed:
            return
        self._check_finite(task_id)
        # Before strategies take importances of what will not move again.
        if host.core.set_frozen(host.core.freezes(task_id + 1)):
            wrap_again(host.trainer)
        for strategy in host.strategies:
            if strategy.state_key not in cursor.consolidated:
                strategy.on_task_end(host, network.tasks[task_id])
                cursor.consolidated.append(strategy.state_key)
        network.switch(task_id)
        self._swap_in_merged_weights()
        epochs = cursor.schedule.last_epoch(task_id) + 1
        if host.classifier is None:
            self._test_network(task_id, epochs)
        self._ask_gates(self._tested_after(task_id), task_id + 1, epochs)
        if host.classifier is not None:
            self._take_own_class(task_id)
        split = "val" if host.stream.has_validation else "train"
        self.history.settling.end_task(task_id, split)
        network.closed = task_id
        if self.check_processes and host.trainer.world_size > 1:
            check_processes(self._replicated_state(), f"after task {task_id}")
        self._log_stream()

    def _check_finite(self, task_id: int) -> None:
        for name, parameter in self.network.named_parameters():
            if not parameter.detach().isfinite().all():
                raise ConfigurationError(
                    f"Expected the weights to be finite after task {task_id}, but {name} is not: "
                    "training diverged. Lower the learning rate or the strategies' strength; EWC's "
                    "update 'proximal' is stable at any strength."
                )

    def _swap_in_merged_weights(self) -> None:
        host = self.host
        if host.training_weights:
            return
        for strategy in host.strategies:
            merged = strategy.merged_weights(host)
            if merged is not None:
                host.merged.swap_in(self.network, merged)

    def _replicated_state(self) -> dict[str, Any]:
        """What must be the same in every process, by whose it is."""
        host = self.host
        optimizer = host.trainer.optimizers[0]
        own = {strategy.state_key: strategy.state_dict() for strategy in host.strategies}
        return {
            "the network": replicated(self.network.state_dict()),
            type(optimizer).__name__: optimizer.state_dict(),
            "the weights of training": host.training_weights,
            **own,
        }

    # --- an epoch --------------------------------------------------------------------------------

    def end_epoch(self, epochs_done: int) -> None:
        """After an epoch of the open task: end its phase when patience runs out, add to the curve.

        Not in Lightning's validation loop, which a run resumed from an epoch's last batch skips.

        Args:
            epochs_done: of the stream; each number once, later calls change nothing.
        """
        network, cursor = self.network, self.host.cursor
        if epochs_done <= cursor.checked_epochs or network.closed == network.opened:
            return
        epoch = epochs_done - 1
        if cursor.phase_of(epoch).trains == "strategy":
            self._score(epoch, with_loss=False)
        else:
            self._check_early_stopping(epoch)
        if self.history.evaluate_every == "epoch" and (
            epochs_done <= cursor.schedule.last_epoch(network.opened)
        ):
            row = self._test(range(network.opened + 1))
            self.history.add_point(row, network.opened, epochs_done)
            self._ask_gates(range(network.closed + 1), network.closed + 1, epochs_done)
            self._log(per_task("accuracy", row[: network.opened + 1]))
        cursor.checked_epochs = epochs_done
        # The end of a stream that early stopping shortens, before Lightning asks whether to go on.
        set_max_epochs(self.host.trainer, cursor.schedule.total)

    def _check_early_stopping(self, epoch: int) -> None:
        """Score an epoch that trained the network; step a scheduler that waits for it, end its phase."""
        schedule, stopping = self.host.cursor.schedule, self.early_stopping
        wanted = stopping.patience is not None or self.optimization.plateau == "val/loss"
        loss = self._score(epoch, with_loss=wanted)
        self.optimization.end_epoch(loss)
        if stopping.update(loss):
            schedule.end_phase(epoch)
        if epoch + 1 == schedule.phase_epochs(epoch).stop:
            stopping.reset()

    def _score(self, epoch: int, with_loss: bool) -> float:
        """Note the accuracy of an epoch that may be one of a task's last two.

        Returns:
            The validation loss if it was asked for, or known anyway; else NaN.
        """
        host, settling = self.host, self.history.settling
        early = self.early_stopping.patience is not None
        settles = host.cursor.may_end_training(epoch, early)
        loss = nan
        accuracy = None
        if not host.stream.has_validation:
            accuracy = settling.accuracy(self.right_answers())
        elif settles or with_loss:
            loss, accuracy = validation_scores(host, self.network.opened)
        if accuracy is not None and (settles or not host.stream.has_validation):
            settling.end_epoch(accuracy)
        return loss

    def right_answers(self) -> int:
        """Answers of all processes that were right since counting, or this run, began."""
        settling = self.history.settling
        if not settling.counting:
            return 0
        return int(self.host.all_reduce(settling.right.to(self.host.device)))

    # --- what is measured ------------------------------------------------------------------------

    def _test_network(self, task_id: int, epochs: int) -> None:
        """Fill the row of the matrix after a task."""
        host, network = self.host, self.network
        row = self._test(self._tested_after(task_id), after=task_id + 1)
        last = task_id + 1 == len(network.tasks)
        if last and self.task_agnostic and network.mask != "task":
            most = None if self.task_agnostic is True else self.task_agnostic
            counts = self._counts(task_id + 1)
            tasks = range(len(network.tasks))
            alone = evaluate_task_agnostic(host, tasks, max_samples=most, observe=counts.update)
            tested = self._keep("accuracy_task_agnostic", counts)
            network.accuracy_matrix.update_task_agnostic(alone, tested)
        if last and host.stream.has_validation:
            self.history.validation = _plain(evaluate(host, split="val"))
        tested = self.history.class_counts["accuracy"]["tasks"]
        network.accuracy_matrix.update(task_id + 1, row, tested)
        self.history.add_point(row, task_id, epochs)

    def _take_own_class(self, task_id: int) -> None:
        """Fill the row of the matrix by what the gate itself, which was just asked, has answered."""
        name = next(iter(self.host.gates))
        own = next(one for one in reversed(self.history.gate_scores) if one["gate"] == name)
        matrix = self.network.accuracy_matrix
        if task_id + 1 == len(self.network.tasks):
            self._count_own_class()
            if self.task_agnostic:
                matrix.update_task_agnostic(_accuracies(own["own_class"]), own["samples"])
        matrix.update(task_id + 1, _accuracies(own["own_class_task_given"]), own["samples"])

    def _count_own_class(self) -> None:
        """Take the counts of classes, and the validation score, of a gate that learned alone."""
        host, tasks = self.host, self.network.tasks
        gate = next(iter(host.gates.values()))
        given, alone = (self._counts(len(tasks)) for _ in range(2))

        def observe(task: int, known: Tensor, unknown: Tensor, targets: Tensor) -> None:
            given.update(task, known, targets)
            alone.update(task, unknown, targets)

        tested = [task.id for task in tasks if host.stream.has_data(task.id)]
        evaluate_own_class(host, gate, tested, observe=observe)
        self._keep("accuracy", given)
        if self.task_agnostic:
            self._keep("accuracy_task_agnostic", alone)
        if host.stream.has_validation:
            row = torch.full((len(tasks),), nan, dtype=torch.float64)
            row[tested] = evaluate_own_class(host, gate, tested, "val").cpu()
            self.history.validation = _plain(row)

    def _counts(self, learned: int) -> CountClasses:
        structure = self.network.structure
        return CountClasses(len(structure.tasks), structure.num_classes, learned, self.host.device)

    def _keep(self, score: str, counts: CountClasses) -> list[int]:
        """Keep what was counted for a score of the results; returns the samples of each task."""
        found = counts.compute(self.host.all_reduce)
        self.history.class_counts[score] = found
        return found["tasks"]

    def _tested_after(self, task_id: int) -> range:
        tasks = range(len(self.network.tasks))
        if self.evaluate_on == "all" or task_id == tasks[-1]:
            return tasks
        return tasks[: task_id + 2] if self.evaluate_on == "seen_and_next" else tasks[task_id:][:1]

    def _test(self, tasks: range, after: int | None = None) -> Tensor:
        """A row of the matrix: accuracies of these tasks, NaN for the others.

        Args:
            tasks: what is tested.
            after: how many tasks are learned, where the metrics are taken too.
        """
        row = torch.full((len(self.network.tasks),), nan, dtype=torch.float64)
        host, moment = self.host, after is not None
        taken = TaskMetrics(self.metrics) if self.metrics and moment else None
        overtaken = None
        if moment and host.core.may_be_overtaken:
            overtaken = Overtaken(self.network.tasks, host.device)
        counts = self._counts(after) if after else None

        def observe(task: int, logits: Tensor, targets: Tensor) -> None:
            for one in (taken, overtaken, counts):
                if one is not None:
                    one.update(task, logits, targets)

        row[tasks.start : tasks.stop] = evaluate(host, tasks, "test", observe)
        if taken is not None and after is not None:
            self.history.add_metrics(after, taken.compute())
        if counts is not None:
            self._keep("accuracy", counts)
        if overtaken is not None and after is not None:
            self.history.overtaken = overtaken.compute(host.all_reduce)[:after]
        return row

    def _ask_gates(self, tasks: range, learned: int, epoch: int) -> None:
        """Score the gates on these tasks; they know those that are learned."""
        if learned and self.host.gates:
            found = evaluate_gates(self.host, tasks, learned, epoch)
            self.history.add_gate_scores(epoch, found)

    def _log_stream(self) -> None:
        current_only, history = self.evaluate_on == "current", self.history
        self._log(stream_metrics(self.host, current_only, history.gate_scores, history.overtaken))

    def _log(self, metrics: dict[str, float]) -> None:
        trainer = self.host.trainer
        log_metrics(trainer.loggers, metrics, trainer.global_step)


def _plain(accuracies: Tensor) -> list[float | None]:
    return [None if isnan(value) else value for value in accuracies.tolist()]


def _accuracies(per_task: Sequence[float | None] | None) -> list[float]:
    return [nan if value is None else value for value in per_task or ()]
