"""What readers refuse before they read: images and arrays that unpack to too much, ways out of a folder.

Without torch, so that ``bpn-data`` answers at once.
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
from bpn_lightning.untrusted import MOST_TIMES, is_bomb, is_inside, open_untrusted

__all__ = [
    "Fault",
    "Quota",
    "check_paths_inside",
    "matlab_sizes",
    "open_image",
    "refuse_bomb",
    "refuse_damaged",
    "to_uint8",
    "warn_if_dark",
]

MAX_IMAGE_BYTES = 2**30
"""Of a file that holds one image."""

MAX_DECODED_BYTES = 2**30
"""Of all images that are decoded at the same time, by however many threads."""

_MAX_INFLATION = 1032  # of deflate: 258 bytes for 2 bits
_DEFLATED = 15  # the type of a Matlab variable
_CHUNK_BYTES = 2**20

_BYTES_PER_PIXEL = 8  # Pillow keeps 4, and as many of a copy in another mode

MAX_NAMED = 10
"""Damaged files that a message names."""

_PROGRAMS = frozenset({"EPS"})  # Pillow lets Ghostscript run what is in the file

_one_at_a_time = Lock()  # warnings are switched for the whole process


class Quota:
    """A number of bytes that threads share; who asks for more than are left waits for the others.

    Args:
        limit: bytes in all. Who asks for more than that is let in alone.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.used = 0
        self._freed = Condition()

    @contextmanager
    def take(self, count: int) -> Iterator[None]:
        """Hold so many bytes while the block runs."""
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
    named = [f"{one.path} ({one.reason})" for one in others[: MAX_NAMED - 1]]
    if len(faults) > MAX_NAMED:
        named.append(f"and {len(faults) - MAX_NAMED:,} that are not named here")
    many = f". Nor are {len(others):,} more: {'; '.join(named)}" if others else ""
    raise DataError(f"Expected {first.path} to be {wanted}, but got {first.reason}{many}. {remedy}")


@contextmanager
def open_image(path: Path, within: Path | None = None) -> Iterator[Image.Image]:
    """Open an image whose pixels may be decoded: not too many, and of gray ones 16 bits made 8.

    Of 16 bits the upper 8 are taken, as Pillow itself takes of deep colors.

    Its pixels are decoded when they are first asked for. By then the block has its part of
    ``MAX_DECODED_BYTES``, and keeps it: make the image small before the block ends.

    Args:
        path: of the file.
        within: a folder that it has to lie in.

    Raises:
        OSError: it is no regular file, too large, or lies elsewhere.
        ValueError: it has deeper pixels than 16 bits, or more of them than PIL.Image.MAX_IMAGE_PIXELS.
        Exception: whatever Pillow raises on a damaged file.
    """
    with open_untrusted(path, max_bytes=MAX_IMAGE_BYTES, within=within) as file:
        try:
            with _one_at_a_time, warnings.catch_warnings():
                warnings.simplefilter("error", Image.DecompressionBombWarning)
                image = Image.open(file, formats=_formats())
        except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
            raise ValueError(str(error).rstrip(".")) from error
        except UnidentifiedImageError as error:  # which would name the open file
            raise UnidentifiedImageError(f"cannot identify image file {str(path)!r}") from error
        with image, _decoded.take(_BYTES_PER_PIXEL * image.width * image.height):
            deep = image.mode == "F" or image.mode.startswith("I")
            yield _of_sixteen_bits(image) if deep else image


def _of_sixteen_bits(image: Image.Image) -> Image.Image:
    """Gray of 8 bits; Pillow itself would cut deeper pixels off at 255."""
    # Pillow has PNG's and PPM's 16 bits as integers of 32 where it has no mode of their own.
    if not (
        image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM"))
    ):
        raise ValueError(f"pixels that are not of 8 or 16 bits (mode {image.mode})")
    pixels = np.asarray(image)
    gray = Image.fromarray(to_uint8(pixels))
    gray.info["brightest"] = int(pixels.max(initial=0))
    return gray


def to_uint8(pixels: Any) -> Any:
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
    if is_bomb(packed, unpacked):
        raise DataError(
            f"Expected {path} to unpack to at most {MOST_TIMES} times its {packed:,} bytes, but it says "
            f"{unpacked:,}. If it is no attack, write it again without compression."
        )


def matlab_sizes(file: BinaryIO) -> tuple[int, int]:
    """Bytes of a Matlab file as it is, and inflated: what is inside of structures has no other sign.

    Nothing is kept of what is inflated, and a bomb is counted no further than until it is one.

    Raises:
        ValueError, zlib.error: it is damaged.
    """
    packed = file.seek(0, os.SEEK_END)
    file.seek(124)
    order = {b"IM": "<", b"MI": ">"}.get(file.read(4)[2:])
    if order is None or not is_bomb(packed, packed * _MAX_INFLATION):
        return packed, packed  # of version 4, which is not deflated, or too small for a bomb
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
    """Refuse paths that leave a folder, by ``..`` or by a link; the folder itself may be one.

    Args:
        folder: an absolute path.
        paths: of files, as they were put together from the folder and what a list says.

    Raises:
        DataError: names the path and where it leads.
    """
    inside: dict[str, bool] = {}  # folders that were looked at; most files share theirs
    for path in paths:
        text = str(path)
        parent = os.path.dirname(text)
        if parent not in inside:
            inside[parent] = ".." not in path.parts and is_inside(folder, parent)
        if not inside[parent] or (path.is_symlink() and not is_inside(folder, path)):
            raise DataError(
                f"Expected {text!r} to lie in {folder}, but it is or leads elsewhere. Put the file "
                "itself there, or name the folder that has it."
            )
