"""What may run together: the Trainer's flags, the stream, the strategies.

One fit runs the whole stream, so a flag that cuts or repeats the stream would silently make another
experiment of it; ``docs/trainer_flags.md`` has the table. Strategies say what they are
(``projects``, ``needs_task_id``, ...), and what cannot be right together is refused before training.
"""

import warnings
from collections import Counter
from collections.abc import Iterable, Sequence

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import EarlyStopping, StochasticWeightAveraging
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy

from bpn_lightning.errors import ConfigurationError, ExpectedForgettingWarning
from bpn_lightning.strategies.base import ContinualStrategy
from bpn_lightning.tasks import ContinualHost, ContinualStream, Schedule

__all__ = ["check_composition", "check_phases", "check_trainer"]


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


def check_composition(host: ContinualHost, strategies: Sequence[ContinualStrategy]) -> None:
    """Refuse strategies that contradict each other or the stream, by what they declare.

    Raises:
        ConfigurationError: names them, the rule and the remedy.
    """
    keys = Counter(strategy.state_key for strategy in strategies)
    twice = [type(s).__name__ for s in strategies if keys[s.state_key] > 1]
    if twice:
        raise ConfigurationError(
            f"Expected every strategy once, but got {twice[0]} {len(twice)} times. "
            "Remove all but one."
        )
    alone = _names(s for s in strategies if s.exclusive)
    if alone and len(strategies) > 1:
        raise ConfigurationError(
            f"Expected {alone[0]} to be the only strategy, but got {' and '.join(_names(strategies))}. "
            f"Remove {alone[0]}, or all the others."
        )
    for what, several in (
        ("projects gradients", _names(s for s in strategies if s.projects)),
        ("merges weights", _names(s for s in strategies if _overrides(s, "merged_weights"))),
    ):
        if len(several) > 1:
            raise ConfigurationError(
                f"Expected at most one strategy that {what}, but got {' and '.join(several)}. "
                "Remove all but one."
            )
    projecting = _names(s for s in strategies if s.projects)
    correcting = _names(s for s in strategies if s.corrects_weights)
    if projecting and correcting:
        raise ConfigurationError(
            f"Expected no strategy to move weights after the step beside {projecting[0]}, which makes "
            f"sure of the step's direction, but got {correcting[0]} with update 'proximal'. "
            "Set its update to 'clamped' or 'gradient'."
        )
    needing = _names(s for s in strategies if s.needs_task_id)
    if not host.stream.task_id_at_test and (needing or host.mask == "task"):
        raise ConfigurationError(
            "Expected no need of the task's id at test in a stream with task_id_at_test=False, but "
            f"{' and '.join(needing) or 'mask=' + repr(host.mask)} answers in the mode of a task. "
            "Set task_id_at_test to True, or choose another method."
        )
    _warn_of_forgetting(host, strategies)


def _warn_of_forgetting(host: ContinualHost, strategies: Sequence[ContinualStrategy]) -> None:
    number = len(host.tasks)
    single_head = host.mask in ("all", "seen") and number > 1
    if single_head and any(s.regulariser for s in strategies):
        if not all(s.regulariser for s in strategies):
            return
        warnings.warn(
            f"{' and '.join(_names(strategies))} with one head over the classes of all tasks and no "
            f"task id is expected to forget all but the last task, and to end near 1/{number} = "
            f"{1 / number:.2f} of accuracy. mask='task' or --method bd+... use the task's id.",
            ExpectedForgettingWarning,
            stacklevel=2,
        )


def check_phases(schedule: Schedule, stream: ContinualStream) -> None:
    """Refuse a schedule whose phases cannot be told apart or have no updates.

    Raises:
        ConfigurationError: names the phase, the rule and the remedy.
    """
    for task, phases in enumerate(schedule.phases):
        names = Counter(phase.name for phase in phases)
        for phase in phases:
            if names[phase.name] > 1:
                raise ConfigurationError(
                    f"Expected the phases of a task to have names of their own, but task {task} has "
                    f"{phase.name!r} {names[phase.name]} times. Remove one of the strategies."
                )
            if phase.epochs < 1:
                raise ConfigurationError(
                    f"Expected every phase to have at least 1 epoch, but {phase.name!r} of task {task} "
                    f"has {phase.epochs}. Leave the phase out, or give it epochs."
                )
            if phase.trains == "strategy" and stream.reset_optimizer == "never":
                raise ConfigurationError(
                    "Expected reset_optimizer to be 'always' where a phase has an optimizer of its own, "
                    f"as {phase.name!r} of task {task} has, but got 'never'. "
                    "Set it to 'always'."
                )


def _names(strategies: Iterable[ContinualStrategy]) -> list[str]:
    return [type(strategy).__name__ for strategy in strategies]


def _overrides(strategy: ContinualStrategy, hook: str) -> bool:
    return getattr(type(strategy), hook) is not getattr(ContinualStrategy, hook)
