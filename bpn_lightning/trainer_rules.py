"""Which Trainer flags a stream honours, and which contradict it.

One fit runs the whole stream, so a flag that cuts or repeats the stream would silently make another
experiment of it. ``docs/trainer_flags.md`` has the table.
"""

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import EarlyStopping, StochasticWeightAveraging
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy

from bpn_lightning.errors import ConfigurationError

__all__ = ["check_trainer"]


def check_trainer(trainer: Trainer, total_epochs: int) -> None:
    """Refuse, by name, every flag that contradicts the stream.

    Args:
        trainer: before its fit begins.
        total_epochs: of the stream.

    Raises:
        ConfigurationError: names the flag, its rule, its value and the remedy.
    """
    for broken, flag, value, rule, remedy in _rules(trainer, total_epochs):
        if broken:
            raise ConfigurationError(
                f"Expected trainer.{flag} to be {rule}, but got {value}. {remedy}"
            )


def _rules(trainer: Trainer, total: int) -> list[tuple[bool, str, object, str, str]]:
    """Whether a rule is broken, then flag, value, rule and remedy."""
    epochs = trainer.fit_loop.max_epochs
    refused = [
        type(callback).__name__
        for callback in trainer.callbacks  # type: ignore[attr-defined]
        if isinstance(callback, EarlyStopping | StochasticWeightAveraging)
    ]
    return [
        (
            bool(trainer.fast_dev_run),  # type: ignore[attr-defined]
            "fast_dev_run",
            trainer.fast_dev_run,  # type: ignore[attr-defined]
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
            bool(trainer.overfit_batches),  # type: ignore[attr-defined]
            "overfit_batches",
            trainer.overfit_batches,  # type: ignore[attr-defined]
            "0",
            "It would replace each task's test data by training data. Use limit_train_batches.",
        ),
        (
            bool(refused),
            "callbacks",
            ", ".join(refused),
            "without EarlyStopping and StochasticWeightAveraging, which act on the whole stream",
            "ContinualModule(patience=...) stops each task early on the validation split.",
        ),
        (
            not isinstance(trainer.strategy, SingleDeviceStrategy | DDPStrategy),
            "strategy",
            type(trainer.strategy).__name__,
            "'auto' or 'ddp'",
            "Sharded parameters cannot be penalised, biased or restored one by one.",
        ),
    ]
