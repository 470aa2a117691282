"""What readers refuse before they read: images and arrays that unpack to too much, ways out of a folder.

Without torch, so that ``bpn-data`` answers at once.
"""

import os
import warnings
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from threading import Lock

from PIL import Image

from bpn_lightning.errors import DataError

__all__ = ["open_image", "refuse_bomb", "refuse_ways_out"]

MOST_BYTES = 2**30
MOST_TIMES = 100
"""An archive that is larger than this many bytes unpacked must not be this many times its size."""

_PROGRAMS = frozenset({"EPS"})  # Pillow lets Ghostscript run what is in the file

_one_at_a_time = Lock()  # warnings are switched for the whole process


@cache
def _formats() -> list[str]:
    """The formats that Pillow decodes by itself."""
    Image.init()
    return [name for name in Image.ID if name not in _PROGRAMS]


def open_image(path: Path) -> Image.Image:
    """Open an image whose pixels may be decoded: 8 bits a channel, and not too many.

    Raises:
        ValueError: it has deeper pixels, or more of them than PIL.Image.MAX_IMAGE_PIXELS.
        Exception: whatever Pillow raises on a damaged file.
    """
    try:
        with _one_at_a_time, warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(path, formats=_formats())
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise ValueError(str(error).rstrip(".")) from error
    if image.mode.startswith(("I", "F")):  # Pillow would cut deeper pixels off at 255
        image.close()
        raise ValueError(f"more than 8 bits per channel (mode {image.mode})")
    return image


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
