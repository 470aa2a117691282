"""Augmentation as a function of images and random numbers, on whatever device they lie."""

from dataclasses import dataclass

import torch
from torch import Generator, Tensor
from torch.nn.functional import pad

__all__ = ["CropAndFlip"]


@dataclass(frozen=True)
class CropAndFlip:
    """A random window of the padded image, then, if asked for, its mirror image half of the time.

    The numbers are drawn apart from the images: once for a whole epoch over all processes, so that
    every process takes its own rows and several see what one would have seen.

    Args:
        padding: pixels added on each side, black in the raw image.
        flip: whether images may be mirrored left to right.
        margin: pixels by which the image is higher and wider than what is wanted of it.
    """

    padding: int
    flip: bool
    margin: int = 0

    def draw(self, count: int, generator: Generator) -> Tensor:
        """Draw the numbers for ``count`` images: ``(count, 3)`` int64, top, left, mirrored or not."""
        slack = 2 * self.padding + self.margin
        corners = torch.randint(slack + 1, (count, 2), generator=generator)
        mirrored = torch.randint(1 + self.flip, (count, 1), generator=generator)
        return torch.cat([corners, mirrored], dim=1)

    def apply(self, images: Tensor, draws: Tensor) -> Tensor:
        """Crop and mirror each image by its own row of numbers.

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
