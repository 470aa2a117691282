"""The base class of streams: arguments, in-memory samples, and loaders that index them."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, NamedTuple, cast

import torch
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from torch import Tensor, device

from bpn_lightning.checks import check_choice, check_positive_int
from bpn_lightning.datamodules.augmentation import CropAndFlip
from bpn_lightning.datamodules.described import verified
from bpn_lightning.datamodules.division import (
    Division,
    SamplesOfTasks,
    check_data,
    check_held_out,
    columns_of_classes,
    members_of_tasks,
    refuse_empty_classes,
    refuse_empty_tasks,
)
from bpn_lightning.datamodules.loading import EvaluationLoader, Samples, Share, TrainLoader
from bpn_lightning.datamodules.normalization import ChannelStats
from bpn_lightning.datamodules.past import ContinuedStream
from bpn_lightning.datamodules.pixels import with_channels
from bpn_lightning.datamodules.readers import ImageData
from bpn_lightning.datamodules.splitting import hold_out
from bpn_lightning.errors import ConfigurationError, DataError
from bpn_lightning.preparation import (
    Preparation,
    Step,
    kind_of,
    normalize,
    scale_and_shift,
)
from bpn_lightning.random_state import run_seed, seeded_generator
from bpn_lightning.tasks import Batch, Order, Phase, Schedule, Split, Task, TrainingEpoch
from bpn_lightning.terminal import is_utf8
from bpn_lightning.trainer.lightning import batches_processed

__all__ = ["ContinualDataModule"]


class _NoLoader(CombinedLoader):
    """No loader, in a form for which Lightning does not warn about empty loaders."""

    flattened: tuple[()] = ()  # type: ignore[assignment]


class _Part(NamedTuple):
    """One split: its samples, and the indices of each task's samples."""

    samples: Samples
    members: list[Tensor]


# A dataclass, because its constructor includes the arguments of all base classes: a stream declares
# only its own arguments, and jsonargparse still finds every flag.
@dataclass(eq=False, repr=False, kw_only=True)
class ContinualDataModule(ContinuedStream, ABC):
    """A stream of tasks as an ordinary LightningDataModule.

    Images are stored in memory once, as uint8. Batches are taken by index and normalized on the device.
    Inputs may also be features (floats) or tokens (int64). A stream defines how its data are read
    (``read``), how they are divided into tasks (``divide``) and, if tasks differ in more than their
    classes, how a task transforms its inputs (``transform``).

    Args:
        epochs_per_task: training epochs per task, one number for all tasks or a list with one number
            per task.
        batch_size: samples of a training batch, over all processes.
        eval_batch_size: samples of an evaluation batch, over all processes.
        validation_fraction: fraction of each class's training samples held out for validation, in
            [0, 1). The test set is never used. Which ones depends on the seed, on the class's label in
            the data set, and on the order of its samples: a stream that continues with the same data set holds
            out what one stream of all tasks does, unless a class has another label there.
        evaluation_split: ``test``, or ``val`` to measure accuracies on the held-out part instead: the test set
            is then not used for anything, so that settings can be chosen by these accuracies.
        augment: randomly crop (and, where it makes sense, flip) training images on the device.
        channels: 1 converts color images to grayscale (Rec. 601 luma, as in Pillow), 3 repeats grayscale
            images as red, green and blue; by default images are unchanged.
        seed: seed of the sample order, the held-out part and the augmentation; by default the seed of
            seed_everything (the variable PL_GLOBAL_SEED), then 0.
        reset_optimizer: ``always`` creates a new optimizer for each task, ``never`` keeps it.
        task_id_at_inference: whether the task ID of a sample is given at inference. If not, methods that need
            it are refused.

    Attributes:
        tasks: the tasks in order, after ``setup``.
        num_classes: the number of output units of the head.
        input_shape: ``(channels, height, width)``, or the shape of one sample of another kind.
        input_dtype: dtype of the outputs of ``prepare``: float32, or int64 for tokens.
        has_validation: whether a part of the training data is held out.
        normalization: mean and standard deviation that ``prepare`` uses.
    """

    epochs_per_task: int | list[int] = 5
    batch_size: int = 32
    eval_batch_size: int = 1000
    validation_fraction: float = 0.0
    evaluation_split: Literal["test", "val"] = "test"
    augment: bool = False
    channels: Literal[1, 3] | None = None
    # None until setup, which may run before or after seed_everything; then an int.
    seed: int = None  # type: ignore[assignment]
    reset_optimizer: Literal["always", "never"] = "always"
    task_id_at_inference: bool = True

    tasks: list[Task] = field(init=False)
    num_classes: int = field(init=False)
    input_shape: tuple[int, ...] = field(init=False)
    input_dtype: torch.dtype = field(init=False)
    has_validation: bool = field(init=False)
    normalization: ChannelStats = field(init=False)

    title: ClassVar[str] = "the data set"
    """The data set's name in messages."""
    constants: ClassVar[ChannelStats | None] = None
    """Known mean and standard deviation of the original channels; None measures them on the first
    task's training samples."""
    holds_out = False
    """Whether the data set itself says which training samples are held out: ``held_out`` of its data."""
    mirrored: ClassVar[bool] = True
    """Whether flipping an image preserves its class; if not, augmentation only crops."""

    def __post_init__(self) -> None:
        super().__init__()
        for name in ("batch_size", "eval_batch_size"):
            check_positive_int(name, getattr(self, name))
        epochs = self.epochs_per_task
        for number in epochs if isinstance(epochs, list) else [epochs]:
            check_positive_int("epochs_per_task", number)
        check_held_out(self.validation_fraction, self.evaluation_split, self.holds_out)
        if self.channels not in (1, 3, None):
            raise ConfigurationError(
                f"Expected channels to be 1, 3 or null, but got {self.channels!r}. 1 is gray, 3 is color."
            )
        self.has_validation = self.validation_fraction > 0 or self.holds_out
        check_choice("reset_optimizer", self.reset_optimizer, ("always", "never"))
        self._parts: dict[Split, _Part] = {}
        self._affine: dict[device, tuple[Tensor, Tensor]] = {}
        self._training_epoch: Callable[[], TrainingEpoch] | None = None  # as the trainer's epochs

    # ---------------------------------------------------------------------- defined by subclasses

    @abstractmethod
    def read(self) -> ImageData:
        """Read all inputs and labels into memory.

        Images are uint8, ``(n, channels, height, width)``; features are floats, ``(n, features, ...)``;
        tokens are int64, ``(n, ...)``.
        """

    @abstractmethod
    def divide(
        self, data: ImageData
    ) -> (
        tuple[list[Task], list[list[int]]]
        | tuple[list[Task], list[list[int]], SamplesOfTasks | None]
    ):
        """Divide the classes, or the samples, into tasks.

        Returns:
            The tasks; for each task the indices of its classes in the data set, in the order of its
            columns; and, if tasks do not contain all samples of their classes, ``{"train": [...], "test":
            [...]}`` with the indices of each task's samples in that part, ``(n,)`` int64. Tasks that share
            a class have to use the same column for it; they may share samples.
        """

    def transform(self, images: Tensor, task: int | Tensor) -> Tensor:
        """Transform the inputs of a task, in training and evaluation; by default they are unchanged.

        Args:
            images: ``(batch, *input_shape)`` float32, normalized, on the device; not to be modified.
            task: the common task ID, or ``(batch,)`` int64, one per image.
        """
        return images

    @property
    def order(self) -> Order:
        """``seed`` if streams of two seeds learn other tasks, or the same in another order."""
        return "fixed"

    def tuning_arguments(self) -> dict[str, Any]:
        """Arguments, after ``setup``, of a stream that settings for this one are tuned on.

        By default none: where the seed draws the tasks, that of the tuning differs; else the tasks are the same.
        """
        return {}

    def known_normalization(self, data: ImageData) -> ChannelStats | None:
        """The ``constants``, if they apply to images with these channels; None measures them."""
        known, channels = self.constants, self.channels
        if known is None or channels in (None, self._native_channels):
            return known
        return ChannelStats(known.mean * 3, known.std * 3) if channels == 3 else None

    @property
    def augmentation(self) -> CropAndFlip:
        """The augmentation: pads by an eighth of the shorter side, then crops to the original size."""
        return CropAndFlip(min(self.input_shape[1:]) // 8, self.mirrored)

    # ---------------------------------------------------------------------- setup

    def epochs_of(self, num_tasks: int) -> list[int]:
        """``epochs_per_task`` as one number per task."""
        epochs = self.epochs_per_task
        if isinstance(epochs, int):
            return [epochs] * num_tasks
        if len(epochs) != num_tasks:
            raise ConfigurationError(
                f"Expected epochs_per_task to have one entry for each of the {num_tasks} tasks, but "
                f"got {len(epochs)}. Give one number for all tasks, or {num_tasks} of them."
            )
        return list(epochs)

    def setup(self, stage: str | None = None) -> None:
        """Read the data and divide them into tasks; later calls do nothing."""
        if self._parts:
            return
        if self.seed is None:
            self.seed = self._past.seed if self._past else run_seed()
        self._set_up_past_data()
        data = self._in_channels(self.read())
        for name in data.class_names:
            if not is_utf8(name):  # results files could not store it
                raise DataError(
                    f"Expected the classes in {data.source} to have names in UTF-8, but got {name!r}. "
                    "Rename it."
                )
        division = Division(*self.divide(data))
        self.tasks = self._after_past(division.tasks)
        self.num_classes = max(task.columns[1] for task in self.tasks)
        inputs = data.train.images
        self.input_shape = tuple(inputs.shape[1:])
        self.input_dtype = torch.int64 if inputs.dtype == torch.int64 else torch.float32
        self._class_names = list(data.class_names)
        self._brightest = 255.0 if inputs.dtype == torch.uint8 else 1.0

        columns = columns_of_classes(division, data.class_names)
        columns = torch.where(columns < 0, columns, columns + self.first_column)
        held = data.held_out
        if held is None:
            held = hold_out(data.train.labels, self.validation_fraction, "validation", self.seed)
        train = Samples(data.train.images, columns[data.train.labels])
        test = Samples(data.test.images, columns[data.test.labels])
        everything = torch.ones(len(test.labels), dtype=torch.bool)
        parts: dict[Split, _Part] = {
            "train": _Part(train, members_of_tasks(division, "train", data.train, ~held)),
            "val": _Part(train, members_of_tasks(division, "train", data.train, held)),
        }
        of_test = _Part(test, members_of_tasks(division, "test", data.test, everything))
        parts["test"] = parts["val"] if self.evaluation_split == "val" else of_test
        refuse = refuse_empty_classes if division.samples is None else refuse_empty_tasks
        for split in ("train", "val", "test") if self.has_validation else ("train", "test"):
            refuse(self.tasks[self.first_task :], *parts[split], split, data.source)
        self.normalization = (
            self._past_normalization()
            or self.known_normalization(data)
            or ChannelStats.of(train, parts["train"].members[0])
        )
        self._affine, self._parts = {}, parts
        self._past_alike = self._past is None or len(self.preparations()) == 1

    def _forget_setup(self) -> None:
        self._parts = {}

    def _in_channels(self, data: ImageData) -> ImageData:
        """Validate the data, and convert images to the requested number of channels."""
        check_data(data)
        if self.augment and (
            data.train.images.dtype != torch.uint8 or data.train.images.dim() != 4
        ):
            raise ConfigurationError(
                "Expected augment to be off, but it is on: these inputs are not images. Leave it out."
            )
        self._native_channels = data.train.images.shape[1] if data.train.images.dim() > 1 else 0
        train, test = (
            Samples(with_channels(part.images, self.channels), part.labels)
            for part in (data.train, data.test)
        )
        return data._replace(train=train, test=test)

    def members(self, task_id: int, split: Split) -> Tensor:
        """Indices of a task's samples in the split: ``(n,)`` int64, ascending."""
        self._refuse_past(task_id)
        return self._parts[split].members[task_id - self.first_task]

    # ---------------------------------------------------------------------- loaders

    def loader(
        self,
        task_id: int,
        split: Split,
        batch_size: int | None = None,
        max_samples: int | None = None,
    ) -> EvaluationLoader:
        """This process's shard of a task, each sample once, in order and without augmentation.

        Args:
            task_id: the task.
            split: "train" (without the held-out part), "val" or "test" (the held-out part where
                ``evaluation_split`` is).
            batch_size: over all processes; None: ``eval_batch_size``.
            max_samples: maximum number of samples over all processes. If the task has more, a random subset
                is used, which depends on the stream's seed, the task and the split.
        """
        size = batch_size or self.eval_batch_size
        if self._past_data is not None and task_id < self.first_task:
            before = cast(ContinualDataModule, self._past_data)
            return before.loader(task_id, split, size, max_samples)
        samples = self._parts[split].samples
        indices, places = self.members(task_id, split), None
        if max_samples is not None and max_samples < len(indices):
            generator = seeded_generator("at most", split, self.seed, task_id)
            drawn = torch.randperm(len(indices), generator=generator)[:max_samples]
            places = drawn.sort().values
            indices = indices[places]
        return EvaluationLoader(samples, indices, task_id, size, self._share(), places)

    def train_loader(
        self, task_id: int, epoch: int, tasks: Sequence[int] | None = None
    ) -> TrainLoader:
        """One training epoch, in an order determined by (seed, task, epoch).

        Args:
            task_id: the task.
            epoch: index of the epoch in the task, over all its phases.
            tasks: the tasks whose data are used, if not only the task's own; batches then have one task
                ID per sample.
        """
        indices, ids, places = self.members(task_id, "train"), None, None
        if tasks is not None and list(tasks) != [task_id]:
            indices, ids, places = self._joined("train", tasks)
        return TrainLoader(
            self._parts["train"].samples,
            indices,
            task_id,
            epoch,
            task_ids=ids,
            seed=self.seed,
            batch_size=self.batch_size,
            processed=self._processed,
            share=self._share(),
            augmentation=self.augmentation if self.augment else None,
            places=places,
        )

    def follow(self, training_epoch: Callable[[], TrainingEpoch]) -> None:
        """Have the loaders that Lightning asks for follow a module with phases of its own.

        Without this, and once a fit or an evaluation has ended, they follow the epochs of the trainer:
        each task for its ``epochs``, in order; the trainer has to ask for each loader, by
        ``reload_dataloaders_every_n_epochs=1``.

        Args:
            training_epoch: returns the epoch that is trained now or next. A function, because Lightning
                asks for an epoch's loader before it calls any hook of that epoch, and on resuming
                before it calls any hook at all.
        """
        self._training_epoch = training_epoch

    def teardown(self, stage: str) -> None:
        """Lightning's hook: the next module may not be the one that was followed."""
        self._training_epoch = None

    def _current_epoch(self) -> TrainingEpoch:
        if self._training_epoch is not None:
            return self._training_epoch()
        if self.trainer is None:
            raise ConfigurationError(
                "Expected a trainer to say which epoch is current, but the stream has none. Pass it to "
                "trainer.fit, or use train_loader(task, epoch)."
            )
        flags: Any = self.trainer  # Lightning sets them dynamically, invisible to type checkers
        if flags.training and flags.reload_dataloaders_every_n_epochs != 1:
            raise ConfigurationError(
                "Expected reload_dataloaders_every_n_epochs to be 1, as every epoch of a stream has its own "
                f"loader, but got {flags.reload_dataloaders_every_n_epochs}. Pass it to the Trainer; with "
                "a ContinualModule that is not needed."
            )
        schedule = Schedule([[Phase("train", task.epochs)] for task in self.tasks])
        task, _, epoch = schedule.locate(self.trainer.current_epoch)
        return TrainingEpoch(task, epoch, [task])

    def train_dataloader(self) -> TrainLoader:
        """The loader of the current epoch."""
        return self.train_loader(*self._current_epoch())

    def val_dataloader(self) -> EvaluationLoader | CombinedLoader:
        """One loader over the held-out parts of the tasks so far, or none without a validation split."""
        if not self.has_validation:
            return _NoLoader([], "sequential")
        return self._joint_loader("val", range(self.first_task, self._current_epoch().task + 1))

    def test_dataloader(self) -> EvaluationLoader:
        """One loader over the test sets of its tasks; batches have one task ID per sample."""
        return self._joint_loader("test", range(self.first_task, len(self.tasks)))

    def predict_dataloader(self) -> EvaluationLoader:
        """The same as ``test_dataloader``."""
        return self.test_dataloader()

    def _joint_loader(self, split: Split, task_ids: range) -> EvaluationLoader:
        indices, ids, places = self._joined(split, task_ids)
        samples, size = self._parts[split].samples, self.eval_batch_size
        return EvaluationLoader(samples, indices, ids, size, self._share(), places)

    def _joined(self, split: Split, task_ids: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        """Indices of the samples of several tasks, the task ID of each, and its place in its task."""
        members = [self.members(task, split) for task in task_ids]
        counts = torch.tensor([len(indices) for indices in members])
        places = torch.cat([torch.arange(len(indices)) for indices in members])
        return torch.cat(members), torch.tensor(task_ids).repeat_interleave(counts), places

    def _share(self) -> Share:
        trainer = self.trainer
        return Share(trainer.global_rank, trainer.world_size) if trainer else Share()

    def _processed(self) -> int:
        if self.trainer is None:
            return 0
        return batches_processed(self.trainer)

    # ---------------------------------------------------------------------- on the device

    def transfer_batch_to_device(self, batch: Batch, device: device, dataloader_idx: int) -> Batch:
        """Lightning's hook: move a batch to the device, unless it is already there."""
        if batch.inputs.device == device:
            return batch
        moved: Batch = super().transfer_batch_to_device(batch, device, dataloader_idx)
        return moved

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Lightning's hook: preprocess a batch on the device."""
        return self.prepare(batch, augment=self.trainer is not None and self.trainer.training)

    def prepare(self, batch: Batch, augment: bool = False) -> Batch:
        """Preprocess raw inputs on their device: augment, normalize, then transform by task.

        Args:
            batch: a batch from a loader.
            augment: whether to augment, if the batch has random numbers for it.
        """
        return self._prepared_as_past(batch) or self._prepare_own(batch, augment)

    def _prepare_own(self, batch: Batch, augment: bool = False) -> Batch:
        images = batch.inputs
        if augment and batch.augmentation is not None:
            images = self.augmentation.apply(images, batch.augmentation)
        inputs = self.transform(self.normalize(images), batch.task)
        return batch._replace(inputs=inputs, augmentation=None)

    def normalize(self, images: Tensor) -> Tensor:
        """Standardize stored inputs to mean 0 and standard deviation 1; tokens are unchanged.

        Args:
            images: ``(batch, *input_shape)``; pixels from 0 to 255, of any dtype.

        Returns:
            The same shape, of ``input_dtype``.
        """
        if self.input_dtype == torch.int64:
            return images
        where = images.device
        if where not in self._affine:  # a copy to the GPU in every step would stall it
            of_one, rank = (*self.normalization, self._brightest), len(self.input_shape)
            self._affine[where] = scale_and_shift(*of_one, rank, where)
        return normalize(images, *self._affine[where], self._brightest)

    def preparation_steps(self) -> list[Step]:
        """The steps of ``prepare`` without augmentation, named as in :mod:`bpn_lightning.preparation`.

        A stream that overrides ``prepare``, ``normalize`` or ``transform`` describes them here, if these
        functions suffice; otherwise only the stream itself can preprocess inputs.
        """
        if self.input_dtype == torch.int64:
            return []
        mean, std = self.normalization
        return [["normalize", list(mean), list(std), self._brightest]]

    def raw_samples(self, task_id: int) -> Tensor:
        """A few raw inputs of a task's source, in the form that ``prepare`` expects."""
        return self._parts["train"].samples.images[:2]

    def raw_shape(self) -> tuple[int, ...]:
        """The shape of one raw input; 0 stands for any size."""
        return tuple(self.raw_samples(0).shape[1:])

    def preparations(self) -> list[Preparation]:
        """What a module saves to preprocess raw inputs of every task without the stream."""
        kind = kind_of(self.raw_samples(0))
        steps, number = self.preparation_steps(), len(self.tasks) - self.first_task
        own = Preparation(number, kind, self.raw_shape(), steps)
        return verified(self, self._with_past(own))
