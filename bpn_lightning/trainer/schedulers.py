"""Learning rate schedulers over one task: how long they are, and what a plateau is measured on."""

import sys
from collections.abc import Callable
from inspect import Parameter, signature
from typing import Any, Literal

from lightning.pytorch.utilities.types import LRSchedulerConfigType
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, OneCycleLR, ReduceLROnPlateau

from bpn_lightning.errors import ConfigurationError

__all__ = ["LENGTHS", "MONITORS", "build_scheduler", "plateau_monitor", "scheduler_config"]

#: The arguments of schedulers that say how often they step.
LENGTHS = ("num_steps", "total_steps", "T_max", "total_iters")

#: What stands for no value: no default, or None.
UNSET = (Parameter.empty, None)

MONITORS = ("val/loss", "train/loss")


def build_scheduler(
    make: Callable[..., LRScheduler], optimizer: Optimizer, steps: int, longest: int
) -> LRScheduler:
    """A scheduler for so many steps.

    An argument of the name ``num_steps``, ``total_steps``, ``T_max`` or ``total_iters`` that has no
    value, or -1, gets that number.

    Args:
        make: called with the optimizer.
        optimizer: whose rate it sets.
        steps: that it will be asked for until the optimizer is replaced; at most.
        longest: the same of the longest task or phase.

    Raises:
        ConfigurationError: the scheduler refuses its arguments, or is too short.

    >>> import torch
    >>> from functools import partial
    >>> optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    >>> cosine = torch.optim.lr_scheduler.CosineAnnealingLR
    >>> [build_scheduler(f, optimizer, 40, 40).T_max for f in (cosine, partial(cosine, T_max=9))]
    [40, 9]
    """
    given = {name: parameter.default for name, parameter in signature(make).parameters.items()}
    given |= getattr(make, "keywords", {})  # of a partial of any function, as a config makes it
    # OneCycleLR takes epochs and steps_per_epoch in the place of total_steps.
    own = given.get("epochs") is not None and given.get("steps_per_epoch") is not None
    filled = {
        name: steps
        for name in LENGTHS
        if name in given and (given[name] == -1 or (not own and given[name] in UNSET))
    }
    try:
        made = make(optimizer, **filled)
    except (TypeError, ValueError) as error:
        raise ConfigurationError(
            f"Expected scheduler to take the optimizer and its arguments, but it raised "
            f"{type(error).__name__}: {error}. Correct that argument."
        ) from error
    if isinstance(made, OneCycleLR) and made.total_steps < longest:
        raise ConfigurationError(
            f"Expected total_steps of OneCycleLR to be at least the {longest} steps of a task, but got "
            f"{made.total_steps}. Leave it out, and every task has a cycle of its own length."
        )
    return made


def plateau_monitor(
    scheduler: ReduceLROnPlateau,
    wanted: str | None,
    has_validation: bool,
    reset_optimizer: Literal["always", "never"],
) -> str:
    """The loss of the open task that a plateau is found in.

    What is wanted, or the ``monitor`` that Lightning's class of that name has; else the validation loss
    where a part is held out, and the training loss where none is.

    Args:
        scheduler: torch's, or Lightning's.
        wanted: ``val/loss``, ``train/loss``, or None.
        has_validation: whether the stream holds a part out.
        reset_optimizer: of the stream.

    Raises:
        ConfigurationError: the value is not known, does not fall while a task is learned, goes on over
            tasks, or two are wanted.
    """
    default = "val/loss" if has_validation else "train/loss"
    own: str | None = getattr(scheduler, "monitor", None)
    if wanted and own and wanted != own:
        raise ConfigurationError(
            f"Expected scheduler_monitor to be what ReduceLROnPlateau monitors, {own!r}, but got "
            f"{wanted!r}. Leave one of the two out."
        )
    monitor = wanted or own or default
    if monitor not in MONITORS:
        raise ConfigurationError(
            f"Expected monitor of ReduceLROnPlateau to be one of {', '.join(MONITORS)}, of the task "
            f"being learned, but got {monitor!r}. Without it, it is {default!r} here."
        )
    if monitor == "val/loss" and not has_validation:
        raise ConfigurationError(
            "Expected validation_fraction to be more than 0 where ReduceLROnPlateau monitors 'val/loss', "
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
            "of the next task begins higher than that of the last one ended."
        )
    return monitor


def scheduler_config(
    scheduler: LRScheduler, interval: Literal["step", "epoch"], monitor: str | None
) -> LRSchedulerConfigType:
    """What Lightning is told of a scheduler, so that it saves it, and steps it unless it is a plateau's.

    Lightning steps those after the hook in which checkpoints are taken: a run that resumes would leave
    one out. The module steps them, when it has finished an epoch.
    """
    config: dict[str, Any] = {"scheduler": scheduler, "interval": interval}
    if isinstance(scheduler, ReduceLROnPlateau):
        config |= {"interval": "epoch", "frequency": sys.maxsize, "monitor": monitor}
    return config  # type: ignore[return-value]
