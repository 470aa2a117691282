"""Concatenation of several streams."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from bpn_lightning.datamodules.base import ContinualDataModule
from bpn_lightning.datamodules.described import verified
from bpn_lightning.datamodules.loading import EvaluationLoader, TrainLoader
from bpn_lightning.datamodules.readers import ImageData
from bpn_lightning.errors import ConfigurationError
from bpn_lightning.preparation import Preparation
from bpn_lightning.random_state import seeded_generator
from bpn_lightning.tasks import Batch, Order, Split, Task

__all__ = ["StreamOf"]


class _Substream(NamedTuple):
    """One of the streams, with the offsets of its tasks and columns in the whole."""

    stream: ContinualDataModule
    first_task: int
    first_column: int

    def renumber(self, batch: Batch) -> Batch:
        """Convert the stream's own task IDs and targets to those of the whole."""
        return batch._replace(
            task=batch.task + self.first_task, targets=batch.targets + self.first_column
        )


class ChainedLoader:
    """The batches of several streams' loaders, concatenated.

    Args:
        parts: the loaders and their streams.
    """

    def __init__(self, parts: Sequence[tuple[_Substream, EvaluationLoader]]) -> None:
        self.parts = parts

    def __len__(self) -> int:
        """The number of global batches."""
        return sum(len(loader) for _, loader in self.parts)

    def __iter__(self) -> Iterator[Batch]:
        return chain.from_iterable(
            map(substream.renumber, loader) for substream, loader in self.parts
        )


class ShuffledLoader:
    """One training epoch of a task, with a position that can be saved like that of TrainLoader.

    If a method trains on tasks of several streams at once, whose raw images may have different sizes,
    each batch comes from one stream, and the order of the batches is random.

    Args:
        parts: the loaders and their streams.
        task: the task ID in the whole.
        epoch: index of the epoch in the task.
        seed: seed of the order of the batches.
    """

    def __init__(
        self, parts: Sequence[tuple[_Substream, TrainLoader]], task: int, epoch: int, seed: int
    ) -> None:
        self.parts = parts
        self.task = task
        self.epoch = epoch
        self.seed = seed
        self.first_batch = 0

    def __len__(self) -> int:
        """The number of global batches in the whole epoch."""
        return sum(len(loader) for _, loader in self.parts)

    def count(self, first: int, stop: int) -> int:
        """The number of samples in a range of batches, over all processes."""
        ends = zip(self._done(first), self._done(stop), strict=True)
        return sum(
            loader.count(*of_part) for (_, loader), of_part in zip(self.parts, ends, strict=True)
        )

    def smallest(self, batches: int) -> int:
        """The number of samples in the smallest batch that may be among the first, in any order."""
        if len(self.parts) == 1:
            return self.parts[0][1].smallest(batches)
        return min(loader.smallest(len(loader)) for _, loader in self.parts)

    def _order(self) -> Tensor:
        """The part of each batch."""
        sizes = torch.tensor([len(loader) for _, loader in self.parts])
        order = torch.arange(len(self.parts)).repeat_interleave(sizes)
        if len(self.parts) > 1:
            generator = seeded_generator("batches", self.seed, self.task, self.epoch)
            order = order[torch.randperm(len(order), generator=generator)]
        return order

    def _done(self, batches: int) -> list[int]:
        """The number of batches from each part among the first ones."""
        return self._order()[:batches].bincount(minlength=len(self.parts)).tolist()

    def __iter__(self) -> Iterator[Batch]:
        """The batches from the start, or from the loaded position."""
        order = self._order()
        for (_, loader), first_batch in zip(self.parts, self._done(self.first_batch), strict=True):
            loader.load_state_dict({"processed": first_batch})
        batches = [map(substream.renumber, loader) for substream, loader in self.parts]
        if len(self.parts) > 1:  # other tasks than the epoch's need one ID per sample
            batches = [map(_one_id_per_sample, of_part) for of_part in batches]
        return (next(batches[part]) for part in order[self.first_batch :].tolist())

    def state_dict(self) -> dict[str, int]:
        """The position in the epoch, in batches."""
        return self.parts[0][1].state_dict()

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue from the saved position."""
        self.first_batch = state["processed"]


@dataclass(eq=False, repr=False)
class StreamOf(ContinualDataModule):
    """Concatenates streams.

    Tasks are numbered consecutively. Each stream keeps its own images, normalization, augmentation,
    transform, batch sizes, epochs and held-out part.

    Args:
        streams: the streams in order; in YAML, a list of ``class_path`` and ``init_args``. All have to
            have the same ``input_shape``.
        shared_columns: whether all streams use the columns of the head from 0 on, instead of separate
            columns; requires the module's mask ``shared`` if all tasks have the same number of classes.

    Raises:
        ConfigurationError: there is no stream, streams differ in input shape, in whether a part is held
            out or in what they evaluate, or streams with different numbers of classes share columns.
    """

    streams: list[ContinualDataModule]
    shared_columns: bool = False

    # Set in each stream instead.
    epochs_per_task: int | list[int] = field(init=False, default=1)
    batch_size: int = field(init=False, default=1)
    eval_batch_size: int = field(init=False, default=1)
    validation_fraction: float = field(init=False, default=0.0)
    evaluation_split: Literal["test", "val"] = field(init=False, default="test")
    augment: bool = field(init=False, default=False)
    channels: Literal[1, 3] | None = field(init=False, default=None)

    title = "the streams"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.streams:
            raise ConfigurationError(
                "Expected streams to list at least one stream, but got none. Add some."
            )
        held = [stream.has_validation for stream in map(_checked, self.streams)]
        if any(held) != all(held):
            raise ConfigurationError(
                "Expected validation_fraction to be more than 0 in all streams or in none, but got "
                f"{[stream.validation_fraction for stream in self.streams]}. Set it in all."
            )
        self.has_validation = all(held)
        splits = [stream.evaluation_split for stream in self.streams]
        if len(set(splits)) > 1:
            raise ConfigurationError(
                f"Expected evaluation_split to be the same in all streams, but got {splits}. Set it in all."
            )
        self.evaluation_split = splits[0]
        self._substreams: list[_Substream] = []

    @property
    def order(self) -> Order:
        """``seed`` where that of one of the streams is."""
        return "seed" if any(stream.order == "seed" for stream in self.streams) else "fixed"

    def prepare_data(self) -> None:
        """Let every stream download its missing files."""
        for stream in self.streams:
            stream.prepare_data()

    def setup(self, stage: str | None = None) -> None:
        """Set up every stream; later calls do nothing."""
        if self._substreams:
            return
        for stream in self.streams:
            if stream.seed is None:
                stream.seed = self.seed
            stream.setup(stage)
        if self.seed is None:
            self.seed = self.streams[0].seed
        self._refuse_differences()
        self._set_up_past_data()
        substreams, tasks = list[_Substream](), list[Task]()
        column = 0
        for stream in self.streams:
            first, offset = self.first_task + len(tasks), self.first_column + column
            substreams.append(_Substream(stream, first, offset))
            for task in stream.tasks:
                columns = (task.columns[0] + column, task.columns[1] + column)
                tasks.append(Task(len(tasks), columns, task.class_names, task.epochs))
            column += 0 if self.shared_columns else stream.num_classes
        self.tasks = self._after_past(tasks)
        self.num_classes = max(task.columns[1] for task in self.tasks)
        self.input_shape = self.streams[0].input_shape
        self.input_dtype = self.streams[0].input_dtype
        self._substreams = substreams
        self._past_alike = self._past is None

    def _forget_setup(self) -> None:
        self._substreams = []

    def _refuse_differences(self) -> None:
        shapes = [stream.input_shape for stream in self.streams]
        if len(set(shapes)) > 1:
            raise ConfigurationError(
                f"Expected all streams to give inputs of one shape, but got {shapes}. Use the "
                "streams' own arguments, such as padding, image_size or channels, to make them equal."
            )
        dtypes = [stream.input_dtype for stream in self.streams]
        if len(set(dtypes)) > 1:
            raise ConfigurationError(
                f"Expected all streams to give floats, or all of them tokens, but got {dtypes}. Join "
                "streams of one kind."
            )
        widths = [stream.num_classes for stream in self.streams]
        if self.shared_columns and len(set(widths)) > 1:
            raise ConfigurationError(
                f"Expected streams that share columns to have the same number of classes, but got {widths}. "
                "Leave classes out, or set shared_columns to false."
            )

    def _refuse(self) -> ConfigurationError:
        return ConfigurationError(
            "Expected read and divide to be called on one of the streams, but got a StreamOf, which has "
            "no data of its own. Use its streams."
        )

    def read(self) -> ImageData:
        """Refuse: each stream reads its own data."""
        raise self._refuse()

    def divide(self, data: ImageData) -> tuple[list[Task], list[list[int]]]:
        """Refuse: each stream divides its own data."""
        raise self._refuse()

    # ---------------------------------------------------------------------- loaders

    def _substream(self, task_id: int) -> _Substream:
        """The stream of a task, attached to the current trainer."""
        self._refuse_past(task_id)
        substream = next(one for one in reversed(self._substreams) if one.first_task <= task_id)
        substream.stream.trainer = self.trainer
        return substream

    def _by_stream(self, task_ids: Iterable[int]) -> dict[int, list[int]]:
        """Task indices within each stream, by the first task of the stream."""
        found: dict[int, list[int]] = {}
        for task_id in task_ids:
            first = self._substream(task_id).first_task
            found.setdefault(first, []).append(task_id - first)
        return found

    def members(self, task_id: int, split: Split) -> Tensor:
        """Indices of a task's samples in its stream: ``(n,)`` int64."""
        substream = self._substream(task_id)
        return substream.stream.members(task_id - substream.first_task, split)

    def loader(  # type: ignore[override]
        self,
        task_id: int,
        split: Split,
        batch_size: int | None = None,
        max_samples: int | None = None,
    ) -> ChainedLoader:
        """This process's shard of a task, each sample once, in order and without augmentation.

        Args:
            task_id: the task.
            split: "train" (without the held-out part), "val" or "test".
            batch_size: over all processes; None: the ``eval_batch_size`` of the task's stream.
            max_samples: maximum number of samples over all processes; a random subset if the task has more.
        """
        if self._past_data is not None and task_id < self.first_task:
            before: Any = self._past_data
            found: ChainedLoader = before.loader(task_id, split, batch_size, max_samples)
            return found
        substream = self._substream(task_id)
        of_task = substream.stream.loader(
            task_id - substream.first_task, split, batch_size, max_samples
        )
        return ChainedLoader([(substream, of_task)])

    def train_loader(  # type: ignore[override]
        self, task_id: int, epoch: int, tasks: Sequence[int] | None = None
    ) -> ShuffledLoader:
        """One training epoch, in an order determined by (seed, task, epoch).

        Args:
            task_id: the task.
            epoch: index of the epoch in the task, over all its phases.
            tasks: the tasks whose data are used, if not only the task's own.
        """
        parts = []
        for first, own in self._by_stream([task_id] if tasks is None else tasks).items():
            substream = self._substream(first)
            lead = task_id - first if task_id - first in own else own[-1]
            parts.append((substream, substream.stream.train_loader(lead, epoch, own)))
        return ShuffledLoader(parts, task_id, epoch, self.seed)

    def _joint_loader(  # type: ignore[override]
        self, split: Split, task_ids: range
    ) -> ChainedLoader:
        parts = []
        for first, own in self._by_stream(task_ids).items():
            substream = self._substream(first)
            parts.append(
                (substream, substream.stream._joint_loader(split, range(own[0], own[-1] + 1)))
            )
        return ChainedLoader(parts)

    # ---------------------------------------------------------------------- on the device

    def prepare(self, batch: Batch, augment: bool = False) -> Batch:
        """Preprocess each sample like its own stream.

        Args:
            batch: a batch from a loader, or of several streams whose raw images have the same shape.
            augment: whether to augment, if the batch has random numbers for it.
        """
        return self._prepared_as_past(batch) or self._prepare_own(batch, augment)

    def _prepare_own(self, batch: Batch, augment: bool = False) -> Batch:
        if isinstance(batch.task, int):
            return self._prepare_of(self._substream(batch.task), batch, augment)
        tasks = batch.task
        firsts = torch.tensor([substream.first_task for substream in self._substreams])
        owners = torch.bucketize(tasks.cpu().contiguous(), firsts, right=True) - 1
        several = sorted(set(owners.tolist()))
        if len(several) == 1:
            return self._prepare_of(self._substreams[several[0]], batch, augment)
        inputs = torch.empty(0)
        for owner in several:
            own = owners == owner
            draws = None if batch.augmentation is None else batch.augmentation[own]
            part = Batch(
                batch.inputs[own], batch.targets[own], tasks[own], batch.global_size, draws
            )
            prepared = self._prepare_of(self._substreams[owner], part, augment).inputs
            if not len(inputs):
                inputs = prepared.new_empty(len(owners), *prepared.shape[1:])
            inputs[own] = prepared
        return batch._replace(inputs=inputs, augmentation=None)

    def _prepare_of(self, substream: _Substream, batch: Batch, augment: bool) -> Batch:
        own = substream.stream.prepare(
            batch._replace(task=batch.task - substream.first_task), augment
        )
        return own._replace(task=batch.task)

    def raw_samples(self, task_id: int) -> Tensor:
        """A few raw inputs of the task's own stream."""
        substream = self._substream(task_id)
        return substream.stream.raw_samples(task_id - substream.first_task)

    def preparations(self) -> list[Preparation]:
        """The descriptions of all streams, in order."""
        before = [] if self._past is None else list(self._past.preparations)
        own = [one for stream in self.streams for one in stream.preparations()]
        return verified(self, [*before, *own])


def _one_id_per_sample(batch: Batch) -> Batch:
    return batch._replace(task=torch.as_tensor(batch.task).expand(len(batch.targets)))


def _checked(stream: ContinualDataModule) -> ContinualDataModule:
    if not isinstance(stream, ContinualDataModule):
        raise ConfigurationError(
            f"Expected streams to list streams, but got {type(stream).__name__}. Those of this "
            "package are in bpn_lightning.datamodules."
        )
    return stream
