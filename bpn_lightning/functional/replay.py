"""Which samples a memory of a fixed size keeps, and in which order they are replayed."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from bpn_lightning.random_state import seeded_generator

__all__ = ["Chosen", "greedy_balanced", "herding", "replay_order", "reservoir"]


class Chosen(NamedTuple):
    """What a memory consists of after a task.

    Attributes:
        kept: ``(samples,)`` int64, indices of the samples of the memory that stay, ascending.
        drawn: ``(samples,)`` int64, indices of the task's samples that are added.
    """

    kept: Tensor
    drawn: Tensor


def reservoir(held: int, seen: int, new: int, size: int, generator: Generator) -> Chosen:
    """Reservoir sampling: every sample seen so far is in the memory with the same probability.

    Algorithm R of Vitter (1985): a free place takes a sample; the n-th sample of all takes the place of a
    random one with the probability size / n.

    Args:
        held: samples in the memory.
        seen: samples that it was drawn from.
        new: samples that arrive now.
        size: samples that it may hold.
        generator: of one number per new sample.
    """
    numbers = torch.rand(new, generator=generator, dtype=torch.float64)
    places = (numbers * (seen + torch.arange(1, new + 1))).long().tolist()
    slots = list(range(held))
    for sample, place in enumerate(places, start=held):
        if len(slots) < size:
            slots.append(sample)
        elif place < size:
            slots[place] = sample
    return _split(slots, held)


def greedy_balanced(
    held: Sequence[int], new: Sequence[int], size: int, generator: Generator
) -> Chosen:
    """Greedy class-balanced sampling, Algorithm 1 of Prabhu et al. (2020).

    Samples arrive in random order. One of a class that has less than an equal part of the memory is
    taken; where the memory is full, a random one of the largest class, of the first of several, goes.

    Args:
        held: classes of the samples in the memory.
        new: classes of the samples that arrive now.
        size: samples that it may hold, at least the number of classes.
        generator: of the order, and of the samples that go.
    """
    slots: dict[int, list[int]] = {}
    for sample, label in enumerate(held):
        slots.setdefault(label, []).append(sample)
    total = len(held)
    for index in torch.randperm(len(new), generator=generator).tolist():
        label = new[index]
        if label in slots and len(slots[label]) * len(slots) >= size:
            continue
        if total >= size:
            largest = max(sorted(slots), key=lambda one: len(slots[one]))
            gone = torch.randint(len(slots[largest]), (), generator=generator)
            slots[largest].pop(int(gone))
            total -= 1
        slots.setdefault(label, []).append(len(held) + index)
        total += 1
    return _split([sample for of_class in slots.values() for sample in of_class], len(held))


def _split(slots: Sequence[int], held: int) -> Chosen:
    kept = sorted(sample for sample in slots if sample < held)
    drawn = sorted(sample - held for sample in slots if sample >= held)
    return Chosen(torch.tensor(kept, dtype=torch.int64), torch.tensor(drawn, dtype=torch.int64))


def herding(features: Tensor, number: int) -> Tensor:
    r"""Exemplars of a class, the most important one first: Algorithm 4 of Rebuffi et al. (2017).

    .. math:: p_k = \arg\min_x \Big| \mu - \tfrac1k \Big(\varphi(x) + \sum_{j<k} \varphi(p_j)\Big) \Big|

    No sample is taken twice, and :math:`\mu` is normalized, as in the authors' code.

    Args:
        features: ``(samples, features)``, each of norm 1.
        number: exemplars, at most the number of samples.

    Returns:
        ``(number,)`` int64, indices of samples on the CPU.

    >>> herding(torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0]]), 2)
    tensor([1, 2])
    """
    features = features.double()
    mean = F.normalize(features.mean(0), dim=0)
    total = torch.zeros_like(mean)
    chosen: list[int] = []
    for k in range(1, number + 1):
        distances = (mean - (features + total) / k).square().sum(1)
        distances[chosen] = torch.inf
        chosen.append(int(distances.argmin()))
        total = total + features[chosen[-1]]
    return torch.tensor(chosen, dtype=torch.int64)


def replay_order(size: int, first: int, number: int, key: Sequence[int | str]) -> Tensor:
    """A part of an endless sequence of random orders of a memory's samples.

    Every sample comes once before any comes again, however the sequence is divided into batches.

    Args:
        size: samples in the memory.
        first: position in the sequence.
        number: length of the part.
        key: seed of the orders.

    Returns:
        ``(number,)`` int64, indices of samples.
    """
    if number == 0 or size == 0:
        return torch.empty(0, dtype=torch.int64)
    rounds = range(first // size, (first + number - 1) // size + 1)
    orders = [torch.randperm(size, generator=seeded_generator(*key, one)) for one in rounds]
    return torch.cat(orders)[first % size :][:number]
