"""Callbacks of Lightning that are refused because they treat the whole stream as a single task.

``docs/trainer_flags.md`` lists all callbacks.
"""

from collections.abc import Mapping
from types import MappingProxyType

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import (
    BaseFinetuning,
    BatchSizeFinder,
    EarlyStopping,
    GradientAccumulationScheduler,
    LearningRateFinder,
    LearningRateMonitor,
    ModelCheckpoint,
    ModelPruning,
    SpikeDetection,
    StochasticWeightAveraging,
    WeightAveraging,
)

from bpn_lightning.errors import ConfigurationError
from bpn_lightning.trainer.lightning import callbacks_of

__all__ = ["REFUSED", "check_callbacks", "check_rate_monitor"]

#: Callbacks that are invalid over a stream, including subclasses: the reason and the alternative.
REFUSED: Mapping[type[Callback], tuple[str, str]] = MappingProxyType(
    {
        BaseFinetuning: (
            (
                "It edits the parameter groups of the first task's optimizer, and would set the learning rate "
                "of the whole network in those of later tasks."
            ),
            (
                "Freeze layers with requires_grad_(False), or use separate parameter groups in the function "
                "that creates the optimizer."
            ),
        ),
        BatchSizeFinder: (
            "It would train on the first task to try batch sizes before the stream begins.",
            "Set batch_size and eval_batch_size of the stream.",
        ),
        EarlyStopping: (
            "It would end the whole stream.",
            "ContinualModule(patience=...) stops each task early on its validation split.",
        ),
        GradientAccumulationScheduler: (
            (
                "It counts epochs over the whole stream, so that tasks would be trained with different batch "
                "sizes."
            ),
            "Use accumulate_grad_batches.",
        ),
        LearningRateFinder: (
            (
                "It would train on the first task to try rates before the stream begins, and its result "
                "would apply to that task's optimizer only."
            ),
            "Compare runs with several learning rates.",
        ),
        ModelPruning: (
            "It replaces the parameters that strategies refer to.",
            "Prune the network after training.",
        ),
        SpikeDetection: (
            "The loss jumps at the start of every task, which it would report as a spike.",
            "Monitor the logged train/loss.",
        ),
        StochasticWeightAveraging: (
            "It would average the weights of different tasks, and set the learning rate of the last.",
            "IncrementalMomentMatching merges the weights of tasks.",
        ),
        WeightAveraging: (
            (
                "It would average the weights of different tasks, and replace the weights that were "
                "evaluated and consolidated."
            ),
            "IncrementalMomentMatching merges the weights of tasks.",
        ),
    }
)

#: Prefixes of metrics of the current task, whose values are not comparable between tasks.
OF_OPEN_TASK = ("bias_norm/", "loss/", "memories/", "penalty/", "train/", "val/")


def check_callbacks(trainer: Trainer) -> None:
    """Refuse callbacks that treat the whole stream as a single task.

    Args:
        trainer: before its fit begins.

    Raises:
        ConfigurationError: names the callback, why it is refused, and the remedy.
    """
    for callback in callbacks_of(trainer):
        for kind, (why, remedy) in REFUSED.items():
            if isinstance(callback, kind):
                raise ConfigurationError(
                    f"Expected trainer.callbacks to be without {kind.__name__}, but got "
                    f"{type(callback).__name__}. {why} {remedy}"
                )
        monitor = callback.monitor if isinstance(callback, ModelCheckpoint) else None
        if monitor and monitor.startswith(OF_OPEN_TASK):
            raise ConfigurationError(
                f"Expected {type(callback).__name__} not to monitor a metric of the current task, but got "
                f"{monitor!r}. Its best model would be that of an easy or early task, which has not "
                "learned later ones. Leave monitor out: the newest checkpoint has learned most tasks."
            )


def check_rate_monitor(trainer: Trainer) -> None:
    """Refuse a LearningRateMonitor that would log the learning rate of the previous task.

    At the start of an epoch, callbacks are called before the module creates the next task's optimizer.

    Args:
        trainer: with the optimizer and scheduler of the first task.

    Raises:
        ConfigurationError: it logs by epoch, and a scheduler changes the rate.
    """
    schedulers = trainer.lr_scheduler_configs
    by_epoch = any(config.interval == "epoch" for config in schedulers)
    for callback in callbacks_of(trainer):
        if not isinstance(callback, LearningRateMonitor):
            continue
        interval = callback.logging_interval
        if schedulers and (interval == "epoch" or (interval is None and by_epoch)):
            raise ConfigurationError(
                "Expected LearningRateMonitor to have logging_interval 'step' with a scheduler, but got "
                f"{interval!r}. At an epoch's start it would log the last rate of the previous task. "
                "Pass logging_interval='step'."
            )
