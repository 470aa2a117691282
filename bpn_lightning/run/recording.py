"""What a run leaves behind while it trains: metrics.csv and the checkpoints that it resumes from.

They belong together. A checkpoint knows how many rows metrics.csv had, so a resumed run continues
writing where the checkpoint was taken and ends with the file of a run that was never stopped.
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
from bpn_lightning.files import flush, why_unreadable, write_atomically
from bpn_lightning.tasks import Task
from bpn_lightning.trainer.lightning import is_last_batch
from bpn_lightning.trainer.preemption import StopRequests
from bpn_lightning.untrusted import read_text

__all__ = ["Intervals", "LastCheckpoint", "MetricsFile"]


_MAX_BYTES = 2**30  # of metrics.csv, which has a row for every logged step


class MetricsFile(Logger):
    """Logs to one CSV file, a row per call, each on disk at once.

    Lightning's CSVLogger deletes an earlier metrics.csv, so a resumed run would lose its beginning.

    Args:
        path: of the file; one from an earlier run is overwritten by the first row, unless
            :meth:`resume` was called.
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
        """There is one version: the file."""
        return ""

    @property
    def save_dir(self) -> str:
        """The folder of the run."""
        return str(self.path.parent)

    @rank_zero_only
    def log_hyperparams(
        self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any
    ) -> None:
        """Nothing: config.yaml has them."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Append a row; a metric that is new gets a column, empty in the rows before."""
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
        """Keep what a checkpoint has behind it: its first rows, and what those steps still logged.

        Lightning logs a step after the checkpoint of that step is taken and does not log it again
        after a resume; it numbers the row by the updates before it. Nothing is written until
        :meth:`begin`, or the next row. A file that is no such table is moved to ``<name>.damaged``.

        Args:
            rows: that the file had when the checkpoint was taken.
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
        """The rows of a file, with a warning if they are fewer than they should be."""
        damaged = False
        try:
            found = _read(source)
        except (OSError, ValueError, KeyError, csv.Error) as error:
            found, damaged = [], True
            kept = _move_away(source) if source == self.path else source
            state = f"cannot be read ({why_unreadable(error)}) and is kept as {kept}"
        else:
            state = f"has {len(found)}" if source.is_file() else "is not there"
        if damaged or len(found) < rows:
            warnings.warn(
                f"Expected {source} to have {rows} rows of metrics, but it {state}. {self.path} continues "
                f"with {'those' if found else 'what comes now'}; nothing else of the run depends on it.",
                stacklevel=3,
            )
        return found

    @rank_zero_only
    def begin(self) -> None:
        """Write the rows that a resumed run has behind it: training is about to begin."""
        if self._resumed:
            self._write(self._resumed)

    @rank_zero_only
    def flush(self) -> None:
        """Let the rows reach the disk: no checkpoint may know of rows that a power cut took."""
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
        ValueError: it is no table, or no text.
    """
    text = read_text(path, max_bytes=_MAX_BYTES) if path.is_file() else ""
    complete = text[: text.rfind("\n") + 1]  # a crash may have cut the last line
    rows = list(csv.DictReader(io.StringIO(complete), strict=True))
    for line, row in enumerate(rows, start=2):
        if None in row or None in row.values():
            raise ValueError(f"line {line} has other columns than the first")
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
    """When checkpoints are taken; None: not by this measure. A stream's end has one anyway.

    Args:
        steps: updates between checkpoints inside an epoch.
        epochs: epochs between checkpoints at an epoch's end.
        tasks: tasks between checkpoints at a task's end.
        minutes: minutes between checkpoints, whatever their reason.

    Raises:
        ConfigurationError: a number is not above 0, or no whole one where things are counted.
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
                    "null takes no checkpoints by this measure."
                )


class _Learner(Protocol):
    """What is asked of a ContinualModule: its tasks, and the last one that is closed."""

    tasks: Sequence[Task]
    closed: int


class LastCheckpoint(Checkpoint):
    """Saves the run to one file, and keeps the one before it next to it as ``previous.ckpt``.

    Lightning's ModelCheckpoint keeps to one moment, numbers a second ``last.ckpt``, and stores absolute
    paths.

    A checkpoint is taken after an update or after the module has finished an epoch, never between the
    batches of one update, whose gradients no checkpoint holds. Lightning logs such a step afterwards and
    would not do so again after a resume, so the checkpoint is ``next.ckpt`` until training continues.

    Args:
        path: of the checkpoint; written atomically.
        every: when it is written.
        run: what a resumed run must have in common with the one that saved: its names, and the keys
            of its configuration.
        metrics: the file whose position is saved along.
        resumed: the checkpoint that this run resumes.
        on_saved: is called on the first process when there is a new checkpoint.
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
        # What is there is intact, so that it may become the previous one.
        self._intact = resumed is not None and path.exists() and path.samefile(resumed)
        self._trainer: Trainer | None = None
        self._step = 0  # updates when a batch was last seen
        self._due = False
        self._stopping = False
        self._unpublished = False
        self._saved_at = time.monotonic()
        self._closed = -1  # tasks closed when it was last saved

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Remember whose progress to save."""
        self._trainer = trainer

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A resumed run has a checkpoint of what it begins with."""
        self._closed = _closed(pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count from here, and listen for requests to stop."""
        self._step = trainer.global_step
        self._saved_at = time.monotonic()
        self.requests.listen(trainer)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Training continues."""
        self._publish(trainer)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any
    ) -> None:
        """Training continues."""
        self._publish(trainer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any
    ) -> None:
        """Save after every few updates, and at the last one of a run that ends early."""
        step = trainer.global_step
        if step == self._step:  # the batches of an update are not complete
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
        if self._due and not is_last_batch(trainer):  # after which the epoch's end is near
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
        """No more is logged."""
        self._publish(trainer, stop=False)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Save the end of a stream that has no checkpoint of it."""
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
        """Give the checkpoint its name, keep the one before it, and stop if that was asked for."""
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
