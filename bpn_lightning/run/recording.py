"""Files written during training: metrics.csv, and the checkpoints for resuming.

A checkpoint stores the number of rows of metrics.csv, so a resumed run continues the file from there, and
ends with the same file as an uninterrupted run.
"""

import csv
import io
import os
import time
import warnings
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import count
from pathlib import Path
from typing import Any, Protocol, cast

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import SIGTERMException

from bpn_lightning.errors import ConfigurationError
from bpn_lightning.files.untrusted import read_text
from bpn_lightning.files.writing import flush, why_unreadable, write_atomically
from bpn_lightning.tasks import Task
from bpn_lightning.trainer.lightning import is_last_batch
from bpn_lightning.trainer.preemption import StopRequests

__all__ = ["Intervals", "LastCheckpoint", "MetricsFile"]


_MAX_BYTES = 2**30  # of metrics.csv, which has one row per logged step


class MetricsFile(Logger):
    """Logs to one CSV file, with one row per call, written immediately.

    Lightning's CSVLogger deletes an existing metrics.csv, so a resumed run would lose its earlier rows.

    Args:
        path: the file; an existing one is overwritten by the first row, unless :meth:`resume` was called.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        self.rows = 0
        self._columns: list[str] = []
        self._resumed: list[dict[str, Any]] = []  # rows that are still to be written here

    @property
    def name(self) -> str:
        """The file's name without its suffix."""
        return self.path.stem

    @property
    def version(self) -> str:
        """Empty: the file has no versions."""
        return ""

    @property
    def save_dir(self) -> str:
        """The folder of the run."""
        return str(self.path.parent)

    @rank_zero_only
    def log_hyperparams(
        self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any
    ) -> None:
        """Do nothing: they are in config.yaml."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Append a row; a new metric adds a column, which is empty in earlier rows."""
        row = {"step": step, **metrics}
        if set(row) <= set(self._columns):
            with self.path.open("a", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, self._columns, lineterminator="\n")
                if not file.tell():  # the file was removed
                    writer.writeheader()
                writer.writerow(row)
        else:
            earlier = self._resumed or (self._found(self.path, self.rows) if self.rows else [])
            self._write([*earlier, row])
        self.rows += 1

    @rank_zero_only
    def resume(self, rows: int, global_step: int, source: Path | None = None) -> None:
        """Keep the rows up to a checkpoint, and those of its steps that were logged after it.

        Lightning logs a step after the checkpoint of that step is taken, and does not log it again
        after resuming; the row number is the number of updates before it. Nothing is written until
        :meth:`begin`, or the next row. A file that cannot be read is moved to ``<name>.damaged``.

        Args:
            rows: number of rows of the file at the checkpoint.
            global_step: of the checkpoint.
            source: the file of the run that took it; by default this one.
        """
        found = self._found(source or self.path, rows)
        self._resumed = [
            row
            for index, row in enumerate(found)
            if index < rows or (row["step"] and int(row["step"]) < global_step)
        ]
        self.rows = len(self._resumed)

    def _found(self, source: Path, rows: int) -> list[dict[str, Any]]:
        """The rows of a file, with a warning if some are missing."""
        damaged = False
        try:
            found = _read(source)
        except (OSError, ValueError, KeyError, csv.Error) as error:
            found, damaged = [], True
            kept = _move_away(source) if source == self.path else source
            state = f"cannot be read ({why_unreadable(error)}) and is kept as {kept}"
        else:
            state = f"has {len(found)}" if source.is_file() else "does not exist"
        if damaged or len(found) < rows:
            warnings.warn(
                f"Expected {source} to have {rows} rows of metrics, but it {state}. {self.path} continues "
                f"with {'those' if found else 'new rows only'}; nothing else in the run depends on it.",
                stacklevel=3,
            )
        return found

    @rank_zero_only
    def begin(self) -> None:
        """Write the earlier rows of a resumed run, at the start of training."""
        if self._resumed:
            self._write(self._resumed)

    @rank_zero_only
    def flush(self) -> None:
        """Flush the rows to disk, so that a checkpoint never counts rows that are lost in a power failure."""
        if self.path.is_file():
            flush(self.path)

    def _write(self, rows: Sequence[Mapping[str, Any]]) -> None:
        used = {key for row in rows for key, value in row.items() if value not in (None, "")}
        self._columns = [
            *(k for k in ("step", "epoch") if k in used),
            *sorted(used - {"step", "epoch"}),
        ]
        text = io.StringIO()
        writer = csv.DictWriter(text, self._columns, lineterminator="\n", extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(self.path, text.getvalue().encode())
        self._resumed = []


def _read(path: Path) -> list[dict[str, Any]]:
    """The complete rows of a file.

    Raises:
        ValueError: it is not a table, or not text.
    """
    text = read_text(path, max_bytes=_MAX_BYTES) if path.is_file() else ""
    complete = text[: text.rfind("\n") + 1]  # a crash may have truncated the last line
    rows = list(csv.DictReader(io.StringIO(complete), strict=True))
    for line, row in enumerate(rows, start=2):
        if None in row or None in row.values():
            raise ValueError(f"line {line} does not have the columns of the first line")
        if row["step"] and not row["step"].isdecimal():
            raise ValueError(f"line {line} has no step")
    return rows


def _move_away(path: Path) -> Path:
    names = (f"{path.name}.damaged{number or ''}" for number in count())
    free = next(place for place in map(path.with_name, names) if not place.exists())
    path.replace(free)
    return free


@dataclass(frozen=True)
class Intervals:
    """Intervals between checkpoints; None disables one. There is always a checkpoint at the stream's end.

    Args:
        steps: updates between checkpoints within an epoch.
        epochs: epochs between checkpoints at the end of an epoch.
        tasks: tasks between checkpoints at the end of a task.
        minutes: minutes between checkpoints of any kind.

    Raises:
        ConfigurationError: a number is not positive, or a count is not a whole number.
    """

    steps: int | None = 500
    epochs: int | None = 1
    tasks: int | None = 1
    minutes: float | None = None

    def __post_init__(self) -> None:
        for unit in (field.name for field in fields(self)):
            value = getattr(self, unit)
            least = "more than 0" if unit == "minutes" else "at least 1"
            if value is not None and (value <= 0 if unit == "minutes" else value < 1):
                raise ConfigurationError(
                    f"Expected checkpoint_every_n_{unit} to be {least}, but got {value}. "
                    "null disables this interval."
                )


class _Learner(Protocol):
    """The required part of ContinualModule: its tasks, and the last closed one."""

    tasks: Sequence[Task]
    closed: int


class LastCheckpoint(Checkpoint):
    """Saves the run to one file, and keeps the previous checkpoint as ``previous.ckpt``.

    Lightning's ModelCheckpoint saves only at one kind of event, numbers a second ``last.ckpt``, and stores
    absolute paths.

    A checkpoint is taken after an update or after the module has finished an epoch, never between the
    batches of an update, whose gradients are not in checkpoints. Lightning logs such a step afterwards and
    would not do so again after resuming, so the checkpoint is named ``next.ckpt`` until training continues.

    Args:
        path: the checkpoint; written atomically.
        every: the intervals.
        run: the identity that a resumed run has to share: its names, and the keys of its configuration.
        metrics: the file whose position is saved in the checkpoint.
        resumed: the checkpoint that this run resumes.
        on_saved: called on the first process after each new checkpoint.
    """

    def __init__(
        self,
        path: Path,
        every: Intervals,
        run: Mapping[str, Any],
        metrics: MetricsFile | None = None,
        resumed: Path | None = None,
        on_saved: Callable[[], None] | None = None,
    ) -> None:
        super().__init__()
        self.path = path
        self.previous = path.with_name("previous.ckpt")
        self.every = every
        self.run = dict(run)
        self.metrics = metrics
        self.requests = StopRequests()
        self._next = path.with_name("next.ckpt")
        self._resumed = resumed
        self._on_saved = on_saved
        # Whether the existing checkpoint is intact and may become the previous one.
        self._intact = resumed is not None and path.exists() and path.samefile(resumed)
        self._trainer: Trainer | None = None
        self._step = 0  # number of updates at the last batch
        self._due = False
        self._stopping = False
        self._unpublished = False
        self._saved_at = time.monotonic()
        self._closed = -1  # last closed task at the last checkpoint

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Store the module whose progress is saved."""
        self._trainer = trainer

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Use the resumed checkpoint as the current one."""
        self._closed = _closed(pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Reset the counters, and start handling requests to stop."""
        self._step = trainer.global_step
        self._saved_at = time.monotonic()
        self.requests.listen(trainer)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Publish the pending checkpoint, since training continues."""
        self._publish(trainer)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any
    ) -> None:
        """Publish the pending checkpoint, since training continues."""
        self._publish(trainer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any
    ) -> None:
        """Save at the interval of updates, and after the last update of a run that ends early."""
        step = trainer.global_step
        if step == self._step:  # the update is not complete
            return
        self._step = step
        self._stopping = self.requests.agreed(trainer)
        steps = self.every.steps
        self._due = (
            self._due
            or self._stopping
            or (steps is not None and step % steps == 0)
            or step == trainer.max_steps
            or trainer.should_stop
            or self._late(trainer)
        )
        if self._due and not is_last_batch(trainer):  # the end of the epoch has its own checkpoint
            self._save(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save after the module's own hook, unless it stopped mid-epoch."""
        if not is_last_batch(trainer):
            return
        self._stopping = self.requests.agreed(trainer)
        epochs, tasks, closed = self.every.epochs, self.every.tasks, _closed(pl_module) + 1
        if (
            self._due
            or self._stopping
            or (epochs is not None and (trainer.current_epoch + 1) % epochs == 0)
            or (tasks is not None and closed > self._closed + 1 and closed % tasks == 0)
            or self._late(trainer)
        ):
            self._save(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Publish the pending checkpoint, since nothing more is logged."""
        self._publish(trainer, stop=False)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Save the end of the stream, unless there is a checkpoint of it."""
        complete = _closed(pl_module) + 1 == len(cast(_Learner, pl_module).tasks)
        if stage == "fit" and complete and self._closed != _closed(pl_module):
            self._save(trainer, pl_module)
            self._publish(trainer, stop=False)

    def _late(self, trainer: Trainer) -> bool:
        """Whether enough minutes have passed, on any process."""
        if self.every.minutes is None:
            return False
        late = time.monotonic() - self._saved_at >= 60 * self.every.minutes
        return bool(trainer.strategy.reduce_boolean_decision(late, all=False))

    def _save(self, trainer: Trainer, pl_module: LightningModule) -> None:
        trainer.save_checkpoint(self._next)
        self._due, self._unpublished = False, True
        self._saved_at, self._closed = time.monotonic(), _closed(pl_module)

    def _publish(self, trainer: Trainer, stop: bool = True) -> None:
        """Rename the checkpoint, keep the previous one, and stop the run if requested."""
        if not self._unpublished:
            return
        self._unpublished = False
        if trainer.is_global_zero:
            if self.metrics:
                self.metrics.flush()
            if self._intact:
                os.replace(self.path, self.previous)
            os.replace(self._next, self.path)
            flush(self.path.parent)
            self._intact = True
            if self._on_saved:
                self._on_saved()
        if stop and self._stopping:
            self.requests.answer(trainer)
            raise SIGTERMException

    def state_dict(self) -> dict[str, Any]:
        """The run, and the position in metrics.csv."""
        return {
            "run": dict(self.run),
            "rows": self.metrics.rows if self.metrics else 0,
            "global_step": self._trainer.global_step if self._trainer else 0,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue with the rows that metrics.csv had at the checkpoint, in its own run's folder."""
        if self.metrics:
            theirs = self._resumed and self._resumed.parent.parent / self.metrics.path.name
            source = theirs if theirs and theirs.is_file() else None
            if source and self.metrics.path.exists() and source.samefile(self.metrics.path):
                source = None
            self.metrics.resume(state_dict["rows"], state_dict["global_step"], source)


def _closed(pl_module: LightningModule) -> int:
    return cast(_Learner, pl_module).closed
