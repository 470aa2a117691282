"""Which strategies can be combined, on which stream, and with which Trainer.

Strategies declare their properties (``projects``, ``needs_task_id``, ...); invalid combinations are refused
before training.
"""

import warnings
from collections import Counter
from collections.abc import Iterable, Sequence

from lightning.pytorch import Trainer

from bpn_lightning.errors import ConfigurationError, ExpectedForgettingWarning
from bpn_lightning.host import ContinualHost
from bpn_lightning.strategies.base import ContinualStrategy
from bpn_lightning.tasks import ContinualStream, Schedule
from bpn_lightning.trainer.lightning import ddp_options

__all__ = ["check_composition", "check_phases", "check_precision"]


def check_composition(host: ContinualHost, strategies: Sequence[ContinualStrategy]) -> None:
    """Refuse strategies that are incompatible with each other or with the stream.

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
    exclusive = _names(s for s in strategies if s.exclusive)
    if exclusive and len(strategies) > 1:
        raise ConfigurationError(
            f"Expected {exclusive[0]} to be the only strategy, but got {' and '.join(_names(strategies))}. "
            f"Remove {exclusive[0]}, or all the others."
        )
    for what, several in (
        ("projects gradients", _names(s for s in strategies if s.projects)),
        *(
            (what, _names(s for s in strategies if _overrides(s, hook)))
            for what, hook in (
                ("merges weights", "merged_weights"),
                ("draws from a memory for each batch", "training_batch"),
                ("replaces the loss", "task_losses"),
            )
        ),
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
            f"Expected no strategy to change weights after the step with {projecting[0]}, which constrains "
            f"the step's direction, but got {correcting[0]} with update 'proximal'. "
            "Set its update to 'clamped' or 'gradient'."
        )
    if len(correcting) > 1:
        raise ConfigurationError(
            "Expected at most one strategy to change shared weights after the step, as each would undo part "
            f"of the other's, but got {' and '.join(correcting)} with update 'proximal'. "
            "Set the update of all but one to 'clamped' or 'gradient'."
        )
    needing = _names(s for s in strategies if s.needs_task_id)
    if not host.stream.task_id_at_inference and (needing or host.network.mask == "task"):
        raise ConfigurationError(
            f"{' and '.join(needing) or 'mask=' + repr(host.network.mask)} needs the task ID at inference, but the "
            "stream has task_id_at_inference=False. Set it to True, or choose another method."
        )
    _warn_of_forgetting(host, strategies)
    _warn_of_single_classes(host)


def _warn_of_forgetting(host: ContinualHost, strategies: Sequence[ContinualStrategy]) -> None:
    number = len(host.network.tasks)
    single_head = host.network.mask in ("all", "seen") and number > 1
    if single_head and any(s.regularizer for s in strategies):
        if not all(s.regularizer for s in strategies):
            return
        warnings.warn(
            f"{' and '.join(_names(strategies))} with one head over the classes of all tasks and no "
            f"task ID is expected to forget all but the last task, with a final accuracy near 1/{number} = "
            f"{1 / number:.2f}. mask='task' or --method bd+... use the task ID.",
            ExpectedForgettingWarning,
            stacklevel=2,
        )


def _warn_of_single_classes(host: ContinualHost) -> None:
    """With a single active class, every prediction is correct."""
    one = [
        task.name
        for task in host.network.tasks
        if (task.num_classes if host.network.mask == "task" else host.stream.num_classes) == 1
    ]
    if one:
        remedy = "mask='all' or 'seen' choose among the classes of several tasks"
        if host.network.mask != "task":
            remedy = "Add classes"
        warnings.warn(
            f"With mask={host.network.mask!r}, {len(one)} of {len(host.network.tasks)} tasks, such as {one[0]!r}, have one "
            f"class to choose from: their loss is always 0 and their accuracy always 1.0, which is "
            f"meaningless. {remedy}, or give each task two or more classes.",
            stacklevel=2,
        )


def check_precision(trainer: Trainer, strategies: Sequence[ContinualStrategy]) -> None:
    """Refuse weights in half precision with strategies that accumulate small numbers.

    Raises:
        ConfigurationError: names the strategies and the remedy.
    """
    measuring = _names(s for s in strategies if s.needs_full_precision)
    if measuring and trainer.precision in ("bf16-true", "16-true"):
        raise ConfigurationError(
            f"Expected trainer.precision to keep weights in full precision with "
            f"{' and '.join(measuring)}, but got {trainer.precision}: sums of small numbers would be "
            f"lost. Use {trainer.precision.replace('true', 'mixed')}."
        )


def check_phases(schedule: Schedule, stream: ContinualStream, trainer: Trainer) -> None:
    """Refuse a schedule with duplicate or empty phases, or phases that the trainer does not support.

    Raises:
        ConfigurationError: names the phase, the rule and the remedy.
    """
    for task, phases in enumerate(schedule.phases):
        names = Counter(phase.name for phase in phases)
        for phase in phases:
            if names[phase.name] > 1:
                raise ConfigurationError(
                    f"Expected the phases of a task to have unique names, but task {task} has "
                    f"{phase.name!r} {names[phase.name]} times. Remove one of the strategies."
                )
            if phase.epochs < 1:
                raise ConfigurationError(
                    f"Expected every phase to have at least 1 epoch, but {phase.name!r} of task {task} "
                    f"has {phase.epochs}. Leave the phase out, or give it epochs."
                )
            if phase.trains == "strategy" and stream.reset_optimizer == "never":
                raise ConfigurationError(
                    "Expected reset_optimizer to be 'always' when a phase has a separate optimizer, "
                    f"such as {phase.name!r} of task {task}, but got 'never'. "
                    "Set it to 'always'."
                )
            if (
                phase.trains == "strategy"
                and trainer.accumulate_grad_batches > 1
                and ddp_options(trainer).get("find_unused_parameters")
            ):
                raise ConfigurationError(
                    "Expected trainer.strategy to be without find_unused_parameters when gradients "
                    f"accumulate and a phase trains a strategy, such as {phase.name!r} of task {task}: "
                    "torch would mark every parameter as unused twice. Use 'ddp'."
                )


def _names(strategies: Iterable[ContinualStrategy]) -> list[str]:
    return [type(strategy).__name__ for strategy in strategies]


def _overrides(strategy: ContinualStrategy, hook: str) -> bool:
    return getattr(type(strategy), hook) is not getattr(ContinualStrategy, hook)
