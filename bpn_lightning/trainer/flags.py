"""Which flags of the Trainer are valid for a stream.

One fit runs the whole stream, so a flag that shortens or repeats it would silently change the experiment;
``docs/trainer_flags.md`` lists all flags.
"""

from collections.abc import Mapping
from typing import Any

from lightning.pytorch import Trainer

from bpn_lightning.trainer.launch import Rule, check_launch, refuse
from bpn_lightning.trainer.lightning import max_seconds, val_check_interval

__all__ = ["check_lengths", "check_trainer"]


def check_trainer(trainer: Trainer, total_epochs: int) -> None:
    """Refuse flags that are incompatible with the stream.

    Args:
        trainer: before its fit begins.
        total_epochs: number of epochs of the stream.

    Raises:
        ConfigurationError: names the flag, its rule, its value and the remedy.
    """
    refuse(_rules(trainer, total_epochs))
    check_launch(trainer)


def _rules(trainer: Trainer, total: int) -> list[Rule]:
    flags: Any = trainer  # Lightning sets most of them dynamically, invisible to type checkers
    epochs, several = trainer.max_epochs, trainer.accumulate_grad_batches
    clip, seconds = trainer.gradient_clip_val, max_seconds(trainer)
    every, within = trainer.check_val_every_n_epoch, val_check_interval(trainer)
    return [
        (
            bool(flags.fast_dev_run),
            "fast_dev_run",
            flags.fast_dev_run,
            "off",
            "It would end the stream inside its first task. Use epochs_per_task=1 for a short run.",
        ),
        (
            epochs not in (-1, total),
            "max_epochs",
            epochs,
            f"-1, the length of the stream ({total} epochs)",
            f"Pass max_epochs=-1 or {total} (unset, Lightning makes it 1000).",
        ),
        (
            (trainer.min_epochs or 0) > total,
            "min_epochs",
            trainer.min_epochs,
            f"at most the stream's {total} epochs",
            "The stream would end earlier. Leave it out, or increase epochs_per_task.",
        ),
        (
            trainer.max_steps == 0,
            "max_steps",
            0,
            "at least 1, or -1 for the whole stream",
            "Nothing would be learned. Leave it out.",
        ),
        (
            seconds is not None and seconds <= 0,
            "max_time",
            f"{seconds} seconds",
            "more than 0 seconds",
            "Nothing would be learned. Leave it out.",
        ),
        (
            bool(flags.overfit_batches),
            "overfit_batches",
            flags.overfit_batches,
            "0",
            "It would replace each task's test data by training data. Use limit_train_batches.",
        ),
        (
            flags.limit_train_batches == 0,
            "limit_train_batches",
            flags.limit_train_batches,
            "more than 0",
            "Nothing would be learned. Leave it out; trainer.test evaluates without training.",
        ),
        (
            not isinstance(several, int) or several < 1,
            "accumulate_grad_batches",
            several,
            "a whole number of at least 1",
            "1 updates after every batch.",
        ),
        (
            clip is not None and not clip >= 0,
            "gradient_clip_val",
            clip,
            "at least 0",
            "Lightning would clip nothing, or fail. Leave it out for no clipping.",
        ),
        (
            every is not None and every < 1,
            "check_val_every_n_epoch",
            every,
            "at least 1",
            "Use limit_val_batches=0 for no validation.",
        ),
        (
            isinstance(within, int) and within < 1,
            "val_check_interval",
            within,
            "at least 1 batch, a fraction of an epoch, or a time",
            "Use limit_val_batches=0 for no validation.",
        ),
        (
            flags.reload_dataloaders_every_n_epochs > 1,
            "reload_dataloaders_every_n_epochs",
            flags.reload_dataloaders_every_n_epochs,
            "0 or 1",
            "Every epoch needs its own loader. Leave it out.",
        ),
    ]


def check_lengths(
    trainer: Trainer, batches: Mapping[int, int], updates: int, validation_batches: int
) -> None:
    """Refuse limits that Lightning would detect only when a later task begins, or never.

    Args:
        trainer: before its fit begins.
        batches: number of batches per epoch, by task.
        updates: number of updates in the whole stream.
        validation_batches: of the first task to learn; 0 without a validation split.

    Raises:
        ConfigurationError: names the flag, the task and the remedy.
    """
    limit, least = trainer.limit_train_batches, trainer.min_steps or 0
    shortest = min(batches.values())
    task = next(task for task, number in batches.items() if number == shortest)
    within = val_check_interval(trainer)
    checks = trainer.limit_val_batches and trainer.check_val_every_n_epoch is not None
    refuse(
        [
            (
                shortest == 0,
                "limit_train_batches",
                f"{limit}, which leaves none",
                f"a number that leaves task {task} at least one batch",
                "Increase it, or lower batch_size.",
            ),
            (
                0 < validation_batches * trainer.limit_val_batches < 1,
                "limit_val_batches",
                f"{trainer.limit_val_batches}, which leaves none",
                f"0, or a number that leaves task {min(batches)} at least one batch",
                "Increase it, or lower eval_batch_size.",
            ),
            (
                least > updates,
                "min_steps",
                least,
                f"at most the stream's {updates} updates",
                "The stream would end earlier. Leave it out, or increase epochs_per_task.",
            ),
            (
                bool(checks) and isinstance(within, int) and within > shortest,
                "val_check_interval",
                within,
                f"at most the {shortest} batches of an epoch of task {task}",
                "Lower it, use a fraction, or check_val_every_n_epoch=null to count over epochs.",
            ),
        ]
    )
