"""What readers refuse before they read: images and arrays that unpack to too much, ways out of a folder.

Without torch, so that ``bpn-data`` answers at once.
"""

import os
import warnings
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from bpn_lightning.errors import DataError

__all__ = [
    "Fault",
    "eight_bits",
    "open_image",
    "refuse_bomb",
    "refuse_damaged",
    "refuse_ways_out",
    "warn_if_dark",
]

MOST_BYTES = 2**30
MOST_TIMES = 100
"""An archive that is larger than this many bytes unpacked must not be this many times its size."""

MOST_NAMED = 10
"""Damaged files that a message names."""

_PROGRAMS = frozenset({"EPS"})  # Pillow lets Ghostscript run what is in the file

_one_at_a_time = Lock()  # warnings are switched for the whole process


@cache
def _formats() -> list[str]:
    """The formats that Pillow decodes by itself."""
    Image.init()
    return [name for name in Image.ID if name not in _PROGRAMS]


class Fault(NamedTuple):
    """A file that cannot be used, and what is wrong with it."""

    path: Path
    reason: str


def refuse_damaged(faults: Sequence[Fault], wanted: str, remedy: str) -> None:
    """Refuse files that cannot be used, ten of them by name.

    Args:
        faults: none, one or many.
        wanted: what each should be.
        remedy: what helps.

    Raises:
        DataError: there is a fault.
    """
    if not faults:
        return
    first, *others = faults
    named = [f"{one.path} ({one.reason})" for one in others[: MOST_NAMED - 1]]
    if len(faults) > MOST_NAMED:
        named.append(f"and {len(faults) - MOST_NAMED:,} that are not named here")
    many = f". Nor are {len(others):,} more: {'; '.join(named)}" if others else ""
    raise DataError(f"Expected {first.path} to be {wanted}, but got {first.reason}{many}. {remedy}")


def open_image(path: Path) -> Image.Image:
    """Open an image whose pixels may be decoded: not too many, and of grey ones 16 bits made 8.

    Of 16 bits the upper 8 are taken, as Pillow itself takes of deep colors.

    Raises:
        ValueError: it has deeper pixels than 16 bits, or more of them than PIL.Image.MAX_IMAGE_PIXELS.
        Exception: whatever Pillow raises on a damaged file.
    """
    try:
        with _one_at_a_time, warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(path, formats=_formats())
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise ValueError(str(error).rstrip(".")) from error
    if image.mode == "F" or image.mode.startswith("I"):
        with image:
            return _of_sixteen_bits(image)
    return image


def _of_sixteen_bits(image: Image.Image) -> Image.Image:
    """Grey of 8 bits; Pillow itself would cut deeper pixels off at 255."""
    # Pillow has PNG's and PPM's 16 bits as integers of 32 where it has no mode of their own.
    if not (
        image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM"))
    ):
        raise ValueError(f"pixels that are not of 8 or 16 bits (mode {image.mode})")
    pixels = np.asarray(image)
    grey = Image.fromarray(eight_bits(pixels))
    grey.info["brightest"] = int(pixels.max(initial=0))
    return grey


def eight_bits(pixels: Any) -> Any:
    """The upper 8 of 16 bits, as Pillow takes of deep colors and torchvision of uint16 images.

    Args:
        pixels: an array of integers from 0 to 65,535, of any shape.

    Returns:
        uint8 of the same shape. An 8-bit image that was written with 16, by ``257 * x`` or ``256 * x``,
        is itself again.
    """
    return (pixels >> 8).astype(np.uint8)


def warn_if_dark(brightest: int, source: str) -> None:
    """Warn of images of 16 bits that use a small part of them, as those of 12-bit cameras do.

    Args:
        brightest: the largest of all their pixels.
        source: where they are.
    """
    if brightest < 2**13:
        warnings.warn(
            f"The brightest of the 16-bit pixels of {source} is {brightest:,} of 65,535, so that they become "
            f"{(brightest >> 8) + 1} of 256 shades. If 65,535 is not their white, scale them to it first.",
            stacklevel=2,
        )


def refuse_bomb(path: Path, packed: int, unpacked: int) -> None:
    """Refuse an archive that says of itself that it unpacks to too much.

    Args:
        path: the archive.
        packed: its bytes.
        unpacked: the bytes that it says it has.

    Raises:
        DataError: names the archive and both sizes.
    """
    if unpacked > MOST_BYTES and unpacked > MOST_TIMES * max(packed, 1):
        raise DataError(
            f"Expected {path} to unpack to at most {MOST_TIMES} times its {packed:,} bytes, but it says "
            f"{unpacked:,}. If it is no attack, write it again without compression."
        )


def refuse_ways_out(folder: Path, paths: Iterable[Path]) -> None:
    """Refuse paths that leave a folder, by ``..`` or by a link; the folder itself may be one.

    Args:
        folder: an absolute path.
        paths: of files, as they were put together from the folder and what a list says.

    Raises:
        DataError: names the path and where it leads.
    """
    real = os.path.realpath(folder)
    inside: dict[str, bool] = {}  # folders that were looked at; most files share theirs

    def is_inside(place: str) -> bool:
        return os.path.commonpath([real, os.path.realpath(place)]) == real

    for path in paths:
        text = str(path)
        parent = os.path.dirname(text)
        try:
            if parent not in inside:
                inside[parent] = ".." not in path.parts and is_inside(parent)
            safe = inside[parent] and (not os.path.islink(text) or is_inside(text))
        except ValueError:  # a null character
            safe = False
        if not safe:
            raise DataError(
                f"Expected {text!r} to lie in {folder}, but it is or leads elsewhere. Put the file "
                "itself there, or name the folder that has it."
            )
