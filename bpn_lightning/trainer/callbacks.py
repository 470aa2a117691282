"""Lightning's callbacks over a stream: which act on the whole of it as on one task, and are refused.

``docs/trainer_flags.md`` has the table of all of them.
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

__all__ = ["REFUSED", "check_callbacks", "check_rate_monitor"]

#: Callbacks that cannot be right over a stream, with the classes derived from them: why, and what instead.
REFUSED: Mapping[type[Callback], tuple[str, str]] = MappingProxyType(
    {
        BaseFinetuning: (
            (
                "It edits the groups of the first task's optimizer, and would set the whole network's "
                "learning rate in those of later tasks."
            ),
            (
                "Freeze layers with requires_grad_(False), or give them groups of their own in the function "
                "that makes the optimizer."
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
                "It counts the epochs of the stream, so that tasks would be learned by updates of different "
                "sizes."
            ),
            "Use accumulate_grad_batches.",
        ),
        LearningRateFinder: (
            (
                "It would train on the first task to try rates before the stream begins, and what it finds "
                "would end with that task's optimizer."
            ),
            "Compare runs with several learning rates.",
        ),
        ModelPruning: (
            "It puts other parameters in the place of those that strategies hold.",
            "Prune the network that was learned.",
        ),
        SpikeDetection: (
            "The loss jumps whenever a task begins, which it would take for a fault.",
            "Watch the logged train/loss.",
        ),
        StochasticWeightAveraging: (
            "It would average the weights of different tasks, and set the learning rate of the last.",
            "IncrementalMomentMatching merges the weights of tasks.",
        ),
        WeightAveraging: (
            (
                "It would average the weights of different tasks, and put the average in the place of what "
                "was evaluated and consolidated."
            ),
            "IncrementalMomentMatching merges the weights of tasks.",
        ),
    }
)

#: Of what is logged while a task is learned: no two tasks' values can be compared.
OF_OPEN_TASK = ("bias_norm/", "loss/", "memories/", "penalty/", "train/", "val/")


def check_callbacks(trainer: Trainer) -> None:
    """Refuse, by name, callbacks that act on the whole stream as if it were one task.

    Args:
        trainer: before its fit begins.

    Raises:
        ConfigurationError: names the callback, why it is refused, and the remedy.
    """
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        for kind, (why, remedy) in REFUSED.items():
            if isinstance(callback, kind):
                raise ConfigurationError(
                    f"Expected trainer.callbacks to be without {kind.__name__}, but got "
                    f"{type(callback).__name__}. {why} {remedy}"
                )
        monitor = callback.monitor if isinstance(callback, ModelCheckpoint) else None
        if monitor and monitor.startswith(OF_OPEN_TASK):
            raise ConfigurationError(
                f"Expected {type(callback).__name__} to monitor nothing that is measured on the task "
                f"being learned, but got {monitor!r}. The best model by it is one of an easy or an early "
                "task, and knows no later one. Leave monitor out: the newest checkpoint knows most tasks."
            )


def check_rate_monitor(trainer: Trainer) -> None:
    """Refuse a LearningRateMonitor that would log the rate of the task before.

    An epoch's start reaches callbacks before the module, which then makes the next task's optimizer.

    Args:
        trainer: with the optimizer and scheduler of the first task.

    Raises:
        ConfigurationError: it logs by epoch, and a scheduler changes the rate.
    """
    schedulers = trainer.lr_scheduler_configs
    by_epoch = any(config.interval == "epoch" for config in schedulers)
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if not isinstance(callback, LearningRateMonitor):
            continue
        interval = callback.logging_interval
        if schedulers and (interval == "epoch" or (interval is None and by_epoch)):
            raise ConfigurationError(
                "Expected LearningRateMonitor to have logging_interval 'step' with a scheduler, but got "
                f"{interval!r}. At an epoch's start it would read the last rate of the task before. "
                "Pass logging_interval='step'."
            )
