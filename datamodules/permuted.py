"""MNIST with a different transform of the pixels per task: permuted or rotated."""

from abc import abstractmethod
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from bpn_lightning.checks import check_positive_int
from bpn_lightning.datamodules.base import ContinualDataModule
from bpn_lightning.datamodules.normalization import ChannelStats
from bpn_lightning.datamodules.readers import ImageData
from bpn_lightning.datamodules.torchvision_sets import SplitMNIST
from bpn_lightning.errors import ConfigurationError
from bpn_lightning.preparation import Step, permutation, permute, rotate
from bpn_lightning.random_state import seeded_generator
from bpn_lightning.tasks import Order, Split, Task

__all__ = ["PermutedMNIST", "RotatedMNIST"]


@dataclass(eq=False, repr=False)
class _TransformedMNIST(ContinualDataModule):
    """All ten digits in every task, with one transform per task.

    Args:
        root: the folder of data sets, as in SplitMNIST; by default the environment variable BPN_DATA,
            then ``data``.
        download: whether to download torchvision's files if they are missing.
        padding: black pixels on every side of an image; 2 makes 32 x 32 of 28 x 28.
        num_tasks: number of tasks; the images are stored once for all of them.
        train_samples: training images per task, a separate random subset for each; by default all.
        test_samples: test images per task, likewise; by default all 10,000.
    """

    root: str | None = None
    download: bool = True
    padding: int = 0
    num_tasks: int = 10
    train_samples: int | None = None
    test_samples: int | None = None

    title = "MNIST"
    mirrored = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive_int("num_tasks", self.num_tasks)
        self.epochs_of(self.num_tasks)
        for name in ("train_samples", "test_samples"):
            if getattr(self, name) is not None:
                check_positive_int(name, getattr(self, name))
        self._mnist = SplitMNIST(root=self.root, download=self.download, padding=self.padding)

    @property
    def constants(self) -> ChannelStats:  # type: ignore[override]
        """The constants of MNIST, before the transform."""
        return self._mnist.constants

    def prepare_data(self) -> None:
        """Download what is missing; Lightning calls this in one process only."""
        self._mnist.prepare_data()

    def read(self) -> ImageData:
        """Read MNIST, once for all tasks."""
        return self._mnist.read()

    def divide(self, data: ImageData) -> tuple[list[Task], list[list[int]]]:
        """Give every task all classes, with the same columns of the head."""
        count, names = len(data.class_names), tuple(data.class_names)
        epochs = self.epochs_of(self.num_tasks)
        tasks = [Task(k, (0, count), names, epochs[k]) for k in range(self.num_tasks)]
        return tasks, [[*range(count)]] * self.num_tasks

    def setup(self, stage: str | None = None) -> None:
        """Read the data; later calls do nothing."""
        super().setup(stage)
        for name, split in _DRAWN.items():
            wanted, found = self._wanted(split), len(super().members(self.first_task, split))
            if wanted is not None and wanted > found:
                raise ConfigurationError(
                    f"Expected {name} to be at most the {found:,} available images, but got "
                    f"{wanted:,}. Lower it, or leave it out for all."
                )

    def members(self, task_id: int, split: Split) -> Tensor:
        """All samples, or the task's random subset, which is drawn again at every call instead of stored."""
        everything = super().members(task_id, split)
        count = self._wanted(split)
        if count is None:
            return everything
        generator = seeded_generator("samples", split, self.seed, task_id)
        drawn = torch.randperm(len(everything), generator=generator)[:count]
        return everything[drawn.sort().values]

    def _wanted(self, split: Split) -> int | None:
        """Samples of each task; None for all, as of the held-out part wherever it is evaluated."""
        if split == "test" and self.evaluation_split == "val":
            return None
        return {"train": self.train_samples, "test": self.test_samples}.get(split)

    def transform(self, images: Tensor, task: int | Tensor) -> Tensor:
        """Apply the transform of each image's task."""
        if isinstance(task, int):
            return self.transform_of(task, images)
        result = torch.empty_like(images)
        for one in sorted(set(task.tolist())):
            own = task.to(images.device) == one
            result[own] = self.transform_of(one, images[own])
        return result

    @abstractmethod
    def transform_of(self, task_id: int, images: Tensor) -> Tensor:
        """Transform normalized images of one task, ``(batch, 1, height, width)``."""


PROBE = 16
"""The number of pixels that verify whether another version of torch draws the same permutation."""

_DRAWN: dict[str, Split] = {"train_samples": "train", "test_samples": "test"}


class _Used(NamedTuple):
    """The most recently used permutation."""

    task_id: int
    pixels: Tensor


@dataclass(eq=False, repr=False)
class PermutedMNIST(_TransformedMNIST):
    """MNIST with one random permutation of the pixels per task (Goodfellow et al., 2013).

    A permutation depends only on the stream's seed and the task, so the first tasks of a long stream
    equal those of a short one. It is a gather on the device; the images and only the current permutation
    are stored. https://arxiv.org/abs/1312.6211

    Args:
        permute_first_task: whether the first task is permuted as well, as in Wen et al., who permute
            all of their hundred tasks; otherwise it is plain MNIST.
    """

    permute_first_task: bool = True

    @property
    def order(self) -> Order:
        """The seed draws the permutations."""
        return "seed"

    def permutation(self, task_id: int) -> Tensor:
        """The original index of each permuted pixel: ``(height * width,)`` int64.

        Args:
            task_id: the task ID, from 0.
        """
        pixels = self.input_shape[1] * self.input_shape[2]
        if task_id == 0 and not self.permute_first_task:
            return torch.arange(pixels)
        return permutation(self.seed, task_id, pixels)

    def transform_of(self, task_id: int, images: Tensor) -> Tensor:
        """Gather the pixels in the task's order."""
        if task_id == 0 and not self.permute_first_task:
            return images
        used = getattr(self, "_used", None)
        if used is None or used.task_id != task_id or used.pixels.device != images.device:
            self._used = used = _Used(task_id, self.permutation(task_id).to(images.device))
        return permute(images, used.pixels)

    def preparation_steps(self) -> list[Step]:
        """Normalize, then permute; includes the first pixels of task 1 to verify torch's random numbers."""
        pixels = self.input_shape[1] * self.input_shape[2]
        probe = permutation(self.seed, 1, pixels)[:PROBE].tolist()
        own: Step = ["permute", self.seed, self.permute_first_task, probe]
        return [*super().preparation_steps(), own]


@dataclass(eq=False, repr=False)
class RotatedMNIST(_TransformedMNIST):
    """MNIST with the images of each task rotated by one angle (Lopez-Paz & Ranzato, 2017).

    Task k is rotated counterclockwise by ``k * max_angle / num_tasks`` degrees, by bilinear
    interpolation on the device, from images that are stored once; pixels from outside the image are
    black. https://arxiv.org/abs/1706.08840

    Differs from the paper: the angles are evenly spaced rather than drawn.

    Args:
        max_angle: rotation in degrees of the task that would follow the last one.
    """

    max_angle: float = 180.0

    def angle(self, task_id: int) -> float:
        """The angle in degrees, counterclockwise."""
        return task_id * self.max_angle / self.num_tasks

    def transform_of(self, task_id: int, images: Tensor) -> Tensor:
        """Rotate around the center of the image."""
        black = self.normalize(torch.zeros_like(images[:1, :, :1, :1]))
        return rotate(images, self.angle(task_id), black)

    def preparation_steps(self) -> list[Step]:
        """Normalize, then rotate."""
        black = float(self.normalize(torch.zeros(1, 1, 1, 1)))
        own: Step = ["rotate", self.max_angle, self.num_tasks, black]
        return [*super().preparation_steps(), own]
