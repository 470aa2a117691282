"""Assigning classes and samples to tasks and splits, as functions of names and labels."""

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
    """Order the classes for the tasks.

    Args:
        class_names: the classes in the data set's own order.
        order: the selected classes, by name or by index in ``class_names``; None selects all.
        order_seed: if given, shuffles the order with this seed.

    Returns:
        Indices into ``class_names``.

    Raises:
        ConfigurationError: the order contains an unknown class, or a class twice.

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
    """Select a random ``fraction`` of each class.

    The selection in a class depends only on its own samples, not on the other classes. Of two or more
    samples, at least one is selected and at least one is not.

    Args:
        labels: ``(n,)`` int64.
        fraction: in [0, 1); 0 selects nothing.
        key: the purpose and the seed of the random selection.

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
    """Assign samples to tasks with blurry boundaries.

    Each class belongs to one task. A random ``fraction`` of its samples is moved, each to one of the
    other tasks with equal probability.

    Args:
        labels: ``(n,)`` int64.
        classes: the classes of each task, for two or more tasks.
        fraction: in [0, 1); 0 leaves every sample in its class's task.
        seed: the random seed.

    Returns:
        The sample indices of each task, ``(samples,)`` int64; each sample of these classes occurs once.
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
    """Format names in quotes, abbreviating long lists.

    >>> quoted_names(["bee", "cat", "dog"], max_names=2)
    "'bee', 'cat' and 1 more"
    """
    shown = ", ".join(repr(name) for name in names[:max_names])
    return shown if len(names) <= max_names else f"{shown} and {len(names) - max_names} more"
