"""Loaders of in-memory streams, which index batches.

Under DDP, Lightning re-wraps a ``DataLoader``, which repeats and drops samples. It does not wrap other
iterables, so these are plain iterables that shard their batches themselves.
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
    """Inputs and labels in memory, which loaders index.

    Attributes:
        images: ``(samples, channels, height, width)`` uint8; or features, ``(samples, features, ...)``
            floating point; or tokens, ``(samples, ...)`` int64.
        labels: ``(samples,)`` int64.
    """

    images: Tensor
    labels: Tensor


class Share(NamedTuple):
    """The shard of this process: a contiguous, near-equal chunk of every global batch."""

    rank: int = 0
    world_size: int = 1

    def of(self, start: int, stop: int) -> slice:
        """This process's slice of a batch; empty if there are more processes than samples.

        >>> [Share(rank, 3).of(10, 18) for rank in range(3)]
        [slice(10, 12, None), slice(12, 15, None), slice(15, 18, None)]
        """
        size = stop - start
        first, last = (rank * size // self.world_size for rank in (self.rank, self.rank + 1))
        return slice(start + first, start + last)


ALONE = Share()
"""The shard of a single process: everything."""


def training_batches(samples: int, batch_size: int) -> int:
    """The number of batches in an epoch; a single leftover sample joins the previous batch.

    Batch normalization is undefined for a batch of one sample, and its gradient has a much higher
    variance. The rule depends neither on the network nor on the number of processes, so that all train
    on the same batches.

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
    """This process's shard of a range of global batches; the last batch takes the remainder."""
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
    """Each sample once, in the given order.

    Args:
        samples: the samples in memory.
        indices: ``(n,)`` int64, the selected samples.
        task: the common task ID, or ``(n,)`` int64, one per sample.
        batch_size: samples of a global batch.
        share: the shard of this process.
        places: ``(n,)`` int64, of each sample among those of its own task; by default in this order.
    """

    def __init__(
        self,
        samples: Samples,
        indices: Tensor,
        task: int | Tensor,
        batch_size: int,
        share: Share = ALONE,
        places: Tensor | None = None,
    ) -> None:
        self.samples = samples
        self.indices = indices
        self.task = task
        self.batch_size = batch_size
        self.share = share
        self.places = torch.arange(len(indices)) if places is None else places

    def __len__(self) -> int:
        """The number of global batches, the same on every process."""
        return ceil(len(self.indices) / self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        return _batches(
            self.samples,
            self.indices,
            self.task,
            self.places,
            self.batch_size,
            self.share,
            range(len(self)),
        )


class TrainLoader:
    """One epoch of one task, in an order that depends only on (seed, task, epoch).

    The last batch may be smaller, or have one more sample than the others
    (:func:`training_batches`); no sample is dropped. Lightning saves the position with ``state_dict``
    and passes it to ``load_state_dict`` of the new loader when it resumes.

    Args:
        samples: the samples in memory.
        indices: ``(n,)`` int64, the task's samples.
        task: the task ID.
        task_ids: ``(n,)`` int64, one task ID per sample, if not all are of this task.
        epoch: index of the epoch in the task.
        seed: the stream's seed.
        batch_size: samples of a global batch.
        share: the shard of this process.
        processed: returns the number of batches of this epoch used in training so far. Fetched batches
            are not counted, because a prefetched one would be lost on resuming.
        augmentation: if given, its random numbers are drawn for the whole epoch over all processes,
            and are part of the batches.
        places: ``(n,)`` int64, of each sample among those of its own task; by default in this order.
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
        places: Tensor | None = None,
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
        self.places = torch.arange(len(indices)) if places is None else places
        self.first_batch = 0

    def __len__(self) -> int:
        """The number of global batches in the whole epoch, on every process and also after resuming."""
        return training_batches(len(self.indices), self.batch_size)

    def count(self, first: int, stop: int) -> int:
        """The number of samples in a range of batches, over all processes."""
        end = len(self.indices) if stop == len(self) else stop * self.batch_size
        return end - first * self.batch_size

    def smallest(self, batches: int) -> int:
        """The number of samples in the smallest of the first batches, over all processes."""
        return min(self.count(one, one + 1) for one in (0, batches - 1))

    def __iter__(self) -> Iterator[Batch]:
        """The batches from the start, or from the loaded position.

        Does not modify the loader: Lightning calls it twice and discards the first iterator.
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
            self.places[order],
            self.batch_size,
            self.share,
            range(self.first_batch, len(self)),
            draws,
        )

    def state_dict(self) -> dict[str, int]:
        """The position in the epoch, in batches."""
        return {"processed": self.processed()}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue from the saved position."""
        self.first_batch = state["processed"]
