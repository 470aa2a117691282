"""Console output of a run: progress bars during training, and a table of accuracies at the end."""

import time
from collections.abc import Mapping, Sequence
from math import isnan
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Column, Table
from rich.text import Text

from bpn_lightning.costs import Bytes
from bpn_lightning.metrics.accuracy_matrix import Summary
from bpn_lightning.metrics.settling import Unsettled
from bpn_lightning.run.gates import GATE_ACCURACIES, shared_bytes
from bpn_lightning.run.scenarios import scenario_text
from bpn_lightning.run.schema import FrontRecord, GateResults, Scenarios
from bpn_lightning.tasks import Task
from bpn_lightning.terminal import printable

__all__ = ["StreamProgress", "final_table", "gate_table"]

WIDE = 80  # columns from which the long form of the bars is used


class StreamProgress(ProgressBar):
    """A progress bar for the task and one for the stream, and a permanent line for each learned task.

    The bars show epoch and batch, the accuracy of the last logged training batch, the elapsed and the
    estimated remaining time of the stream, and the mean test accuracy of the learned tasks (ACC). If the
    output is not a terminal there are only the lines.

    Args:
        console: where to write; by default standard output.
    """

    def __init__(self, console: Console | None = None) -> None:
        super().__init__()
        self._console = console or Console()
        self._enabled = True
        self._bar: Progress | None = None
        self._last_shown = -1
        self._average: float | None = None  # over the tasks learned
        self._drawn = 0.0  # time of the last update of the bars
        self._begun, self._done_before = 0.0, 0.0  # start time, and epochs done by then

    def disable(self) -> None:
        """Show nothing: for processes other than the first."""
        self._enabled = False

    def enable(self) -> None:
        """Show progress again."""
        self._enabled = True

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Write a permanent line above the bars."""
        _line(self._console, *args, **kwargs)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the bars, after the tasks that a resumed run has finished."""
        self._last_shown = _host(pl_module).closed
        self._average = _host(pl_module).accuracy_matrix.summary()["average"]
        self._begun, self._done_before = time.monotonic(), float(trainer.current_epoch)
        if self._enabled and self._console.is_terminal and not self._console.is_dumb_terminal:
            self._bar = Progress(
                TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True)),
                BarColumn(bar_width=None, table_column=Column(ratio=1)),
                TextColumn(
                    "{task.fields[details]}", markup=False, table_column=Column(no_wrap=True)
                ),
                console=self._console,
                transient=True,
                expand=True,
            )
            for _ in range(2):
                self._bar.add_task("", total=None, details="")
            self._bar.start()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Update the bars, at most ten times per second."""
        if self._bar is None or time.monotonic() - self._drawn < 0.1:
            return
        self._drawn = time.monotonic()
        host = _host(pl_module)
        epoch, epochs = _epoch(pl_module)
        batch, batches = batch_idx + 1, int(self.total_train_batches)
        wide = self._console.width >= WIDE
        details = f"batch {batch:>{len(str(batches))}}/{batches}"
        accuracy = trainer.progress_bar_metrics.get("train/accuracy")
        if accuracy is not None:
            details += f", {'training accuracy' if wide else 'train'} {float(accuracy):.2f}"
        task, stream = (one.id for one in self._bar.tasks)
        self._bar.update(
            task,
            description=format_position(pl_module),
            total=epochs * batches,
            completed=epoch * batches + batch,
            details=details,
        )
        total, done = host.schedule.total, trainer.current_epoch + batch / batches
        passed = self._drawn - self._begun
        left = passed * (total - done) / (done - self._done_before)
        details = f"{_clock(passed)} elapsed, {_clock(left)} left"
        if wide and self._average is not None:
            details += f", ACC {self._average:.2f}"
        self._bar.update(
            stream,
            description=f"stream, epoch {trainer.current_epoch + 1}/{total}",
            total=total,
            completed=done,
            details=details,
        )

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show the task that the previous epoch finished."""
        self._show_learned(pl_module)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show the last task, and remove the bars."""
        self._show_learned(pl_module)
        self._stop()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Restore the terminal."""
        self._stop()

    def _stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _show_learned(self, pl_module: LightningModule) -> None:
        host = _host(pl_module)
        for task_id in range(self._last_shown + 1, host.closed + 1):
            if self._enabled:
                row = host.accuracy_matrix.accuracy[task_id + 1]
                self.print(format_task_line(host.tasks, task_id, row.tolist()))
            self._average = float(host.accuracy_matrix.accuracy[task_id + 1, : task_id + 1].mean())
        self._last_shown = host.closed


def _clock(seconds: float) -> str:
    """Format seconds as ``1:02:03``, or without hours as ``0:07``.

    >>> _clock(7.2), _clock(3723)
    ('0:07', '1:02:03')
    """
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


def format_position(module: LightningModule) -> str:
    """``task 2/5, epoch 3/4``, with the name of the phase unless it is ``train``."""
    host = _host(module)
    position, (epoch, epochs) = host.position, _epoch(module)
    phase = "" if position.phase == "train" else f" ({position.phase})"
    return f"task {position.task + 1}/{len(host.tasks)}, epoch {epoch + 1}/{epochs}{phase}"


def _epoch(module: LightningModule) -> tuple[int, int]:
    """The index of the epoch in the task, and the task's number of epochs, over all its phases."""
    host = _host(module)
    task = host.position.task
    first = host.schedule.last_epoch(task - 1) + 1 if task else 0
    return host.position.epoch, host.schedule.last_epoch(task) + 1 - first


def format_task_line(tasks: Sequence[Task], task_id: int, row: Sequence[float]) -> str:
    """One line about a task that was just learned.

    Args:
        tasks: of the stream.
        task_id: ID of the task.
        row: ``(tasks,)``, current test accuracies; NaN for tasks that were not measured, which are omitted.
    """
    seen = row[: task_id + 1]
    mean = sum(seen) / len(seen)
    line = f"task {task_id + 1}/{len(tasks)} ({tasks[task_id].name}) learned: {seen[-1]:.3f}"
    if task_id and not isnan(mean):
        line += f"; first task now {seen[0]:.3f}, mean of {len(seen)} tasks {mean:.3f}"
    return line


def final_table(
    console: Console,
    title: str,
    tasks: Sequence[Task],
    summary: Summary,
    bytes_per_task: Mapping[str, int | None],
    bytes_held: Bytes,
    folder: Path,
    unsettled: Sequence[Unsettled] = (),
    overtaken: Sequence[float | None] = (),
    scenarios: Scenarios | None = None,
) -> None:
    """Show a table with three accuracies per task, and the paths of the run's files.

    Args:
        console: the output.
        title: of the table.
        tasks: of the stream.
        summary: of the accuracy matrix.
        bytes_per_task: ``measured``, and by the ``paper``'s accounting.
        bytes_held: by all strategies at the end.
        folder: of the run.
        unsettled: tasks whose accuracy dropped in their last epoch.
        overtaken: fractions of the samples of each task that are answered with a class of a later one;
            empty where no core is frozen.
        scenarios: of the accuracies; None where they are not known.
    """
    given, alone = "task ID given", ""
    if scenarios is not None:
        given = scenario_text(scenarios["accuracy"])
        found = scenarios["accuracy_task_agnostic"]
        alone = f"{found['name']}, " if found else ""
    agnostic = summary["task_agnostic"]
    after = summary["after_learning"]
    table = Table(title=Text(printable(title)), title_justify="left", show_footer=True)
    table.add_column("task", footer="mean", justify="right", min_width=4)
    room = max(8, console.width - 56)  # without the numbers and the frame
    table.add_column("classes", no_wrap=True, max_width=min(32, room), overflow="ellipsis")
    for name, average in {
        "final": summary["average"],
        "just learned": after["average"],
        "final, no task ID": agnostic and agnostic["average"],
    }.items():
        table.add_column(name, footer=_fraction(average), justify="right", min_width=5)
    for index, task in enumerate(tasks):
        table.add_row(
            str(task.id + 1),
            Text(printable(task.name)),
            _fraction(summary["per_task"][index]),
            _fraction(after["per_task"][index]),
            _fraction(agnostic and agnostic["per_task"][index]),
        )
    console.print(table)
    console.print(
        f"final: after the last task, {given}; just learned: right after training on the task; "
        f"no task ID: {alone}the network has to infer the task",
        highlight=False,
    )
    for one in unsettled:
        _line(console, format_unsettled(one))
    for index, fraction in enumerate(overtaken):
        if fraction:
            _line(
                console,
                f"task {index + 1}: its logits are unchanged, but {fraction:.1%} of its test samples are "
                "answered with a class of a later task",
            )
    figures = {
        "ACC": summary["average"],
        "BWT": summary["bwt"],
        "FWT": summary["fwt"],
        "forgetting": summary["forgetting"],
        "first task": summary["first_task"],
    }
    stored = {name: bytes_per_task.get(name) for name in ("measured", "paper")}
    for line in (
        "  ".join(f"{name} {_fraction(value)}" for name, value in figures.items()),
        "bytes per task: "
        + ", ".join(
            f"{'-' if count is None else format(count, ',')} {name}"
            for name, count in (
                ("measured", stored["measured"]),
                ("by the paper's accounting", stored["paper"]),
            )
        ),
        (
            f"bytes held: {bytes_held.training:,} to continue training, "
            f"{bytes_held.inference:,} of them for inference"
        ),
    ):
        _line(console, line)
    for line in (f"results: {folder / 'results.json'}", f"pictures: {folder / 'figures'}"):
        _line(console, line, soft_wrap=True)  # do not break paths


def gate_table(
    console: Console,
    gates: Mapping[str, GateResults],
    front: FrontRecord | None,
    task_id_given: float | None,
) -> None:
    """Show a table with the accuracies of each gate, and the bytes that they need.

    Args:
        console: the output.
        gates: by name, as in results.json.
        front: the run's, if it has one.
        task_id_given: ACC of the modes with the task ID given.
    """
    table = Table(title="task ID not given", title_justify="left")
    for column in ("gate", *GATE_ACCURACIES.values(), "modes, task ID given"):
        table.add_column(column, justify="left" if column == "gate" else "right", min_width=4)
    for name, gate in gates.items():
        values: Mapping[str, Any] = gate
        averages = [values[key] and values[key]["average"] for key in GATE_ACCURACIES]
        given = task_id_given if gate["modes"] else None
        table.add_row(Text(printable(name)), *map(_fraction, (*averages, given)))
    console.print(table)
    for name, gate in gates.items():
        error = gate["calibration"] and gate["calibration"]["error"]
        _line(
            console,
            f"gate {name}: {gate['bytes_per_task']:,} bytes per task, {shared_bytes(gate):,} shared; "
            f"calibration error {_fraction(error)}",
        )
    if front is not None:
        _line(console, f"front {front['name']}: {front['bytes']:,} bytes shared")


def format_unsettled(one: Unsettled) -> str:
    """One line about a task that has not converged.

    >>> format_unsettled(Unsettled(2, "train", 0.981, 0.6))
    'task 3 has not converged: its training accuracy fell from 0.981 to 0.600 in its last epoch'
    """
    samples = "training" if one.split == "train" else "validation"
    return (
        f"task {one.task + 1} has not converged: its {samples} accuracy fell from {one.before:.3f} to "
        f"{one.after:.3f} in its last epoch"
    )


def _line(console: Console, *args: Any, soft_wrap: bool = False, **kwargs: Any) -> None:
    """Print one line, wrapped between words on a terminal only."""
    soft_wrap = soft_wrap or not console.is_terminal
    args = tuple(printable(one) if isinstance(one, str) else one for one in args)
    console.print(*args, soft_wrap=soft_wrap, highlight=False, markup=False, **kwargs)


def _fraction(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _host(module: LightningModule) -> Any:
    """The module as a ContinualModule, or as any module with tasks, schedule and accuracies."""
    return module
