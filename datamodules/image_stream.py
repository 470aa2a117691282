"""One image set as a stream of a single task, over a cache of decoded images."""

import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch

from bpn_lightning.checks import check_positive_int
from bpn_lightning.datamodules.augmentation import CropAndFlip
from bpn_lightning.datamodules.base import ContinualDataModule
from bpn_lightning.datamodules.image_cache import cached_images
from bpn_lightning.datamodules.image_sets import Entry, ImageSet
from bpn_lightning.datamodules.loading import Samples
from bpn_lightning.datamodules.normalization import ChannelStats
from bpn_lightning.datamodules.readers import ImageData
from bpn_lightning.errors import ConfigurationError
from bpn_lightning.preparation import Step, center_crop, resize
from bpn_lightning.tasks import Batch, Task
from bpn_lightning.terminal import printable

__all__ = ["ImageSetStream"]


@dataclass(eq=False, repr=False, kw_only=True)
class ImageSetStream(ContinualDataModule):
    """A published image set as one task, for networks that were trained on ImageNet.

    Every image is scaled to ``resize`` pixels and cached. Training with ``augment`` takes a random crop
    of ``image_size`` pixels, otherwise the center crop is used. Sets of small images are cached in their
    native size and scaled on the device. Normalized by ImageNet's mean and standard deviation.

    Args:
        image_set: the reader.
        cache: the folder of caches.
        image_size: height and width of the network's input, in pixels.
        resize: height and width in pixels of the images that are cropped.
        fit: ``short_side`` scales the shorter side and keeps the central square, ``squeeze`` scales
            both sides.
        flip: whether augmentation also flips horizontally.
        on_corrupt: ``error``, or ``skip`` to omit images that cannot be decoded, with a warning that
            counts them.
        expect_counts: refuse numbers of classes and images other than the published ones.
    """

    image_set: ImageSet
    cache: Path
    image_size: int = 224
    resize: int = 256
    fit: Literal["short_side", "squeeze"] = "short_side"
    flip: bool = True
    on_corrupt: Literal["error", "skip"] = "error"
    expect_counts: bool = True

    channels: Literal[1, 3] | None = field(init=False, default=None)  # always color

    constants = ChannelStats(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))

    def __post_init__(self) -> None:
        super().__post_init__()
        check_sizes(self.image_size, self.resize)

    def read(self) -> ImageData:
        """List the samples and open their caches, which are built if needed."""
        listing = self.image_set.checked(self.expect_counts)
        train, test = (
            self._samples(part, entries)
            for part, entries in (("train", listing.train), ("test", listing.test))
        )
        return ImageData(train, test, listing.class_names, str(self.image_set.folder))

    def _samples(self, part: str, entries: list[Entry]) -> Samples:
        cached = cached_images(
            entries,
            self.image_set.open,
            self.cache,
            name=f"{self.image_set.name}-{part}",
            size=min(self.image_set.native_size or self.resize, self.resize),
            fit=self.fit,
            on_corrupt=self.on_corrupt,
        )
        if cached.damaged:
            first = cached.damaged[0]
            warnings.warn(
                printable(
                    f"{len(cached.damaged):,} of the {len(entries):,} {part} images of "
                    f"{self.image_set.title} are damaged and left out, such as {first.path} "
                    f"({first.reason})."
                ),
                stacklevel=2,
            )
        labels = torch.tensor([entry.label for entry in entries], dtype=torch.int64)
        return Samples(cached.images, labels[cached.kept])

    def divide(self, data: ImageData) -> tuple[list[Task], list[list[int]]]:
        """Put all classes into one task."""
        count = len(data.class_names)
        (epochs,) = self.epochs_of(1)
        return [Task(0, (0, count), tuple(data.class_names), epochs)], [[*range(count)]]

    def setup(self, stage: str | None = None) -> None:
        """Read the set; later calls do nothing."""
        super().setup(stage)
        self.input_shape = (3, self.image_size, self.image_size)

    @property
    def augmentation(self) -> CropAndFlip:
        """A random crop, without padding."""
        return CropAndFlip(0, self.flip, margin=self.resize - self.image_size)

    def prepare(self, batch: Batch, augment: bool = False) -> Batch:
        """Preprocess raw images on their device: resize, crop, normalize.

        Args:
            batch: a batch from a loader.
            augment: whether to use random crops, if the batch has random numbers for them.
        """
        images = resize(batch.inputs, self.resize)
        if not augment or batch.augmentation is None:
            images = center_crop(images, self.image_size)
        return super().prepare(batch._replace(inputs=images), augment)

    def preparation_steps(self) -> list[Step]:
        """Resize, center crop, normalize."""
        sizes: list[Step] = [["resize", self.resize], ["center_crop", self.image_size]]
        return [*sizes, *super().preparation_steps()]

    def raw_shape(self) -> tuple[int, ...]:
        """Square images of any size."""
        return (3, 0, 0)


def check_sizes(image_size: int, resize: int) -> None:
    """Refuse a crop that is larger than the image.

    Raises:
        ConfigurationError: names both sizes.
    """
    check_positive_int("image_size", image_size)
    check_positive_int("resize", resize)
    if image_size > resize:
        raise ConfigurationError(
            f"Expected image_size to be at most resize, but got {image_size} and {resize} pixels. "
            "AlexNet is used with 224 of 256."
        )
