"""Augmentation as a function of images and random numbers, on any device."""

from dataclasses import dataclass

import torch
from torch import Generator, Tensor
from torch.nn.functional import pad

__all__ = ["CropAndFlip"]


@dataclass(frozen=True)
class CropAndFlip:
    """A random crop of the padded image, optionally followed by a random horizontal flip.

    The random numbers are drawn separately from the images, once per epoch for all processes. Each
    process uses the rows of its own shard, so the result does not depend on the number of processes.

    Args:
        padding: black pixels added on each side of the raw image.
        flip: whether half of the images are flipped horizontally.
        margin: pixels by which the image exceeds the crop, in height and width.
    """

    padding: int
    flip: bool
    margin: int = 0

    def draw(self, count: int, generator: Generator) -> Tensor:
        """Draw random numbers for ``count`` images: ``(count, 3)`` int64, top, left, flipped or not."""
        slack = 2 * self.padding + self.margin
        corners = torch.randint(slack + 1, (count, 2), generator=generator)
        mirrored = torch.randint(1 + self.flip, (count, 1), generator=generator)
        return torch.cat([corners, mirrored], dim=1)

    def apply(self, images: Tensor, draws: Tensor) -> Tensor:
        """Crop and flip each image by its own row of random numbers.

        Args:
            images: ``(batch, channels, height, width)``, any dtype.
            draws: ``(batch, 3)`` int64.

        Returns:
            ``(batch, channels, height - margin, width - margin)``.
        """
        batch, channels, *sides = images.shape
        height, width = (side - self.margin for side in sides)
        top, left, mirrored = draws[:, :, None].unbind(1)
        rows = top + torch.arange(height, device=images.device)
        columns = torch.arange(width, device=images.device)
        columns = left + torch.where(mirrored.bool(), width - 1 - columns, columns)
        pixels = rows[:, :, None] * (sides[1] + 2 * self.padding) + columns[:, None, :]
        padded = pad(images, [self.padding] * 4).flatten(2)
        chosen = pixels.flatten(1)[:, None].expand(-1, channels, -1)
        return padded.gather(2, chosen).view(batch, channels, height, width)
