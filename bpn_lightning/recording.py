"""What a run leaves behind while it trains: metrics.csv and the checkpoint that it resumes from.

The two belong together. A checkpoint knows how many rows metrics.csv had, so a resumed run goes on
writing where the checkpoint was taken and ends with the file of a run that was never stopped.
"""

import csv
import io
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_only

from bpn_lightning.files import write_atomically

__all__ = ["LastCheckpoint", "MetricsFile"]


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
                csv.DictWriter(file, self._columns, lineterminator="\n").writerow(row)
        else:
            self._write([*(self._read() if self.rows else []), row])
        self.rows += 1

    @rank_zero_only
    def resume(self, rows: int, global_step: int) -> None:
        """Keep what a checkpoint has behind it: its first rows, and what those steps still logged.

        Lightning logs a step after the checkpoint of that step is taken and does not log it again
        after a resume; it numbers the row by the updates before it.
        """
        kept = [
            row
            for index, row in enumerate(self._read())
            if index < rows or int(row["step"]) < global_step
        ]
        self.rows = len(kept)
        if kept:
            self._write(kept)

    def _read(self) -> list[dict[str, Any]]:
        text = self.path.read_text(encoding="utf-8") if self.path.is_file() else ""
        whole = text[: text.rfind("\n") + 1]  # a crash may have cut the last line
        return list(csv.DictReader(io.StringIO(whole)))

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


class LastCheckpoint(Checkpoint):
    """Saves the run at the end of every epoch and every few updates, always to the same file.

    Lightning's ModelCheckpoint keeps to one of the two moments, numbers a second ``last.ckpt``, and
    stores absolute paths.

    Args:
        path: of the checkpoint; written whole or not at all.
        every_n_steps: updates between checkpoints inside an epoch.
        run: what a resumed run must have in common with the one that saved.
        metrics: the file whose position is saved along.
    """

    def __init__(
        self,
        path: Path,
        every_n_steps: int,
        run: Mapping[str, str | int],
        metrics: MetricsFile | None = None,
    ) -> None:
        super().__init__()
        self.path = path
        self.every_n_steps = every_n_steps
        self.run = dict(run)
        self.metrics = metrics
        self._trainer: Trainer | None = None
        self._saved: tuple[int, int] | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Remember whose progress the state tells."""
        self._trainer = trainer

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any
    ) -> None:
        """Save every few updates, and at the last one of a run that max_steps ends."""
        step = trainer.global_step
        due = step % self.every_n_steps == 0 or step == trainer.max_steps
        saved = self._saved is not None and self._saved[0] == step  # while batches accumulate
        if due and not saved:
            self._save(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save after the module's own hook, unless the epoch was cut short."""
        progress = trainer.fit_loop.epoch_loop.batch_progress
        if progress.is_last_batch or progress.current.ready >= trainer.num_training_batches:
            self._save(trainer, pl_module)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save a last task that was only closed after its last epoch."""
        if self._saved is not None and self._saved[1] != _closed(pl_module):
            self._save(trainer, pl_module)

    def _save(self, trainer: Trainer, pl_module: LightningModule) -> None:
        trainer.save_checkpoint(self.path)
        self._saved = (trainer.global_step, _closed(pl_module))

    def state_dict(self) -> dict[str, Any]:
        """The run, and how far metrics.csv had come."""
        return {
            "run": dict(self.run),
            "rows": self.metrics.rows if self.metrics else 0,
            "global_step": self._trainer.global_step if self._trainer else 0,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Cut metrics.csv back to the checkpoint."""
        if self.metrics:
            self.metrics.resume(state_dict["rows"], state_dict["global_step"])


def _closed(pl_module: LightningModule) -> int:
    closed: int = getattr(pl_module, "closed", 0)
    return closed
