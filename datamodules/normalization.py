"""Mean and standard deviation of a data set's channels, or features."""

from typing import NamedTuple

import torch
from torch import Tensor

from bpn_lightning.datamodules.loading import Samples

__all__ = ["IDENTITY", "ChannelStats"]


class ChannelStats(NamedTuple):
    """Mean and standard deviation of each channel of images, or of each feature.

    Images use units of the brightest pixel (0 to 1), features their own units.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def of(cls, samples: Samples, indices: Tensor) -> "ChannelStats":
        """Measure some samples in double precision; 0 and 1 for tokens, which are not quantities.

        For images the result is exact, from counts of the 256 values.
        """
        inputs = samples.images[indices]
        if inputs.dtype == torch.int64:
            return IDENTITY
        values = inputs.transpose(0, 1).flatten(1)
        if inputs.dtype == torch.uint8:
            shades = torch.arange(256, dtype=torch.float64) / 255
            shares = torch.stack([channel.bincount(minlength=256) for channel in values]).double()
            shares /= values.shape[1]
            mean = shares @ shades
            std = (shares @ shades.square() - mean.square()).clamp(min=0).sqrt()
        else:
            std, mean = torch.std_mean(values.double(), dim=1, correction=0)
        std[std <= 1e-10 * mean.abs()] = 1  # a channel of one color, a feature of one value
        return cls(tuple(mean.tolist()), tuple(std.tolist()))


IDENTITY = ChannelStats(mean=(0.0,), std=(1.0,))
"""Leaves inputs unchanged."""
