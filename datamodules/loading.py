"""Batches by index: the loaders of in-memory streams.

Lightning re-wraps a ``DataLoader`` under several processes, which repeats and drops samples. What it
cannot wrap it leaves alone, so these are plain iterables that know their own share of a batch.
"""

from collections.abc import Callable, Iterator
from math import ceil
from typing import NamedTuple

import torch
from torch import Tensor

from bpn_lightning.datamodules.augmentation import CropAndFlip
from bpn_lightning.random_state import seeded_generator
from bpn_lightning.tasks import Batch

__all__ = ["ALONE", "EvaluationLoader", "Samples", "Share", "TrainLoader", "training_batches"]


class Samples(NamedTuple):
    """Inputs and their labels, the store that loaders index into.

    Attributes:
        images: ``(samples, channels, height, width)`` uint8; or features, ``(samples, features, ...)``
            floating point; or tokens, ``(samples, ...)`` int64.
        labels: ``(samples,)`` int64.
    """

    images: Tensor
    labels: Tensor


class Share(NamedTuple):
    """Which contiguous, near-equal chunk of every global batch is this process's own."""

    rank: int = 0
    world_size: int = 1

    def of(self, start: int, stop: int) -> slice:
        """This process's part of a batch; empty where there are more processes than samples.

        >>> [Share(rank, 3).of(10, 18) for rank in range(3)]
        [slice(10, 12, None), slice(12, 15, None), slice(15, 18, None)]
        """
        size = stop - start
        first, last = (rank * size // self.world_size for rank in (self.rank, self.rank + 1))
        return slice(start + first, start + last)


ALONE = Share()
"""The share of a process that has no others beside it: everything."""


def training_batches(samples: int, batch_size: int) -> int:
    """How many batches an epoch has: a single sample that would be left for the last joins the one before.

    A batch of one sample has no statistics for a layer that normalizes batches, and a gradient that no
    other batch's is like. The rule looks neither at the network nor at the number of processes, so that
    any of them learns from the same batches.

    >>> [training_batches(samples, 32) for samples in (1, 32, 33, 34, 448, 449)]
    [1, 1, 1, 2, 14, 14]
    """
    left_over = samples % batch_size == 1 and batch_size > 1 and samples > batch_size
    return ceil(samples / batch_size) - left_over


def _batches(
    samples: Samples,
    indices: Tensor,
    task: int | Tensor,
    places: Tensor,
    batch_size: int,
    share: Share,
    batches: range,
    augmentation: Tensor | None = None,
) -> Iterator[Batch]:
    """This process's share of some global batches of ``indices``; the last one takes what is left."""
    for batch in batches:
        start = batch * batch_size
        stop = len(indices) if batch == batches.stop - 1 else start + batch_size
        own = share.of(start, stop)
        chosen = indices[own]
        yield Batch(
            inputs=samples.images.index_select(0, chosen),
            targets=samples.labels.index_select(0, chosen),
            task=task if isinstance(task, int) else task[own],
            global_size=stop - start,
            augmentation=None if augmentation is None else augmentation[own],
            start=own.start - start,
            samples=places[own] if augmentation is None else None,
        )


class EvaluationLoader:
    """Every sample once, in the given order.

    Args:
        samples: the store.
        indices: ``(n,)`` int64, which samples of it.
        task: the id that all of them share, or ``(n,)`` int64, one per sample.
        batch_size: samples of a global batch.
        share: which part of each global batch is this process's own.
    """

    def __init__(
        self,
        samples: Samples,
        indices: Tensor,
        task: int | Tensor,
        batch_size: int,
        share: Share = ALONE,
    ) -> None:
        self.samples = samples
        self.indices = indices
        self.task = task
        self.batch_size = batch_size
        self.share = share

    def __len__(self) -> int:
        """How many global batches, the same on every process."""
        return ceil(len(self.indices) / self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        return _batches(
            self.samples,
            self.indices,
            self.task,
            torch.arange(len(self.indices)),
            self.batch_size,
            self.share,
            range(len(self)),
        )


class TrainLoader:
    """One epoch of one task, in an order that follows from (seed, task, epoch) alone.

    The last batch may be short, or have one sample more than the others where it would have been left
    alone (:func:`training_batches`); nothing is dropped. Lightning asks ``state_dict`` for the position
    when it saves, and hands it to ``load_state_dict`` of the new loader when it resumes.

    Args:
        samples: the store.
        indices: ``(n,)`` int64, the task's samples in it.
        task: the task's id.
        task_ids: ``(n,)`` int64, the tasks of samples that are not all of this one.
        epoch: the epoch within the task.
        seed: the stream's seed.
        batch_size: samples of a global batch.
        share: which part of each global batch is this process's own.
        processed: says how many batches of this epoch have been trained on. Batches handed out are
            not counted: one that was fetched ahead would be lost on resume.
        augmentation: if given, its random numbers are drawn for the whole epoch, over all processes,
            and travel with the batches.
    """

    def __init__(
        self,
        samples: Samples,
        indices: Tensor,
        task: int,
        epoch: int,
        *,
        seed: int,
        batch_size: int,
        processed: Callable[[], int],
        task_ids: Tensor | None = None,
        share: Share = ALONE,
        augmentation: CropAndFlip | None = None,
    ) -> None:
        self.samples = samples
        self.indices = indices
        self.task = task
        self.task_ids = task_ids
        self.epoch = epoch
        self.seed = seed
        self.batch_size = batch_size
        self.processed = processed
        self.share = share
        self.augmentation = augmentation
        self.first_batch = 0

    def __len__(self) -> int:
        """How many global batches the whole epoch has, on every process and after a resume too."""
        return training_batches(len(self.indices), self.batch_size)

    def count(self, first: int, stop: int) -> int:
        """Samples of some consecutive batches, of all processes."""
        end = len(self.indices) if stop == len(self) else stop * self.batch_size
        return end - first * self.batch_size

    def smallest(self, batches: int) -> int:
        """Samples, of all processes, of the smallest of the first batches."""
        return min(self.count(one, one + 1) for one in (0, batches - 1))

    def __iter__(self) -> Iterator[Batch]:
        """The batches from the start, or from where the loaded state stood.

        Changes nothing in the loader: Lightning calls it twice and drops the first iterator.
        """
        count = len(self.indices)
        position = (self.seed, self.task, self.epoch)
        order = torch.randperm(count, generator=seeded_generator("order", *position))
        draws = None
        if self.augmentation is not None:
            draws = self.augmentation.draw(count, seeded_generator("augmentation", *position))
        return _batches(
            self.samples,
            self.indices[order],
            self.task if self.task_ids is None else self.task_ids[order],
            order,
            self.batch_size,
            self.share,
            range(self.first_batch, len(self)),
            draws,
        )

    def state_dict(self) -> dict[str, int]:
        """The position in the epoch, in batches."""
        return {"processed": self.processed()}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Begin where the saved epoch stood."""
        self.first_batch = state["processed"]
