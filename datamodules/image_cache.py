"""A memory-mapped cache of decoded and resized images."""

import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from bpn_lightning.datamodules.image_sets.listing import Entry
from bpn_lightning.datamodules.limits import Fault, refuse_damaged
from bpn_lightning.errors import ConfigurationError, DataError
from bpn_lightning.files.untrusted import open_untrusted, read_json

__all__ = ["CachedImages", "Damage", "cached_images"]

Fit = Literal["short_side", "squeeze"]

_FORMAT = 1  # increase when the pixels of a cache change
_CHUNK = 256  # images that are decoded before they are written


class Damage(NamedTuple):
    """An image that could not be decoded: its file, and what was wrong."""

    path: str
    reason: str


class CachedImages(NamedTuple):
    """The contents of a cache.

    Attributes:
        images: ``(n, 3, size, size)`` uint8, memory-mapped.
        kept: ``(n,)`` int64, the indices of these images among the requested entries.
        damaged: the omitted images.
    """

    images: Tensor
    kept: Tensor
    damaged: list[Damage]


def cached_images(
    entries: Sequence[Entry],
    decode: Callable[[Entry], AbstractContextManager[Image.Image]],
    folder: Path,
    *,
    name: str,
    size: int,
    fit: Fit = "short_side",
    on_corrupt: Literal["error", "skip"] = "error",
) -> CachedImages:
    """Return the images of ``entries`` from a cache, which is built if there is none.

    A cache is identified by its settings and its content: the path, size, modification time, box and
    index of every entry. If any of these changes, another cache is built. It is built under a lock and
    renamed when it is complete: one process builds it while the others wait.

    Args:
        entries: the images to read; labels are ignored.
        decode: opens an entry as an RGB image, which is closed as soon as it is resized.
        folder: the folder of caches; created if needed.
        name: prefix of the cache's own folder.
        size: height and width in pixels.
        fit: ``short_side`` scales the shorter side to ``size`` and keeps the central square,
            ``squeeze`` scales both sides.
        on_corrupt: ``error``, or ``skip`` to omit images that cannot be decoded.

    Raises:
        DataError: an image is damaged, the folder is not writable, or the disk is full.
    """
    if on_corrupt not in ("error", "skip") or fit not in ("short_side", "squeeze"):
        raise ConfigurationError(
            "Expected on_corrupt to be error or skip and fit to be short_side or squeeze, but got "
            f"{on_corrupt!r} and {fit!r}."
        )
    key = _key(entries, size, fit)
    cache = folder / f"{name}-{size}-{key}"
    if not _is_complete(cache):
        with _writable(folder, len(entries) * 3 * size * size):
            folder.mkdir(parents=True, exist_ok=True)
            with _locked(folder / f".{cache.name}.lock"):
                if not _is_complete(cache):
                    _build(cache, entries, decode, size, fit, on_corrupt)
    return _open(cache, len(entries), size, on_corrupt)


def _key(entries: Sequence[Entry], size: int, fit: str) -> str:
    """Hash settings and content; a file with several entries is inspected once."""
    digest = blake2b(repr((_FORMAT, size, fit)).encode(), digest_size=10)
    seen: dict[Path, tuple[int, int]] = {}
    for entry in entries:
        if entry.path not in seen:
            status = entry.path.stat()
            seen[entry.path] = (status.st_size, status.st_mtime_ns)
        digest.update(repr((str(entry.path), seen[entry.path], entry.box, entry.place)).encode())
    return digest.hexdigest()


def _is_complete(cache: Path) -> bool:
    return (cache / "index.json").is_file()


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock; the system releases it if its holder dies."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def _writable(folder: Path, size: int) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DataError(
            f"Expected {folder} to be writable, with {size / 1e9:.2f} GB of free space for decoded "
            f"images, but got {type(error).__name__}: {error}. Free space there, or name another "
            "folder with cache_dir."
        ) from error


def _build(
    cache: Path,
    entries: Sequence[Entry],
    decode: Callable[[Entry], AbstractContextManager[Image.Image]],
    size: int,
    fit: Fit,
    on_corrupt: str,
) -> None:
    """Write to a temporary folder, then rename it; on an error nothing is left."""
    temporary = cache.with_name(f".{cache.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)  # left by a process that died: we hold the lock
    shutil.rmtree(cache, ignore_errors=True)
    temporary.mkdir()
    try:
        needed, free = len(entries) * 3 * size * size, shutil.disk_usage(temporary).free
        if needed > free:
            raise OSError(f"no more than {free / 1e9:.2f} GB are free")
        damaged: dict[int, Damage] = {}
        with (temporary / "images.uint8").open("wb") as file:
            for place, pixels in enumerate(_decoded(entries, decode, size, fit)):
                if isinstance(pixels, Damage):
                    damaged[place] = pixels
                else:
                    file.write(pixels.tobytes())
            file.flush()
            os.fsync(file.fileno())
        _refuse(damaged, on_corrupt)
        (temporary / "index.json").write_text(json.dumps(damaged), encoding="utf-8")
        temporary.rename(cache)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _decoded(
    entries: Sequence[Entry],
    decode: Callable[[Entry], AbstractContextManager[Image.Image]],
    size: int,
    fit: Fit,
) -> Iterator[Any]:
    """Pixels ``(3, size, size)`` or the damage of each entry, in order, in chunks."""

    def pixels(entry: Entry) -> Any:
        try:
            with decode(entry) as image:
                return _resized(image, size, fit)
        except MemoryError:
            raise
        # Pillow may raise any exception here: OSError, SyntaxError, ValueError, struct.error ...
        except Exception as error:  # noqa: BLE001
            return Damage(str(entry.path), f"{type(error).__name__}: {error}")

    # Pillow releases the GIL while it decodes, and reading waits for the disk.
    with ThreadPoolExecutor(min(16, 2 * (os.cpu_count() or 1))) as pool:
        for start in range(0, len(entries), _CHUNK):
            yield from pool.map(pixels, entries[start : start + _CHUNK])


def _resized(image: Image.Image, size: int, fit: Fit) -> Any:
    width, height = image.size
    if fit == "short_side":
        short = min(width, height)
        width, height = size * width // short, size * height // short
    else:
        width, height = size, size
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.BILINEAR)
    left, top = round((width - size) / 2), round((height - size) / 2)
    image = image.crop((left, top, left + size, top + size))
    return np.asarray(image.convert("RGB")).transpose(2, 0, 1)


def _refuse(damaged: dict[int, Damage], on_corrupt: str) -> None:
    if on_corrupt == "error":
        refuse_damaged(
            [Fault(Path(one.path), one.reason) for _, one in sorted(damaged.items())],
            "an intact image",
            "Replace the file, or set on_corrupt to skip to leave damaged images out.",
        )


def _open(cache: Path, count: int, size: int, on_corrupt: str) -> CachedImages:
    index = read_json(cache / "index.json")
    damaged = {int(place): Damage(*values) for place, values in index.items()}
    _refuse(damaged, on_corrupt)
    kept = [place for place in range(count) if place not in damaged]
    shape = (len(kept), 3, size, size)
    # Copy-on-write, because torch expects writable arrays; nothing is ever written.
    images = np.empty(shape, np.uint8)
    if kept:
        with open_untrusted(cache / "images.uint8", max_bytes=None) as file:
            images = np.memmap(file, np.uint8, "c", shape=shape)
    return CachedImages(torch.from_numpy(images), torch.tensor(kept), [*damaged.values()])
