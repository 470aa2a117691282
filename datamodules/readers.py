"""Readers: files to uint8 tensors, and every way in which files can be wrong to one clear error."""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from zipfile import is_zipfile

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from bpn_lightning.datamodules.limits import open_image, refuse_bomb, refuse_ways_out
from bpn_lightning.datamodules.loading import Samples
from bpn_lightning.errors import DataError

__all__ = ["ImageData", "has_class_folders", "read_class_folders", "read_npz"]


class ImageData(NamedTuple):
    """What a reader returns.

    Attributes:
        train: the training part; labels are places in ``class_names``.
        test: the test part, likewise.
        class_names: the classes in the data set's own order.
        source: where it came from, for messages.
    """

    train: Samples
    test: Samples
    class_names: list[str]
    source: str


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DataError(
            f"Expected {path} to be readable, but got {type(error).__name__}: {error}. "
            "Check that it is there and its permissions, or name another place."
        ) from error


# ------------------------------------------------------------------------------- class folders


def has_class_folders(folder: Path) -> bool:
    """Whether ``folder`` holds ``train/`` or ``test/``."""
    with _readable(folder):
        return any((folder / part).is_dir() for part in ("train", "test"))


def read_class_folders(
    folder: Path, channels: int, height: int, width: int, resize: bool
) -> ImageData:
    """Read ``<folder>/{train,test}/<class>/*``, every kind of image that Pillow reads.

    Files with other suffixes are passed over. Classes are in alphabetical order. The folder may be a
    link; a link in it must not lead out of it.

    Args:
        folder: an absolute path.
        channels: 1 reads in grey, 3 in colour.
        height: of each image, in pixels.
        width: of each image, in pixels.
        resize: squeeze images of other sizes into this one; False: they are an error.

    Raises:
        DataError: a folder is missing or not readable, or an image is damaged or of another size.
    """
    suffixes = frozenset(Image.registered_extensions())
    files = {part: _list_class_folders(folder / part, suffixes) for part in ("train", "test")}
    refuse_ways_out(
        folder, (path for part in files.values() for of in part.values() for path in of)
    )
    class_names = sorted(files["train"].keys() | files["test"].keys())
    size = (channels, height, width)

    def read(part: str) -> Samples:
        labelled = [
            (path, label)
            for label, name in enumerate(class_names)
            for path in files[part].get(name, [])
        ]
        images = np.empty((len(labelled), *size), dtype=np.uint8)

        def decode(place: int) -> None:
            images[place] = _decode(labelled[place][0], *size, resize)

        # Pillow lets go of the interpreter while it decodes, and reading waits for the disk.
        with ThreadPoolExecutor(min(16, 2 * (os.cpu_count() or 1))) as pool:
            for _ in pool.map(decode, range(len(labelled))):
                pass
        labels = torch.tensor([label for _, label in labelled], dtype=torch.int64)
        return Samples(torch.from_numpy(images), labels)

    return ImageData(read("train"), read("test"), class_names, str(folder))


def _list_class_folders(part: Path, suffixes: frozenset[str]) -> dict[str, list[Path]]:
    if not part.is_dir():
        raise DataError(
            f"Expected the folder {part} with one folder of images for each class, but there is "
            f"none. Arrange the images as {part.parent}{os.sep}{{train,test}}{os.sep}<class>{os.sep}."
        )
    with _readable(part):
        return {
            folder.name: [
                path
                for path in sorted(folder.iterdir())
                if path.suffix.lower() in suffixes and not path.name.startswith(".")
            ]
            for folder in sorted(part.iterdir())
            if folder.is_dir() and not folder.name.startswith(".")
        }


def _decode(path: Path, channels: int, height: int, width: int, resize: bool) -> Any:
    try:
        with open_image(path) as file:
            image: Image.Image = file
            if image.size != (width, height) and not resize:
                raise ValueError(
                    f"{image.width} x {image.height} pixels where {width} x {height} are expected"
                )
            image = image.convert("L" if channels == 1 else "RGB")
            if image.size != (width, height):
                image = image.resize((width, height), Image.Resampling.BILINEAR)
            pixels = np.asarray(image).reshape(height, width, channels)
    # A damaged file makes Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error,
    # zlib.error and more.
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        raise DataError(
            f"Expected {path} to be a whole image that fits the data set, but got {reason}. "
            "Replace the file or delete it."
        ) from error
    return pixels.transpose(2, 0, 1)


# ------------------------------------------------------------------------------- npz archives

_KEYS = ("train_images", "train_labels", "test_images", "test_labels")


def read_npz(path: Path) -> ImageData:
    """Read an archive with train_images, train_labels, test_images and test_labels.

    Images are uint8, ``(n, height, width)`` or ``(n, height, width, channels)``, labels are
    integers, ``(n,)`` or ``(n, 1)``. Each value of a label is a class, in ascending order. Further
    arrays, such as MedMNIST's val_images, are not read.

    Raises:
        DataError: the archive is missing, damaged or holds something else.
    """
    with _readable(path):
        file = path.open("rb")
    if not is_zipfile(file):  # numpy would advise to unpickle it
        file.close()
        raise DataError(
            f"Expected {path} to be a whole .npz archive of plain arrays, but got no zip archive. "
            "Fetch it again, or write it with numpy.savez."
        )
    file.seek(0)
    try:
        with file, np.load(file, allow_pickle=False) as archive:
            read = [m for m in archive.zip.infolist() if m.filename.removesuffix(".npy") in _KEYS]
            refuse_bomb(path, sum(m.compress_size for m in read), sum(m.file_size for m in read))
            missing = [key for key in _KEYS if key not in archive]
            arrays = {key: archive[key] for key in _KEYS if key in archive}
            held = list(archive)
    except DataError:
        raise
    # A damaged archive makes numpy and zipfile raise OSError, ValueError, BadZipFile, zlib.error...
    # and a single array in an .npy file is no context manager.
    except Exception as error:
        raise DataError(
            f"Expected {path} to be a whole .npz archive of plain arrays, but got "
            f"{type(error).__name__}: {str(error).rstrip('.')}. Fetch it again, or write it with "
            "numpy.savez."
        ) from error
    if missing:
        raise DataError(
            f"Expected {path} to hold the arrays {', '.join(_KEYS)}, but got {', '.join(held)}. "
            f"Add {', '.join(missing)}."
        )
    values = {part: _labels(path, f"{part}_labels", arrays) for part in ("train", "test")}
    classes = np.unique(np.concatenate([values["train"], values["test"]]))

    def samples(part: str) -> Samples:
        images = _images(path, f"{part}_images", arrays)
        labels = torch.from_numpy(np.searchsorted(classes, values[part]).astype(np.int64))
        if len(images) != len(labels):
            raise DataError(
                f"Expected {part}_labels in {path} to have one entry for each of the {len(images)} "
                f"images, but got {len(labels)}. Write the archive again with both complete."
            )
        return Samples(images, labels)

    train, test = samples("train"), samples("test")
    if train.images.shape[1:] != test.images.shape[1:]:
        raise DataError(
            f"Expected train_images and test_images in {path} to be of one size, but got "
            f"{tuple(train.images.shape[1:])} and {tuple(test.images.shape[1:])} (channels, height, "
            "width). Bring both to the same size."
        )
    return ImageData(train, test, [str(value) for value in classes.tolist()], str(path))


def _images(path: Path, key: str, arrays: dict[str, Any]) -> Tensor:
    array = arrays[key]
    if array.dtype != np.uint8 or array.ndim not in (3, 4):
        raise DataError(
            f"Expected {key} in {path} to be uint8 of shape (n, height, width) or (n, height, "
            f"width, channels), but got {array.dtype} of shape {array.shape}. Scale the images to "
            "0 .. 255 and convert them with .astype('uint8')."
        )
    images = torch.from_numpy(array)
    return images.unsqueeze(1) if images.ndim == 3 else images.permute(0, 3, 1, 2).contiguous()


def _labels(path: Path, key: str, arrays: dict[str, Any]) -> Any:
    array = arrays[key]
    if array.ndim == 2 and array.shape[1] == 1:
        array = array[:, 0]
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise DataError(
            f"Expected {key} in {path} to be integers of shape (n,) or (n, 1), one class per image, "
            f"but got {array.dtype} of shape {arrays[key].shape}. Images with several labels each "
            "cannot be split into tasks by class."
        )
    return array
