"""The door to Lightning: all that is read from, or written to, what Lightning does not document.

Everything else in this project keeps to Lightning's public interface; ``tests/trainer/test_lightning.py``
reads all other files for that. Each function says in which version it was seen and why nothing public does.
None has a default for what is not there: a name that vanishes is an AttributeError, in the test of its
function first.
"""

import sys
from collections.abc import Callable, Mapping
from typing import Any

from lightning.fabric.plugins import ClusterEnvironment
from lightning.fabric.plugins.precision.amp import _optimizer_handles_unscaling
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import Timer
from lightning.pytorch.plugins import LayerSync, MixedPrecision
from lightning.pytorch.strategies import DDPStrategy, ParallelStrategy
from lightning.pytorch.strategies.launchers.multiprocessing import _MultiProcessingLauncher
from lightning.pytorch.utilities import rank_zero_only
from torch.optim import Optimizer

__all__ = [
    "HookNameAsPlainAttribute",
    "batches_processed",
    "cluster_environment",
    "datamodule_of",
    "ddp_communication_hook",
    "ddp_options",
    "grad_scaler",
    "handles_unscaling",
    "is_attached",
    "is_compiled",
    "is_first_process",
    "is_last_batch",
    "layer_sync",
    "mark_epoch_unfinished",
    "max_seconds",
    "model_averaging_period",
    "progress_in_update",
    "reload_train_loader_every_epoch",
    "set_max_epochs",
    "start_method",
    "start_next_epoch",
    "stopped_mid_epoch",
    "val_check_interval",
]


# --- the loops -----------------------------------------------------------------------------------


def set_max_epochs(trainer: Trainer, epochs: int) -> None:
    """Set after how many epochs the fit ends, also while it runs.

    Seen in 2.6.6: ``Trainer.max_epochs`` reads ``fit_loop.max_epochs`` and has no setter; the loop asks it
    before every epoch.
    """
    trainer.fit_loop.max_epochs = epochs


def reload_train_loader_every_epoch(trainer: Trainer) -> None:
    """Have the datamodule asked for a train loader before every epoch.

    Seen in 2.6.6: the flag is read before every epoch, and can be set by the constructor only.
    """
    trainer.reload_dataloaders_every_n_epochs = 1  # type: ignore[attr-defined]


def batches_processed(trainer: Trainer) -> int:
    """How many batches of this epoch are trained on.

    Seen in 2.6.6: a loader's own count of what it gave out would include batches that were fetched ahead.
    """
    current: Any = trainer.fit_loop.epoch_loop.batch_progress.current
    return int(current.processed)


def is_last_batch(trainer: Trainer) -> bool:
    """Whether the epoch has had all its batches, or has the last one now.

    Seen in 2.6.6: hooks are given a batch's index alone, and ``is_last_batch`` is set by a fetcher that may
    not know a loader's length; the count of batches is known in every case.
    """
    progress = trainer.fit_loop.epoch_loop.batch_progress
    return progress.is_last_batch or progress.current.ready >= trainer.num_training_batches


def stopped_mid_epoch(trainer: Trainer) -> bool:
    """Whether max_steps, max_time or should_stop ended the epoch before its last batch.

    Seen in 2.6.6: ``on_train_epoch_end`` and ``on_train_end`` are called for such an epoch too.
    """
    progress = trainer.fit_loop.epoch_loop.batch_progress
    return progress.current.ready > 0 and not progress.is_last_batch


def progress_in_update(trainer: Trainer) -> tuple[int, int] | None:
    """Where inside an update the fit is.

    Seen in 2.6.6: a step that raised leaves ``started`` ahead of ``processed``, and nothing else shows it.

    Returns:
        How many of how many batches the update has had; None between two updates.
    """
    progress = trainer.fit_loop.epoch_loop.batch_progress
    current: Any = progress.current
    done, needed = current.processed, trainer.accumulate_grad_batches
    last = progress.is_last_batch or done == trainer.num_training_batches
    between = done % needed == 0 or (last and done == current.ready)
    if between and current.started == done:  # else half of a step may be done
        return None
    return done % needed, needed


def start_next_epoch(trainer: Trainer) -> None:
    """Where a run resumes from an epoch's last batch, let the next epoch start like any other.

    Seen in 2.6.6: Lightning has the next epoch's loader by then, and compares the old count of batches with
    its length; and it takes the next epoch for one that has begun, so that this one would have no start,
    be counted nowhere, and leave checkpoints of its own whose counts contradict each other.

    Args:
        trainer: in ``on_train_start``.
    """
    loop = trainer.fit_loop
    batches = loop.epoch_loop.batch_progress
    if loop.epoch_loop.restarted_on_train_batch_end and batches.is_last_batch:
        batches.current.completed = sys.maxsize
        loop.reset_restart_stage()  # the stage of the epochs; that of the batches stays


def mark_epoch_unfinished(checkpoint: dict[str, Any]) -> None:
    """Let a checkpoint's newest epoch be one to resume inside of.

    Seen in 2.6.6: an epoch that ``stopped_mid_epoch`` is counted as done, and a resumed run would lose its
    rest. In a checkpoint of an epoch that continues, this changes nothing.

    Args:
        checkpoint: while it is saved; one of weights alone has no loops, and stays as it is.
    """
    if "loops" not in checkpoint:
        return
    for part in ("current", "total"):
        saved = checkpoint["loops"]["fit_loop"]["epoch_progress"][part]
        saved["processed"] = saved["completed"] = saved["ready"] - 1


# --- flags ---------------------------------------------------------------------------------------


def max_seconds(trainer: Trainer) -> float | None:
    """The shortest time of a Timer, which is what ``max_time`` becomes; None without one.

    Seen in 2.6.6: ``Timer.time_remaining`` is a float only where there is a limit, and needs a stage.
    """
    timers = [c for c in trainer.callbacks if isinstance(c, Timer)]  # type: ignore[attr-defined]
    limits = [timer._duration for timer in timers]
    return min((limit for limit in limits if limit is not None), default=None)


def val_check_interval(trainer: Trainer) -> int | float | None:
    """Batches, or a fraction of an epoch; None where it is a time.

    Seen in 2.6.6: the trainer has no ``val_check_interval`` at all where it is a time.
    """
    flags: Any = trainer  # Lightning sets them elsewhere, unseen by type checkers
    return None if flags._val_check_time_interval is not None else flags.val_check_interval


def datamodule_of(trainer: Trainer) -> LightningDataModule | None:
    """The datamodule that the trainer was given.

    Seen in 2.6.6: the trainer's data connector sets it, unseen by type checkers.
    """
    datamodule: LightningDataModule | None = trainer.datamodule  # type: ignore[attr-defined]
    return datamodule


# --- processes -----------------------------------------------------------------------------------


def is_first_process() -> bool:
    """Whether this process is the first of all, also before a trainer is made.

    Seen in 2.6.6: Lightning keeps the rank as an attribute of ``rank_zero_only``, set at import from what
    torchrun, SLURM or Lightning's own launcher left in the environment.
    """
    rank: int = rank_zero_only.rank  # type: ignore[attr-defined]
    return rank == 0


def cluster_environment(trainer: Trainer) -> ClusterEnvironment | None:
    """SLURM's or another environment, on one device too.

    Seen in 2.6.6: ``trainer.strategy.cluster_environment`` is there on several devices only.
    """
    environment: ClusterEnvironment | None = trainer._accelerator_connector.cluster_environment
    return environment


def start_method(trainer: Trainer) -> str | None:
    """How Lightning would start processes by multiprocessing, such as ``"fork"``; None if it would not.

    Seen in 2.6.6: ``strategy.launcher`` is public, its classes and what they were given are not.
    """
    launcher = trainer.strategy.launcher
    return launcher._start_method if isinstance(launcher, _MultiProcessingLauncher) else None


def model_averaging_period(trainer: Trainer) -> int | None:
    """Of ``DDPStrategy(model_averaging_period=...)``; None without it.

    Seen in 2.6.6: the strategy keeps what it was given in private attributes.
    """
    strategy = trainer.strategy
    return strategy._model_averaging_period if isinstance(strategy, DDPStrategy) else None


def ddp_communication_hook(trainer: Trainer) -> Callable[..., Any] | None:
    """Of ``DDPStrategy(ddp_comm_hook=...)``; None without it.

    Seen in 2.6.6: the strategy keeps what it was given in private attributes.
    """
    strategy = trainer.strategy
    return strategy._ddp_comm_hook if isinstance(strategy, DDPStrategy) else None


def ddp_options(trainer: Trainer) -> Mapping[str, Any]:
    """What a DDPStrategy passes on to torch's DistributedDataParallel; empty without one.

    Seen in 2.6.6: the strategy keeps what it was given in private attributes.
    """
    strategy = trainer.strategy
    return strategy._ddp_kwargs if isinstance(strategy, DDPStrategy) else {}


def layer_sync(trainer: Trainer) -> LayerSync | None:
    """What makes layers normalize over all processes' samples, such as ``sync_batchnorm=True`` does; or None.

    Seen in 2.6.6: the flag becomes a private attribute of strategies for several devices.
    """
    strategy = trainer.strategy
    return strategy._layer_sync if isinstance(strategy, ParallelStrategy) else None


# --- precision -----------------------------------------------------------------------------------


def grad_scaler(trainer: Trainer) -> Any:
    """The GradScaler of 16-mixed precision, None without one.

    Seen in 2.6.6: of the precision plugins that a stream may have, MixedPrecision alone has a scaler.
    """
    plugin = trainer.precision_plugin
    return plugin.scaler if isinstance(plugin, MixedPrecision) else None


def handles_unscaling(optimizer: Optimizer) -> bool:
    """Whether an optimizer takes off the loss scale in its own step, as fused ones do.

    Seen in 2.6.6, which asks the same before it clips gradients: torch has no public name for it.
    """
    return _optimizer_handles_unscaling(optimizer)


# --- the module ----------------------------------------------------------------------------------


def is_attached(module: LightningModule) -> bool:
    """Whether a module has a trainer.

    Seen in 2.6.6: ``module.trainer`` raises where there is none.
    """
    return module._trainer is not None


def is_compiled(module: LightningModule) -> bool:
    """Whether the module was passed through ``torch.compile`` before the trainer got it.

    Seen in 2.6.6: Lightning unwraps what it is given and keeps the compiler's context.
    """
    return module._compiler_ctx is not None


class HookNameAsPlainAttribute(LightningModule):
    """A module on which Lightning may note the running hook's name at no cost.

    Seen in 2.6.6: it does so forty-odd times per update, and ``nn.Module`` looks each time whether the name
    is a parameter, a module or a buffer.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute; the name of the running hook is no parameter."""
        if name == "_current_fx_name":
            self.__dict__[name] = value
        else:
            super().__setattr__(name, value)
