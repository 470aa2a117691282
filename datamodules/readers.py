"""Readers of class folders and archives, with one clear error for each kind of invalid file."""

import os
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from zipfile import is_zipfile

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from bpn_lightning.datamodules.limits import (
    Fault,
    check_paths_inside,
    open_image,
    refuse_bomb,
    refuse_damaged,
    warn_if_dark,
)
from bpn_lightning.datamodules.loading import Samples
from bpn_lightning.errors import DataError
from bpn_lightning.files.untrusted import open_untrusted
from bpn_lightning.terminal import is_utf8

__all__ = ["ImageData", "has_class_folders", "list_class_folders", "read_class_folders", "read_npz"]


class ImageData(NamedTuple):
    """The result of a reader.

    Attributes:
        train: the training part; labels are indices into ``class_names``.
        test: the test part, likewise.
        class_names: the classes in the data set's own order.
        source: where the data come from, for messages.
        held_out: which training samples the data set itself holds out for validation, ``(n,)`` bool; None if
            it says nothing of it.
    """

    train: Samples
    test: Samples
    class_names: list[str]
    source: str
    held_out: Tensor | None = None


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DataError(
            f"Expected {path} to be readable, but got {type(error).__name__}: {error}. "
            "Check that it exists and its permissions, or name another path."
        ) from error


# ------------------------------------------------------------------------------- class folders


def has_class_folders(folder: Path) -> bool:
    """Whether ``folder`` contains ``train/`` or ``test/``."""
    with _readable(folder):
        return any((folder / part).is_dir() for part in ("train", "test"))


def read_class_folders(
    folder: Path, channels: int, height: int, width: int, resize: bool
) -> ImageData:
    """Read ``<folder>/{train,test}/<class>/*``, in every image format that Pillow reads.

    Files with other suffixes are skipped. Classes are in alphabetical order. The folder may be a link;
    links inside it must not lead out of it.

    Args:
        folder: an absolute path.
        channels: 1 reads grayscale, 3 color.
        height: height of each image, in pixels.
        width: width of each image, in pixels.
        resize: whether to resize images of other sizes; if not, they are an error.

    Raises:
        DataError: a folder is missing or unreadable, or an image is damaged or has another size.
    """
    files = list_class_folders(folder)
    class_names = sorted(files["train"].keys() | files["test"].keys())
    size = (channels, height, width)

    labeled = {
        part: [
            (path, label)
            for label, name in enumerate(class_names)
            for path in files[part].get(name, [])
        ]
        for part in files
    }
    images = {part: np.empty((len(of), *size), dtype=np.uint8) for part, of in labeled.items()}
    deep: list[int] = []  # the brightest pixel of each 16-bit image

    def decode(place: tuple[str, int]) -> Fault | None:
        part, number = place
        path = labeled[part][number][0]
        try:
            images[part][number] = _decode(path, folder, *size, resize, deep)
        # Pillow may raise any exception here: OSError, SyntaxError, ValueError, struct.error,
        # zlib.error ...
        except Exception as error:  # noqa: BLE001
            return Fault(path, f"{type(error).__name__}: {error}")
        return None

    places = [(part, number) for part in labeled for number in range(len(labeled[part]))]
    # Pillow releases the GIL while it decodes, and reading waits for the disk.
    with ThreadPoolExecutor(min(16, 2 * (os.cpu_count() or 1))) as pool:
        refuse_damaged(
            [fault for fault in pool.map(decode, places) if fault],
            "an intact image that fits the data set",
            "Replace the file or delete it.",
        )

    if deep:
        warn_if_dark(max(deep), str(folder))

    def samples(part: str) -> Samples:
        labels = torch.tensor([label for _, label in labeled[part]], dtype=torch.int64)
        return Samples(torch.from_numpy(images[part]), labels)

    return ImageData(samples("train"), samples("test"), class_names, str(folder))


def list_class_folders(folder: Path) -> dict[str, dict[str, list[Path]]]:
    """The images of ``<folder>/{train,test}/<class>/`` by part and class, as their suffixes tell.

    Raises:
        DataError: a folder is missing or unreadable, or a path leads out of it.
    """
    suffixes = frozenset(Image.registered_extensions())
    files = {part: _list_class_folders(folder / part, suffixes) for part in ("train", "test")}
    check_paths_inside(
        folder, (path for part in files.values() for of in part.values() for path in of)
    )
    return files


def _list_class_folders(part: Path, suffixes: frozenset[str]) -> dict[str, list[Path]]:
    if not part.is_dir():
        raise DataError(
            f"Expected the folder {part} with one folder of images per class, but it does not exist. "
            f"{_layout_remedy(part, suffixes)}"
        )
    with _readable(part):
        folders = [
            folder
            for folder in sorted(part.iterdir())
            if folder.is_dir() and not folder.name.startswith(".")
        ]
        for folder in folders:
            if not is_utf8(folder.name):  # results files could not store the class
                raise DataError(
                    f"Expected the folders in {part} to have names in UTF-8, but got {folder.name!r}. "
                    "Rename it."
                )
        return {
            folder.name: [
                path
                for path in sorted(folder.iterdir())
                if path.suffix.lower() in suffixes and not path.name.startswith(".")
            ]
            for folder in folders
        }


def _layout_remedy(missing: Path, suffixes: frozenset[str]) -> str:
    """How to arrange the images into ``train/`` and ``test/``, depending on the current layout."""
    root = missing.parent
    arranged = f"{root}{os.sep}{{train,test}}{os.sep}<class>{os.sep}"
    if not root.is_dir():
        return f"There is no folder {root}: name the one that holds train and test."
    with _readable(root):
        if root.name in ("train", "test") and (root.parent / "train").is_dir():
            return f"Name {root.parent} instead, the folder that holds train and test."
        folders = [one for one in sorted(root.iterdir()) if one.is_dir()]
        inner = [
            one for one in folders if {"train", "test"} <= {part.name for part in one.iterdir()}
        ]
        if inner:
            return f"Name {inner[0]} instead, which holds train and test."
        classes = [
            one.name
            for one in folders
            if one.name not in ("train", "test")
            and any(file.suffix.lower() in suffixes for file in one.iterdir())
        ]
        other = {"train": "test", "test": "train"}[missing.name]
        if (root / other).is_dir():
            return (
                f"There is {root / other}: move a part of each class's images from there to {missing}"
                f"{os.sep}<class>{os.sep}."
            )
    if classes:
        return (
            f"The classes {', '.join(classes[:3])}{', ...' if classes[3:] else ''} are in {root} itself: "
            f"move the images of each to {arranged}, some for training and some for testing."
        )
    return f"Arrange the images as {arranged}."


def _decode(
    path: Path,
    folder: Path,
    channels: int,
    height: int,
    width: int,
    resize: bool,
    deep: list[int],
) -> Any:
    with open_image(path, within=folder) as file:
        image: Image.Image = file
        if "brightest" in image.info:
            deep.append(image.info["brightest"])
        if image.size != (width, height) and not resize:
            raise ValueError(
                f"{image.width} x {image.height} pixels where {width} x {height} are expected"
            )
        image = image.convert("L" if channels == 1 else "RGB")
        if image.size != (width, height):
            image = image.resize((width, height), Image.Resampling.BILINEAR)
        return np.asarray(image).reshape(height, width, channels).transpose(2, 0, 1)


# ------------------------------------------------------------------------------- npz archives


def read_npz(path: Path, wanted: Collection[str]) -> dict[str, Any]:
    """Load arrays of an archive by name; others are ignored.

    Raises:
        DataError: the archive is missing or damaged, or one of the arrays contains objects.
    """
    with _readable(path):
        file = open_untrusted(path, max_bytes=None)
    if not is_zipfile(file):  # numpy would suggest allow_pickle
        file.close()
        raise DataError(
            f"Expected {path} to be an intact .npz archive of plain arrays, but it is not a zip archive. "
            "Download it again, or write it with numpy.savez."
        )
    file.seek(0)
    try:
        with file, np.load(file, allow_pickle=False) as archive:
            read = [m for m in archive.zip.infolist() if m.filename.removesuffix(".npy") in wanted]
            packed = file.seek(
                0, os.SEEK_END
            )  # members may share bytes, which compressed sizes would count twice
            refuse_bomb(path, packed, sum(m.file_size for m in read))
            return {key: archive[key] for key in archive if key in wanted}
    except DataError:
        raise
    # numpy and zipfile may raise any exception here: OSError, ValueError, BadZipFile, zlib.error ...;
    # a single array in an .npy file is not a context manager.
    except Exception as error:
        remedy = "Download it again, or write it with numpy.savez."
        if "Object arrays" in str(error):
            remedy = "Arrays of objects may contain code: write strings with .astype(str), numbers as numbers."
        raise DataError(
            f"Expected {path} to be an intact .npz archive of plain arrays, but got "
            f"{type(error).__name__}: {str(error).rstrip('.')}. {remedy}"
        ) from error
