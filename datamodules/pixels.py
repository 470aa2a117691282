"""Conversion between grayscale and color."""

import torch
from torch import Tensor

from bpn_lightning.errors import ConfigurationError

__all__ = ["luma", "with_channels"]

#: Weights of red, green and blue of Rec. 601 in units of 2**-16, as in Pillow.
_WEIGHTS = (19595, 38470, 7471)
_CHUNK = 4096  # images converted to 32-bit integers at a time


def luma(images: Tensor) -> Tensor:
    """Convert color to grayscale, bit for bit like Pillow's ``convert("L")``.

    Args:
        images: ``(n, 3, height, width)`` uint8.

    Returns:
        ``(n, 1, height, width)`` uint8.
    """
    gray = torch.empty_like(images[:, :1])
    weights = torch.tensor(_WEIGHTS, dtype=torch.int32)[:, None, None]
    for start in range(0, len(images), _CHUNK):
        part = slice(start, start + _CHUNK)
        summed = (images[part].int() * weights).sum(1, keepdim=True, dtype=torch.int32)
        gray[part] = ((summed + 0x8000) >> 16).byte()
    return gray


def with_channels(images: Tensor, channels: int | None) -> Tensor:
    """Convert images to one or three channels.

    Args:
        images: ``(n, channels, height, width)`` uint8.
        channels: 1 converts color to grayscale, 3 repeats grayscale as red, green and blue without a
            copy; None leaves images unchanged.

    Raises:
        ConfigurationError: inputs are not images with one or three channels.
    """
    if channels is None:
        return images
    if images.dtype != torch.uint8 or images.dim() != 4 or images.shape[1] not in (1, 3):
        got = "no images" if images.dtype != torch.uint8 else f"{tuple(images.shape[1:])}"
        raise ConfigurationError(
            "Expected channels to be null unless inputs are images with 1 or 3 channels, but got "
            f"{channels} for {got}. Leave it out."
        )
    if images.shape[1] == channels:
        return images
    return luma(images) if channels == 1 else images.expand(-1, 3, -1, -1)
