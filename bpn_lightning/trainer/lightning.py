"""All access to undocumented internals of Lightning.

All other files use only Lightning's public interface, which ``tests/trainer/test_lightning.py`` checks. Each
function states the version in which the internal was seen and why no public interface is sufficient. None
has a default for a missing name: if a name disappears, the function's own test fails first, with an
AttributeError.
"""

import copy
import sys
from collections.abc import Callable, Mapping
from typing import Any

from lightning.fabric.plugins import ClusterEnvironment
from lightning.fabric.plugins.precision.amp import _optimizer_handles_unscaling
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import Timer
from lightning.pytorch.plugins import LayerSync, MixedPrecision
from lightning.pytorch.strategies import DDPStrategy, ParallelStrategy
from lightning.pytorch.strategies.launchers.multiprocessing import _MultiProcessingLauncher
from lightning.pytorch.utilities import rank_zero_only
from torch.nn import Module
from torch.optim import Optimizer

__all__ = [
    "HookNameAsPlainAttribute",
    "UnwrappedDDPStrategy",
    "batches_processed",
    "callbacks_of",
    "cluster_environment",
    "datamodule_of",
    "ddp_communication_hook",
    "ddp_options",
    "dump_checkpoint",
    "grad_scaler",
    "handles_unscaling",
    "is_attached",
    "is_compiled",
    "is_first_process",
    "is_last_batch",
    "layer_sync",
    "mark_epoch_finished",
    "mark_epoch_not_started",
    "mark_epoch_unfinished",
    "max_seconds",
    "model_averaging_period",
    "progress_in_update",
    "reload_train_loader_every_epoch",
    "resume_from_memory",
    "set_epochs_done",
    "set_max_epochs",
    "start_method",
    "start_next_epoch",
    "stopped_mid_epoch",
    "val_check_interval",
    "wrap_again",
]


# --- the loops -----------------------------------------------------------------------------------


def set_max_epochs(trainer: Trainer, epochs: int) -> None:
    """Set the number of epochs of the fit, also during the fit.

    Seen in 2.6.6: ``Trainer.max_epochs`` reads ``fit_loop.max_epochs`` and has no setter; the loop reads it
    before every epoch.
    """
    trainer.fit_loop.max_epochs = epochs


def set_epochs_done(trainer: Trainer, epochs: int) -> None:
    """Let a fit begin after so many epochs, none of which it has trained.

    Seen in 2.6.6: ``Trainer.current_epoch`` reads what the loop has processed, and has no setter; a fit that
    resumes nothing leaves that as it is.

    Args:
        trainer: in ``setup`` of a fit.
        epochs: of the stream.
    """
    progress = trainer.fit_loop.epoch_progress
    counts = dict.fromkeys(progress.current.state_dict(), epochs)
    progress.load_state_dict({"total": dict(counts), "current": dict(counts)})


def reload_train_loader_every_epoch(trainer: Trainer) -> None:
    """Request a new train loader from the datamodule before every epoch.

    Seen in 2.6.6: the flag is read before every epoch, but can be set only by the constructor.
    """
    trainer.reload_dataloaders_every_n_epochs = 1  # type: ignore[attr-defined]


def batches_processed(trainer: Trainer) -> int:
    """The number of batches of this epoch used in training so far.

    Seen in 2.6.6: a loader's own count would include prefetched batches; and in ``on_train_epoch_start``
    the count is still that of the epoch before.
    """
    epoch: Any = trainer.fit_loop.epoch_progress.current
    batches: Any = trainer.fit_loop.epoch_loop.batch_progress.current
    return 0 if epoch.started < epoch.ready else int(batches.processed)


def is_last_batch(trainer: Trainer) -> bool:
    """Whether the current batch is the last one of the epoch, or all are done.

    Seen in 2.6.6: hooks get only a batch's index, and ``is_last_batch`` is set by a fetcher that may not
    know a loader's length; the number of batches is always known.
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
    """The position of the fit within an update.

    Seen in 2.6.6: only ``started`` being ahead of ``processed`` shows that a step raised an error.

    Returns:
        The number of batches processed in the update, and their total; None between two updates.
    """
    progress = trainer.fit_loop.epoch_loop.batch_progress
    current: Any = progress.current
    done, needed = current.processed, trainer.accumulate_grad_batches
    last = progress.is_last_batch or done == trainer.num_training_batches
    between = done % needed == 0 or (last and done == current.ready)
    if between and current.started == done:  # else a step may be half done
        return None
    return done % needed, needed


def start_next_epoch(trainer: Trainer) -> None:
    """When resuming after the last batch of an epoch, start the next epoch normally.

    Seen in 2.6.6: Lightning already has the next epoch's loader, and compares the old count of batches with
    its length; and it treats the next epoch as started, so that the epoch would have no start hooks, would
    not be counted, and would write checkpoints with inconsistent counts.

    Args:
        trainer: in ``on_train_start``.
    """
    loop = trainer.fit_loop
    batches = loop.epoch_loop.batch_progress
    if loop.epoch_loop.restarted_on_train_batch_end and batches.is_last_batch:
        batches.current.completed = sys.maxsize
        loop.reset_restart_stage()  # the stage of the epoch loop only, not of the batch loop


def mark_epoch_unfinished(checkpoint: dict[str, Any]) -> None:
    """Mark a checkpoint's current epoch as unfinished, so that it is resumed.

    Seen in 2.6.6: an epoch that ``stopped_mid_epoch`` is counted as done, and a resumed run would skip its
    remaining batches. No effect on a checkpoint of an epoch that continues.

    Args:
        checkpoint: being saved; weights-only checkpoints have no loops and are not changed.
    """
    if "loops" not in checkpoint:
        return
    for part in ("current", "total"):
        saved = checkpoint["loops"]["fit_loop"]["epoch_progress"][part]
        saved["processed"] = saved["completed"] = saved["ready"] - 1


def mark_epoch_not_started(checkpoint: dict[str, Any]) -> None:
    """Mark that no batch of the epoch is done, in a checkpoint saved in ``on_train_epoch_start``.

    Seen in 2.6.6: the counts are still those of the epoch before, and a resumed run would skip batches. No
    effect on a checkpoint saved at any other time.

    Args:
        checkpoint: being saved; weights-only checkpoints have no loops and are not changed.
    """
    if "loops" not in checkpoint:
        return
    loop = checkpoint["loops"]["fit_loop"]
    epoch, batches = loop["epoch_progress"]["current"], loop["epoch_loop.batch_progress"]
    if epoch["started"] < epoch["ready"]:
        batches["current"] = dict.fromkeys(batches["current"], 0)
        batches["is_last_batch"] = False


def mark_epoch_finished(checkpoint: dict[str, Any]) -> None:
    """Mark a checkpoint's last epoch as finished, so that the next one begins.

    Seen in 2.6.6: for a checkpoint saved in ``on_train_epoch_end``, whose epoch is not completed, a resumed
    run asks for that epoch's train loader; and if the trainer has ``max_steps``, the next epoch's loader and
    its count of batches go on where those of the finished epoch were.

    Args:
        checkpoint: being loaded, with loops, whose entry is replaced.
    """
    loop = copy.deepcopy(checkpoint["loops"]["fit_loop"])
    for counts in loop["epoch_progress"].values():
        counts["completed"] = counts["processed"]
    batches = loop["epoch_loop.batch_progress"]
    batches["current"] = dict.fromkeys(batches["current"], 0)
    batches["is_last_batch"] = False
    loop["state_dict"] = {}  # of the loader
    checkpoint["loops"] = {**checkpoint["loops"], "fit_loop": loop}


def dump_checkpoint(trainer: Trainer) -> dict[str, Any]:
    """What ``trainer.save_checkpoint`` would write, in memory; its tensors are those of the run.

    Seen in 2.6.6: ``save_checkpoint`` writes files only.
    """
    checkpoint: dict[str, Any] = trainer._checkpoint_connector.dump_checkpoint(weights_only=False)
    return checkpoint


def resume_from_memory(trainer: Trainer, checkpoint: dict[str, Any]) -> None:
    """Have a fit resume a checkpoint as if it had been loaded from ``ckpt_path``.

    Seen in 2.6.6: the connector restores what it has loaded, after the ``setup`` hooks; without a path
    it loads nothing itself.

    Args:
        trainer: in ``setup`` of a fit without ``ckpt_path``.
        checkpoint: whose entries may be replaced.
    """
    trainer._checkpoint_connector._loaded_checkpoint = checkpoint


# --- flags ---------------------------------------------------------------------------------------


def max_seconds(trainer: Trainer) -> float | None:
    """The shortest time limit of the Timer callbacks, which implement ``max_time``; None without one.

    Seen in 2.6.6: ``Timer.time_remaining`` is a float only if there is a limit, and needs a stage.
    """
    timers = [c for c in callbacks_of(trainer) if isinstance(c, Timer)]
    limits = [timer._duration for timer in timers]
    return min((limit for limit in limits if limit is not None), default=None)


def val_check_interval(trainer: Trainer) -> int | float | None:
    """Batches, or a fraction of an epoch; None if it is a time.

    Seen in 2.6.6: the trainer has no attribute ``val_check_interval`` if it is a time.
    """
    flags: Any = trainer  # Lightning sets them dynamically, invisible to type checkers
    return None if flags._val_check_time_interval is not None else flags.val_check_interval


def callbacks_of(trainer: Trainer) -> list[Callback]:
    """The trainer's callbacks, in the order in which they are called.

    Seen in 2.6.6: the trainer's callback connector sets them, invisible to type checkers.
    """
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return callbacks


def datamodule_of(trainer: Trainer) -> LightningDataModule | None:
    """The datamodule passed to the trainer.

    Seen in 2.6.6: the trainer's data connector sets it, invisible to type checkers.
    """
    datamodule: LightningDataModule | None = trainer.datamodule  # type: ignore[attr-defined]
    return datamodule


# --- processes -----------------------------------------------------------------------------------


def is_first_process() -> bool:
    """Whether this process has global rank 0, also before a trainer is created.

    Seen in 2.6.6: Lightning keeps the rank as an attribute of ``rank_zero_only``, set at import from the
    environment variables of torchrun, SLURM or Lightning's own launcher.
    """
    rank: int = rank_zero_only.rank  # type: ignore[attr-defined]
    return rank == 0


def cluster_environment(trainer: Trainer) -> ClusterEnvironment | None:
    """The cluster environment, such as SLURM's, also with a single device.

    Seen in 2.6.6: ``trainer.strategy.cluster_environment`` exists only with several devices.
    """
    environment: ClusterEnvironment | None = trainer._accelerator_connector.cluster_environment
    return environment


def start_method(trainer: Trainer) -> str | None:
    """The multiprocessing start method that Lightning would use, such as ``"fork"``; None if none.

    Seen in 2.6.6: ``strategy.launcher`` is public, its classes and their arguments are not.
    """
    launcher = trainer.strategy.launcher
    return launcher._start_method if isinstance(launcher, _MultiProcessingLauncher) else None


def model_averaging_period(trainer: Trainer) -> int | None:
    """The value of ``DDPStrategy(model_averaging_period=...)``; None without it.

    Seen in 2.6.6: the strategy stores its arguments in private attributes.
    """
    strategy = trainer.strategy
    return strategy._model_averaging_period if isinstance(strategy, DDPStrategy) else None


def ddp_communication_hook(trainer: Trainer) -> Callable[..., Any] | None:
    """The value of ``DDPStrategy(ddp_comm_hook=...)``; None without it.

    Seen in 2.6.6: the strategy stores its arguments in private attributes.
    """
    strategy = trainer.strategy
    return strategy._ddp_comm_hook if isinstance(strategy, DDPStrategy) else None


def ddp_options(trainer: Trainer) -> Mapping[str, Any]:
    """The options that a DDPStrategy passes to torch's DistributedDataParallel; empty without one.

    Seen in 2.6.6: the strategy stores its arguments in private attributes.
    """
    strategy = trainer.strategy
    return strategy._ddp_kwargs if isinstance(strategy, DDPStrategy) else {}


def wrap_again(trainer: Trainer) -> None:
    """Wrap the module again by DistributedDataParallel, which waits for the gradients of parameters that train.

    Does nothing with a single process. Seen in 2.6.6: the module is wrapped once, before training, and
    ``configure_ddp`` wraps ``strategy.model``.
    """
    strategy = trainer.strategy
    if isinstance(strategy, DDPStrategy):
        strategy.model = strategy.lightning_module  # its hooks on gradients go with the wrapper
        strategy.configure_ddp()


class UnwrappedDDPStrategy(DDPStrategy):
    """What a DDPStrategy does for processes, with the module left as it is: nothing reduces its gradients.

    Seen in 2.6.6: ``setup`` wraps the module for a fit, and else sends the first process's weights to all,
    neither of which can be where weights are sharded. The setup of all other strategies does the rest.
    """

    def setup(self, trainer: Trainer) -> None:
        """Move the module to the device, and make optimizers."""
        ParallelStrategy.setup(self, trainer)

    def _setup_model(self, model: Module) -> Module:  # type: ignore[override]
        return model

    def configure_ddp(self) -> None:
        """Do nothing."""


def layer_sync(trainer: Trainer) -> LayerSync | None:
    """The plugin that synchronizes batch normalization, as set by ``sync_batchnorm=True``, or None.

    Seen in 2.6.6: the flag becomes a private attribute of strategies for several devices.
    """
    strategy = trainer.strategy
    return strategy._layer_sync if isinstance(strategy, ParallelStrategy) else None


# --- precision -----------------------------------------------------------------------------------


def grad_scaler(trainer: Trainer) -> Any:
    """The GradScaler of 16-mixed precision, None without one.

    Seen in 2.6.6: of the supported precision plugins, only MixedPrecision has a scaler.
    """
    plugin = trainer.precision_plugin
    return plugin.scaler if isinstance(plugin, MixedPrecision) else None


def handles_unscaling(optimizer: Optimizer) -> bool:
    """Whether an optimizer unscales gradients in its own step, as fused ones do.

    Seen in 2.6.6, which checks the same before it clips gradients: torch has no public name for it.
    """
    return _optimizer_handles_unscaling(optimizer)


# --- the module ----------------------------------------------------------------------------------


def is_attached(module: LightningModule) -> bool:
    """Whether a module has a trainer.

    Seen in 2.6.6: ``module.trainer`` raises an error if there is none.
    """
    return module._trainer is not None


def is_compiled(module: LightningModule) -> bool:
    """Whether the module was compiled by ``torch.compile`` before it was passed to the trainer.

    Seen in 2.6.6: Lightning unwraps the module and keeps the compiler's context.
    """
    return module._compiler_ctx is not None


class HookNameAsPlainAttribute(LightningModule):
    """A module on which Lightning can set the name of the running hook at low cost.

    Seen in 2.6.6: it does so more than forty times per update, and ``nn.Module`` checks each time whether
    the value is a parameter, a module or a buffer.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute; the name of the running hook bypasses ``nn.Module``."""
        if name == "_current_fx_name":
            self.__dict__[name] = value
        else:
            super().__setattr__(name, value)
