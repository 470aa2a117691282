"""Learning rate schedulers over one task: their length, and the metric of a plateau scheduler."""

import sys
from collections.abc import Callable
from inspect import Parameter, signature
from typing import Any, Literal

from lightning.pytorch.utilities.types import LRSchedulerConfigType
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, OneCycleLR, ReduceLROnPlateau

from bpn_lightning.errors import ConfigurationError

__all__ = [
    "LENGTHS",
    "MONITORS",
    "build_scheduler",
    "open_lengths",
    "plateau_monitor",
    "scheduler_config",
]

#: The arguments of schedulers for the number of steps.
LENGTHS = ("num_steps", "total_steps", "T_max", "total_iters")

#: Values that count as unset: no default, or None.
UNSET = (Parameter.empty, None)

MONITORS = ("val/loss", "train/loss")


def open_lengths(make: Callable[..., LRScheduler]) -> list[str]:
    """The arguments of a scheduler that are set to the number of its steps."""
    given = {name: parameter.default for name, parameter in signature(make).parameters.items()}
    given |= getattr(make, "keywords", {})  # of a partial, as created from a config
    # OneCycleLR accepts epochs and steps_per_epoch instead of total_steps.
    own = given.get("epochs") is not None and given.get("steps_per_epoch") is not None
    return [
        name
        for name in LENGTHS
        if name in given and (given[name] == -1 or (not own and given[name] in UNSET))
    ]


def build_scheduler(
    make: Callable[..., LRScheduler], optimizer: Optimizer, steps: int, longest: int
) -> LRScheduler:
    """Create a scheduler for a number of steps.

    An argument named ``num_steps``, ``total_steps``, ``T_max`` or ``total_iters`` that has no value, not
    even a default, or is -1, is set to this number.

    Args:
        make: called with the optimizer.
        optimizer: the optimizer whose learning rate it sets.
        steps: the maximum number of steps until the optimizer is replaced.
        longest: the same for the longest task or phase.

    Raises:
        ConfigurationError: the scheduler refuses its arguments, or is too short.

    >>> import torch
    >>> from functools import partial
    >>> optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    >>> cosine = torch.optim.lr_scheduler.CosineAnnealingLR
    >>> [build_scheduler(f, optimizer, 40, 40).T_max for f in (cosine, partial(cosine, T_max=9))]
    [40, 9]
    """
    try:
        made = make(optimizer, **dict.fromkeys(open_lengths(make), steps))
    except (TypeError, ValueError) as error:
        raise ConfigurationError(
            f"Expected scheduler to take the optimizer and its arguments, but it raised "
            f"{type(error).__name__}: {error}. Correct that argument."
        ) from error
    if isinstance(made, OneCycleLR) and made.total_steps < longest:
        raise ConfigurationError(
            f"Expected total_steps of OneCycleLR to be at least the {longest} steps of a task, but got "
            f"{made.total_steps}. Leave it out to use a cycle of the length of each task."
        )
    return made


def plateau_monitor(
    scheduler: ReduceLROnPlateau,
    wanted: str | None,
    has_validation: bool,
    reset_optimizer: Literal["always", "never"],
) -> str:
    """The loss of the current task that a plateau scheduler monitors.

    The configured one, or the ``monitor`` of Lightning's class; by default the validation loss if there is
    a validation split, else the training loss.

    Args:
        scheduler: torch's, or Lightning's.
        wanted: ``val/loss``, ``train/loss``, or None.
        has_validation: whether the stream has a validation split.
        reset_optimizer: of the stream.

    Raises:
        ConfigurationError: the metric is unknown or not a loss of the current task, the scheduler would
            continue over tasks, or two metrics are given.
    """
    default = "val/loss" if has_validation else "train/loss"
    own: str | None = getattr(scheduler, "monitor", None)
    if wanted and own and wanted != own:
        raise ConfigurationError(
            f"Expected scheduler_monitor to equal the monitor of ReduceLROnPlateau, {own!r}, but got "
            f"{wanted!r}. Leave one of the two out."
        )
    monitor = wanted or own or default
    if monitor not in MONITORS:
        raise ConfigurationError(
            f"Expected monitor of ReduceLROnPlateau to be one of {', '.join(MONITORS)}, of the "
            f"current task, but got {monitor!r}. The default here is {default!r}."
        )
    if monitor == "val/loss" and not has_validation:
        raise ConfigurationError(
            "Expected validation_fraction to be more than 0 when ReduceLROnPlateau monitors 'val/loss', "
            "but the stream has no validation split. Set it, or monitor 'train/loss'."
        )
    if scheduler.mode != "min":
        raise ConfigurationError(
            f"Expected mode of ReduceLROnPlateau to be 'min', but got {scheduler.mode!r}: it monitors a "
            "loss. Leave mode out."
        )
    if reset_optimizer == "never":
        raise ConfigurationError(
            "Expected reset_optimizer to be 'always' with ReduceLROnPlateau, but got 'never'. The loss "
            "of the next task starts higher than that of the previous one ended."
        )
    return monitor


def scheduler_config(
    scheduler: LRScheduler, interval: Literal["step", "epoch"], monitor: str | None
) -> LRSchedulerConfigType:
    """Lightning's configuration of a scheduler, so that it saves it, and steps it unless it is a plateau's.

    Lightning steps plateau schedulers after the hook in which checkpoints are taken, so that a resumed run
    would skip a step. The module steps them itself at the end of an epoch.
    """
    config: dict[str, Any] = {"scheduler": scheduler, "interval": interval}
    if isinstance(scheduler, ReduceLROnPlateau):
        config |= {"interval": "epoch", "frequency": sys.maxsize, "monitor": monitor}
    return config  # type: ignore[return-value]
