"""Made data: images that say who they are, and folders of images."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from bpn_lightning.datamodules.class_incremental import ClassIncrementalDataModule
from bpn_lightning.datamodules.loading import Samples
from bpn_lightning.datamodules.readers import ImageData


@dataclass(eq=False, repr=False)
class Toy(ClassIncrementalDataModule):
    """Six classes of unequal size; each image's pixels are its number, its class and its part."""

    classes: tuple[str, ...] = ("ant", "bee", "cat", "dog", "elk", "fox")
    train_counts: tuple[int, ...] = (13, 8, 11, 9, 10, 7)
    test_counts: tuple[int, ...] = (4, 3, 5, 2, 3, 4)
    title = "the toy"

    def read(self) -> ImageData:
        return ImageData(
            self.read_part(0, self.train_counts),
            self.read_part(1, self.test_counts),
            [*self.classes],
            "here",
        )

    @staticmethod
    def read_part(part: int, counts: tuple[int, ...]) -> Samples:
        labels = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
        labels = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(part))]
        number = torch.arange(len(labels))
        images = torch.stack([number, labels, torch.full_like(labels, part)], dim=1).byte()
        return Samples(images[:, :, None, None].expand(-1, -1, 8, 8).contiguous(), labels)


@pytest.fixture
def toy() -> Callable[..., Toy]:
    def make(**arguments: object) -> Toy:
        stream = Toy(**arguments)  # type: ignore[arg-type]
        stream.setup()
        return stream

    return make


@pytest.fixture
def write_tree() -> Callable[..., dict[str, np.ndarray]]:
    """Write random images as ``<folder>/{train,test}/<class>/<i>.png``."""

    def write(
        folder: Path,
        classes: tuple[str, ...],
        size: tuple[int, ...] = (32, 32, 3),
        count: int = 3,
        suffix: str = ".png",
    ) -> dict[str, np.ndarray]:
        generator = np.random.default_rng(0)
        written = {}
        for part in ("train", "test"):
            for name in classes:
                (folder / part / name).mkdir(parents=True)
                for i in range(count):
                    pixels = generator.integers(256, size=size, dtype=np.uint8)
                    Image.fromarray(pixels).save(folder / part / name / f"{i}{suffix}")
                    written[f"{part}/{name}/{i}"] = pixels
        return written

    return write
