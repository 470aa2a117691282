"""Which classes make which task, and which samples are held out: functions of names and labels."""

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from bpn_lightning.errors import ConfigurationError, did_you_mean
from bpn_lightning.random_state import seeded_generator

__all__ = ["blur_boundaries", "choose_classes", "hold_out", "quoted_names"]


def choose_classes(
    class_names: Sequence[str],
    order: Sequence[str | int] | None = None,
    order_seed: int | None = None,
) -> list[int]:
    """The classes in the order in which the tasks take them.

    Args:
        class_names: the data set's own classes, in its own order.
        order: the wanted ones, each by name or by place in ``class_names``; None: all of them.
        order_seed: if given, the order is shuffled by a generator of this seed.

    Returns:
        Places in ``class_names``.

    Raises:
        ConfigurationError: the order names a class that is not there, or one twice.

    >>> choose_classes(["bee", "cat", "dog"], order=["dog", 0])
    [2, 0]
    """
    known = {name: place for place, name in enumerate(class_names)}
    chosen = []
    for entry in range(len(class_names)) if order is None else order:
        place = known.get(entry) if isinstance(entry, str) else entry
        if place is None or not 0 <= place < len(class_names):
            raise ConfigurationError(
                f"Expected class_order to list names of classes or numbers from 0 to "
                f"{len(class_names) - 1}, but got {entry!r}.{did_you_mean(str(entry), class_names)} "
                f"The classes are {quoted_names(class_names)}."
            )
        chosen.append(place)
    repeated = [class_names[place] for place, count in Counter(chosen).items() if count > 1]
    if repeated:
        raise ConfigurationError(
            f"Expected class_order to list each class once, but got {quoted_names(repeated)} more than "
            "once. Remove the repetitions."
        )
    if order_seed is not None:
        shuffle = torch.randperm(len(chosen), generator=seeded_generator("class_order", order_seed))
        chosen = [chosen[i] for i in shuffle.tolist()]
    return chosen


def hold_out(labels: Tensor, fraction: float, *key: int | str) -> Tensor:
    """Mark a random ``fraction`` of each class, by a generator of its own.

    A class's choice depends on its own samples only, not on which other classes take part. Of two
    or more samples at least one is marked and at least one is not.

    Args:
        labels: ``(n,)`` int64.
        fraction: in [0, 1); 0 marks nothing.
        key: names the purpose and the seed of the draw.

    Returns:
        ``(n,)`` bool.
    """
    held = torch.zeros(len(labels), dtype=torch.bool)
    if fraction == 0:
        return held
    for label in torch.unique(labels).tolist():
        members = (labels == label).nonzero().flatten()
        count = min(max(1, round(fraction * len(members))), len(members) - 1)
        shuffle = torch.randperm(len(members), generator=seeded_generator(*key, label))
        held[members[shuffle[:count]]] = True
    return held


def blur_boundaries(
    labels: Tensor, classes: Sequence[Sequence[int]], fraction: float, seed: int
) -> list[Tensor]:
    """The samples of tasks whose boundaries are blurry.

    Each class has a task of its own. A random ``fraction`` of its samples is elsewhere: each in one of
    the other tasks, any as likely as the others.

    Args:
        labels: ``(n,)`` int64.
        classes: for each task, two or more, the classes whose own it is.
        fraction: in [0, 1); 0 leaves every sample in its class's task.
        seed: of the draw.

    Returns:
        For each task its samples, ``(samples,)`` int64; together every sample of these classes once.
    """
    own = torch.full((len(labels),), -1)
    for task, of_task in enumerate(classes):
        own[torch.isin(labels, torch.tensor(of_task))] = task
    generator = seeded_generator("blurry: tasks", seed)
    others = torch.randint(len(classes) - 1, (len(labels),), generator=generator)
    others += others >= own
    moved = hold_out(labels, fraction, "blurry", seed) & (own >= 0)
    found = torch.where(moved, others, own)
    return [(found == task).nonzero().flatten() for task in range(len(classes))]


def quoted_names(names: Sequence[str], max_names: int = 12) -> str:
    """Names in quotes, the first few of many.

    >>> quoted_names(["bee", "cat", "dog"], max_names=2)
    "'bee', 'cat' and 1 more"
    """
    shown = ", ".join(repr(name) for name in names[:max_names])
    return shown if len(names) <= max_names else f"{shown} and {len(names) - max_names} more"
