"""Images, tables and artifacts in the trainer's loggers.

:class:`Dashboard` is an ordinary callback; a logger adapter per kind of logger shows images and tables.
Reproducible numbers are logged by the module itself, to all loggers. ``docs/wandb.md`` lists all keys.
"""

import io
import re
from collections.abc import Mapping, Sequence
from math import isnan
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from PIL import Image
from torch import Tensor

from bpn_lightning.files.writing import csv_text
from bpn_lightning.metrics.accuracy_matrix import AccuracyMatrix
from bpn_lightning.run.drawing import render
from bpn_lightning.run.figures import accuracy_curves, accuracy_heatmap
from bpn_lightning.run.provenance import collect_provenance
from bpn_lightning.run.recording import MetricsFile
from bpn_lightning.tasks import Task

__all__ = ["Dashboard", "LoggerAdapter", "adapter_of", "close_adapters", "upload_artifacts"]

Cell = str | float | int | None


class LoggerAdapter:
    """Shows images, tables and files in a logger; this base class ignores them.

    Args:
        logger: of the trainer.
    """

    #: Whether :meth:`image` is supported; otherwise images are not drawn.
    draws = False

    def __init__(self, logger: Logger) -> None:
        self.logger = logger

    @property
    def position(self) -> int:
        """The logger's current row number."""
        return 0

    def begin(self, config: Mapping[str, Any], resumed_at: int | None) -> None:
        """Log the configuration.

        Args:
            config: nested.
            resumed_at: :attr:`position` at the checkpoint; None in a new run.
        """
        self.logger.log_hyperparams(dict(config))

    def image(self, key: str, image: Image.Image, step: int) -> None:
        """Show an image."""

    def table(
        self, key: str, columns: Sequence[str], rows: Sequence[Sequence[Cell]], step: int
    ) -> None:
        """Show a table."""

    def files(self, name: str, kind: str, paths: Sequence[Path]) -> None:
        """Upload files."""

    def end(self, exit_code: int) -> None:
        """End the run."""


class WandbAdapter(LoggerAdapter):
    """Images, tables and artifacts of a Weights & Biases run."""

    draws = True
    logger: WandbLogger

    @property
    def position(self) -> int:
        """The next row's ``_step``."""
        return int(self.logger.experiment.step)

    def begin(self, config: Mapping[str, Any], resumed_at: int | None) -> None:
        """Log the configuration, define the axes of the metrics, and continue the row number."""
        super().begin(config, resumed_at)
        run = self.logger.experiment
        for prefix in OVER_TASKS:
            run.define_metric(f"{prefix}/*", step_metric="stream/tasks_learned")
        if resumed_at is not None and run.step < resumed_at:
            run.log({}, step=resumed_at)  # offline, the server cannot provide the row number

    def image(self, key: str, image: Image.Image, step: int) -> None:
        """In the media panel ``key``, with a slider over the stream."""
        self.logger.log_image(key, [image], step=step)

    def table(
        self, key: str, columns: Sequence[str], rows: Sequence[Sequence[Cell]], step: int
    ) -> None:
        """As a ``wandb.Table``."""
        self.logger.log_table(
            key, columns=list(columns), data=[list(row) for row in rows], step=step
        )

    def files(self, name: str, kind: str, paths: Sequence[Path]) -> None:
        """As an artifact."""
        import wandb

        artifact = wandb.Artifact(re.sub(r"[^\w.-]+", "-", f"{name}-{kind}"), type=kind)
        for path in paths:
            artifact.add_file(str(path))
        self.logger.experiment.log_artifact(artifact)

    def end(self, exit_code: int) -> None:
        """End the run, if there is one, now instead of at the exit of the process."""
        import wandb

        wandb.finish(exit_code=exit_code)


class TensorBoardAdapter(LoggerAdapter):
    """Images and, as text, tables of TensorBoard."""

    draws = True
    logger: TensorBoardLogger

    def image(self, key: str, image: Image.Image, step: int) -> None:
        """Under Images."""
        self.logger.experiment.add_image(key, np.asarray(image), step, dataformats="HWC")

    def table(
        self, key: str, columns: Sequence[str], rows: Sequence[Sequence[Cell]], step: int
    ) -> None:
        """Under Text, as Markdown."""
        lines = [list(columns), ["---"] * len(columns), *rows]
        text = "\n".join(f"| {' | '.join(map(_format_cell, line))} |" for line in lines)
        self.logger.experiment.add_text(key, text, step)


class MLFlowAdapter(LoggerAdapter):
    """Images, tables and files as artifacts of an MLflow run."""

    draws = True
    logger: MLFlowLogger

    def begin(self, config: Mapping[str, Any], resumed_at: int | None) -> None:
        """Log the configuration once, because parameters of MLflow cannot be changed."""
        if resumed_at is None:
            super().begin(config, resumed_at)

    def image(self, key: str, image: Image.Image, step: int) -> None:
        """With a slider over the stream."""
        self.logger.experiment.log_image(self.logger.run_id, image, key=key, step=step)

    def table(
        self, key: str, columns: Sequence[str], rows: Sequence[Sequence[Cell]], step: int
    ) -> None:
        """As a CSV file, which the web interface shows as a table."""
        text = csv_text([columns, *rows])
        self.logger.experiment.log_text(self.logger.run_id, text, f"{key}.csv")

    def files(self, name: str, kind: str, paths: Sequence[Path]) -> None:
        """In a folder named by their kind."""
        for path in paths:
            self.logger.experiment.log_artifact(self.logger.run_id, str(path), kind)


#: Prefixes of metrics per task: W&B plots them over the number of learned tasks.
OVER_TASKS = ("bytes_held", "bytes_per_task", "accuracy_after_learning", "accuracy_task_agnostic")

_ADAPTERS: dict[type[Logger], type[LoggerAdapter]] = {
    WandbLogger: WandbAdapter,
    TensorBoardLogger: TensorBoardAdapter,
    MLFlowLogger: MLFlowAdapter,
}


def adapter_of(logger: Logger) -> LoggerAdapter:
    """The adapter of a logger; other kinds of loggers show numbers only."""
    for kind, shown in _ADAPTERS.items():
        if isinstance(logger, kind):
            return shown(logger)
    return LoggerAdapter(logger)


class Dashboard(Callback):
    """Logs images, tables, the configuration and the time per step to the trainer's loggers.

    After each task the accuracy matrix and the accuracies over the stream are logged as images, at the end
    the matrix and the accuracies as tables. W&B, TensorBoard and MLflow show them; every logger gets the
    configuration, with git commit and versions, and the time per step. Only the first process is active.
    ``bpn-fit`` adds this callback automatically.

    Args:
        config: the configuration to log, nested, of JSON types.

    State:
        the last task shown; class, version and position of each logger, for resuming.

    >>> from lightning.pytorch import Trainer
    >>> trainer = Trainer(callbacks=[Dashboard({"experiment": "digits"})], logger=False)
    """

    def __init__(self, config: Mapping[str, Any] | None = None) -> None:
        self.config = dict(config or {})
        self._adapters: list[LoggerAdapter] = []
        self._shown = -1
        # Of each logger, by class and version, at the checkpoint.
        self._positions: dict[tuple[str, Any], int] = {}
        self._since: float | None = None  # start of the clock, if it is running
        self._seconds = 0.0  # accumulated before
        self._counted_from = 0  # updates

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the loggers, or continue them."""
        if not trainer.is_global_zero:
            return
        others = [logger for logger in trainer.loggers if not isinstance(logger, MetricsFile)]
        self._adapters = [adapter_of(logger) for logger in others]
        if not others:
            return
        found = collect_provenance(seconds=0)
        provenance = {key: found[key] for key in ("commit", "versions", "host")}
        config = {**self.config, "provenance": provenance}
        for shown in self._adapters:
            shown.begin(config, self._positions.get(_identity(shown.logger)))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Reset the clock."""
        self._since, self._seconds, self._counted_from = None, 0.0, trainer.global_step

    # --- after a task ----------------------------------------------------------------------------

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Show the tasks learned before resuming inside an epoch; start the clock."""
        self._show_learned(trainer, pl_module)
        if self._since is None:
            self._since = perf_counter()

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show the task that the previous epoch finished."""
        self._show_learned(trainer, pl_module)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Show the last task and the tables, after the module's on_fit_end, which may close the task."""
        if stage != "fit" or not self._adapters:
            return
        self._show_learned(trainer, pl_module)
        matrix: AccuracyMatrix = pl_module.accuracy_matrix  # type: ignore[assignment]
        for key, (columns, rows) in _tables(matrix, pl_module.tasks).items():  # type: ignore[arg-type]
            for shown in self._adapters:
                shown.table(key, columns, rows, trainer.global_step)

    def _show_learned(self, trainer: Trainer, pl_module: LightningModule) -> None:
        host: Any = pl_module
        if host.closed == self._shown:
            return
        first, self._shown = self._shown + 1, host.closed
        displays = [shown for shown in self._adapters if shown.draws]
        for task_id in range(first, host.closed + 1) if displays else ():
            for key, image in _pictures(host, task_id).items():
                for shown in displays:
                    shown.image(key, image, trainer.global_step)

    # --- the time of a step ----------------------------------------------------------------------

    # Mean wall time over many batches: a step does not synchronize with the device, but over many steps
    # the host cannot run far ahead. The time between epochs is excluded.

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log the mean time per update since the last logged one."""
        step, every = trainer.global_step, trainer.log_every_n_steps  # type: ignore[attr-defined]
        if not self._adapters or not every or step % every or step == self._counted_from:
            return
        self._stop_clock()
        self._since = perf_counter()
        seconds = self._seconds / (step - self._counted_from)
        self._seconds, self._counted_from = 0.0, step
        for shown in self._adapters:
            shown.logger.log_metrics({"time/step": seconds}, step=step - 1)  # as Lightning counts

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock between epochs."""
        self._stop_clock()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock during validation."""
        self._stop_clock()

    def _stop_clock(self) -> None:
        if self._since is not None:
            self._seconds += perf_counter() - self._since
            self._since = None

    # --- checkpoints -----------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The last task shown, and the positions of the loggers."""
        loggers = [(*_identity(one.logger), one.position) for one in self._adapters]
        return {"shown": self._shown, "loggers": loggers}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from there."""
        self._shown = state_dict["shown"]
        self._positions = {(kind, at): position for kind, at, position in state_dict["loggers"]}


def upload_artifacts(
    loggers: Sequence[Logger], name: str, results: Sequence[Path], last: Path
) -> None:
    """Upload a run's results, and its checkpoint if there is one, to the loggers that store files.

    Args:
        loggers: of the trainer.
        name: of the run.
        results: files.
        last: the checkpoint.
    """
    for adapter in map(adapter_of, loggers):
        adapter.files(name, "results", results)
        if last.is_file():
            adapter.files(name, "checkpoint", [last])


def close_adapters(loggers: Sequence[Logger], exit_code: int) -> None:
    """End the run in the loggers that require it."""
    for logger in loggers:
        adapter_of(logger).end(exit_code)


def _identity(logger: Logger) -> tuple[str, Any]:
    return type(logger).__name__, logger.version


def _pictures(host: Any, task_id: int) -> dict[str, Image.Image]:
    """The images after a task."""
    matrix: Tensor = host.accuracy_matrix.accuracy.clone()
    matrix[task_id + 2 :] = torch.nan
    curve = [point for point in host.curve if point["task"] <= task_id]
    figures = {
        "figures/accuracy_matrix": accuracy_heatmap(matrix),
        "figures/accuracy_over_stream": accuracy_curves(matrix, curve=curve),
    }
    return {
        key: Image.open(io.BytesIO(render(figure, "png"))).convert("RGB")
        for key, figure in figures.items()
    }


def _tables(
    matrix: AccuracyMatrix, tasks: Sequence[Task]
) -> dict[str, tuple[list[str], list[list[Cell]]]]:
    """Columns and rows of the matrix, and of the three accuracies per task."""
    moments: list[list[Cell]] = [
        [moment, *(None if isnan(value) else value for value in row)]
        for moment, row in enumerate(matrix.accuracy.tolist())
        if not all(map(isnan, row))
    ]
    summary = matrix.summary()
    blind = summary["task_agnostic"]
    accuracies: list[list[Cell]] = [
        [
            task.id + 1,
            task.name,
            summary["per_task"][index],
            blind["per_task"][index] if blind else None,
            summary["after_learning"]["per_task"][index],
        ]
        for index, task in enumerate(tasks)
    ]
    names = [f"task_{task.id + 1}" for task in tasks]
    return {
        "tables/accuracy_matrix": (["after_task", *names], moments),
        "tables/accuracy": (
            ["task", "classes", "accuracy", "accuracy_task_agnostic", "accuracy_after_learning"],
            accuracies,
        ),
    }


def _format_cell(cell: Cell) -> str:
    if isinstance(cell, float):
        return f"{cell:.4f}"
    return "" if cell is None else str(cell).replace("|", "\\|")
