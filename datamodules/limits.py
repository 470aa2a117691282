"""Checks before reading: images and arrays that unpack to too much, paths that leave a folder.

Does not import torch, so that ``bpn-data`` starts fast.
"""

import os
import struct
import warnings
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from threading import Condition, Lock
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError

from bpn_lightning.errors import DataError
from bpn_lightning.files.untrusted import MOST_TIMES, is_bomb, is_inside, open_untrusted

__all__ = [
    "Fault",
    "Quota",
    "TooManyPixelsError",
    "check_paths_inside",
    "decode_image",
    "matlab_sizes",
    "open_image",
    "raw_pixels",
    "refuse_bomb",
    "refuse_damaged",
    "to_uint8",
    "warn_if_dark",
]

MAX_IMAGE_BYTES = 2**30
"""Size limit of a file with one image."""

MAX_DECODED_BYTES = 2**30
"""Size limit of all images decoded at the same time, over all threads."""

_MAX_INFLATION = 1032  # of deflate: 258 bytes for 2 bits
_DEFLATED = 15  # the type of a Matlab variable
_CHUNK_BYTES = 2**20

_BYTES_PER_PIXEL = 8  # Pillow uses 4, and as many for a copy in another mode

MAX_NAMED = 10
"""The number of damaged files that a message names."""

_PROGRAMS = frozenset({"EPS"})  # Pillow passes these files to Ghostscript, which executes them

_one_at_a_time = Lock()  # warning filters are global to the process


class Quota:
    """A number of bytes shared by threads; a request for more than is left waits for the others.

    Args:
        limit: total bytes. A larger request is granted when no other is active.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.used = 0
        self._freed = Condition()

    @contextmanager
    def take(self, count: int) -> Iterator[None]:
        """Reserve this many bytes while the block runs."""
        with self._freed:
            self._freed.wait_for(lambda: not self.used or self.used + count <= self.limit)
            self.used += count
        try:
            yield
        finally:
            with self._freed:
                self.used -= count
                self._freed.notify_all()


_decoded = Quota(MAX_DECODED_BYTES)


class TooManyPixelsError(ValueError):
    """An image is larger than allowed."""


@cache
def _formats() -> list[str]:
    """The formats that Pillow decodes without external programs."""
    Image.init()
    return [name for name in Image.ID if name not in _PROGRAMS]


class Fault(NamedTuple):
    """A file that cannot be used, and the reason."""

    path: Path
    reason: str


def refuse_damaged(faults: Sequence[Fault], wanted: str, remedy: str) -> None:
    """Refuse files that cannot be used, naming at most ten of them.

    Args:
        faults: the files, possibly none.
        wanted: what each file should be.
        remedy: how to fix it.

    Raises:
        DataError: ``faults`` is not empty.
    """
    if not faults:
        return
    first, *others = faults
    named = [f"{one.path} ({one.reason})" for one in others[: MAX_NAMED - 1]]
    if len(faults) > MAX_NAMED:
        named.append(f"and {len(faults) - MAX_NAMED:,} more")
    many = f". Nor are {len(others):,} more: {'; '.join(named)}" if others else ""
    raise DataError(f"Expected {first.path} to be {wanted}, but got {first.reason}{many}. {remedy}")


@contextmanager
def open_image(path: Path, within: Path | None = None) -> Iterator[Image.Image]:
    """Open an image for decoding; 16-bit grayscale is reduced to 8 bits.

    The upper 8 of 16 bits are used, as Pillow itself does for 16-bit color.

    Pixels are decoded on first access. The block holds its part of ``MAX_DECODED_BYTES`` until it ends:
    resize the image inside the block.

    Args:
        path: the file.
        within: a folder that has to contain the file.

    Raises:
        OSError: the file is not regular, too large, or outside the folder.
        ValueError: pixels have more than 16 bits, or there are more than PIL.Image.MAX_IMAGE_PIXELS.
        Exception: Pillow may raise any exception on a damaged file.
    """
    with (
        open_untrusted(path, max_bytes=MAX_IMAGE_BYTES, within=within) as file,
        decode_image(file, repr(str(path))) as image,
    ):
        yield image


@contextmanager
def decode_image(file: BinaryIO, name: str, max_pixels: int | None = None) -> Iterator[Image.Image]:
    """As :func:`open_image`, of a file that is open.

    Args:
        file: of an image.
        name: in messages.
        max_pixels: height x width; None: PIL.Image.MAX_IMAGE_PIXELS.
    """
    try:
        with _one_at_a_time, warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(file, formats=_formats())
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise TooManyPixelsError(str(error).rstrip(".")) from error
    except UnidentifiedImageError as error:  # its own message would show the file object
        raise UnidentifiedImageError(f"cannot identify image file {name}") from error
    if max_pixels is not None and image.width * image.height > max_pixels:
        raise TooManyPixelsError(f"{image.width} x {image.height} pixels, more than {max_pixels:,}")
    with image, _decoded.take(_BYTES_PER_PIXEL * image.width * image.height):
        deep = image.mode == "F" or image.mode.startswith("I")
        yield _of_sixteen_bits(image) if deep else image


def raw_pixels(image: Image.Image, shape: tuple[int, ...]) -> Any:
    """An image as a network takes it.

    Args:
        image: of any size.
        shape: ``(channels, height, width)``, with 1 or 3 channels; 0 for the sides of square images of any size.

    Returns:
        ``(channels, height, width)`` uint8, resized where the size is given.

    Raises:
        ValueError: the image is not square where it has to be.
    """
    channels, height, width = shape
    image = image.convert("L" if channels == 1 else "RGB")
    if not height and image.width != image.height:
        raise ValueError(f"{image.width} x {image.height} pixels where images have to be square")
    if height and image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.BILINEAR)
    pixels = np.asarray(image, dtype=np.uint8)
    return pixels.reshape(*pixels.shape[:2], channels).transpose(2, 0, 1)


def _of_sixteen_bits(image: Image.Image) -> Image.Image:
    """Convert to 8-bit grayscale; Pillow itself would clip larger values at 255."""
    # Pillow opens some 16-bit PNG and PPM files as 32-bit integers.
    if not (
        image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM"))
    ):
        raise ValueError(f"pixels that are not of 8 or 16 bits (mode {image.mode})")
    pixels = np.asarray(image)
    gray = Image.fromarray(to_uint8(pixels))
    gray.info["brightest"] = int(pixels.max(initial=0))
    return gray


def to_uint8(pixels: Any) -> Any:
    """Keep the upper 8 of 16 bits, like Pillow for 16-bit color and torchvision for uint16 images.

    Args:
        pixels: an array of integers from 0 to 65,535, of any shape.

    Returns:
        uint8 of the same shape. An 8-bit image stored as 16 bits, by ``257 * x`` or ``256 * x``, is restored
        exactly.
    """
    return (pixels >> 8).astype(np.uint8)


def warn_if_dark(brightest: int, source: str) -> None:
    """Warn about 16-bit images with a small range of values, such as those of 12-bit cameras.

    Args:
        brightest: the largest pixel value of all images.
        source: where the images are.
    """
    if brightest < 2**13:
        warnings.warn(
            f"The maximum of the 16-bit pixels of {source} is {brightest:,} of 65,535, so that they become "
            f"{(brightest >> 8) + 1} of 256 shades. If 65,535 is not white, rescale them first.",
            stacklevel=2,
        )


def refuse_bomb(path: Path, packed: int, unpacked: int) -> None:
    """Refuse an archive whose declared unpacked size is too large.

    Args:
        path: the archive.
        packed: its size in bytes.
        unpacked: its declared unpacked size in bytes.

    Raises:
        DataError: names the archive and both sizes.
    """
    if is_bomb(packed, unpacked):
        raise DataError(
            f"Expected {path} to unpack to at most {MOST_TIMES} times its {packed:,} bytes, but it declares "
            f"{unpacked:,}. If you trust it, save it again without compression."
        )


def matlab_sizes(file: BinaryIO) -> tuple[int, int]:
    """Measure a Matlab file in bytes, packed and inflated; the size of structures is not declared.

    Inflated data are not stored, and counting stops once the file is known to be a bomb.

    Raises:
        ValueError, zlib.error: the file is damaged.
    """
    packed = file.seek(0, os.SEEK_END)
    file.seek(124)
    order = {b"IM": "<", b"MI": ">"}.get(file.read(4)[2:])
    if order is None or not is_bomb(packed, packed * _MAX_INFLATION):
        return packed, packed  # version 4, which is not compressed, or too small for a bomb
    inflated = 0
    while len(tag := file.read(8)) == 8 and not is_bomb(packed, inflated):
        kind, left = struct.unpack(f"{order}II", tag)
        if kind != _DEFLATED:
            inflated += left
            file.seek(left, os.SEEK_CUR)
            continue
        stream = zlib.decompressobj()
        while left and not stream.eof and not is_bomb(packed, inflated):
            part = file.read(min(left, _CHUNK_BYTES))
            if not part:
                raise ValueError("it ends within a variable")
            left -= len(part)
            while part and not is_bomb(packed, inflated):
                inflated += len(stream.decompress(part, _CHUNK_BYTES))
                part = stream.unconsumed_tail
        file.seek(left, os.SEEK_CUR)
    return packed, inflated


def check_paths_inside(folder: Path, paths: Iterable[Path]) -> None:
    """Refuse paths that leave a folder by ``..`` or a link; the folder itself may be a link.

    Args:
        folder: an absolute path.
        paths: paths of files, joined from the folder and the entries of a list.

    Raises:
        DataError: names the path and where it leads.
    """
    inside: dict[str, bool] = {}  # checked folders; most files share one
    for path in paths:
        text = str(path)
        parent = os.path.dirname(text)
        if parent not in inside:
            inside[parent] = ".." not in path.parts and is_inside(folder, parent)
        if not inside[parent] or (path.is_symlink() and not is_inside(folder, path)):
            raise DataError(
                f"Expected {text!r} to be in {folder}, but it is or leads elsewhere. Put the file "
                "itself there, or name its folder."
            )
