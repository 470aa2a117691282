"""The base class of image sets: lists of files with labels and splits, without decoding."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
from PIL import Image
from scipy.io import loadmat, whosmat

from bpn_lightning.datamodules.limits import (
    MAX_NAMED,
    check_paths_inside,
    matlab_sizes,
    open_image,
    refuse_bomb,
)
from bpn_lightning.errors import DataError
from bpn_lightning.files.untrusted import open_untrusted, read_text

__all__ = ["Counts", "Entry", "ImageSet", "Listing"]


class Counts(NamedTuple):
    """The number of images per part; None if the authors do not publish it."""

    train: int | None
    test: int | None
    total: int | None = None


class Entry(NamedTuple):
    """One sample.

    Attributes:
        path: the file that contains it.
        label: index into the listing's ``class_names``.
        box: ``(left, top, right, bottom)`` in pixels to crop, right and bottom exclusive; None uses the
            whole image. The box is clipped to the image.
        place: its index in a file with several images.
    """

    path: Path
    label: int
    box: tuple[int, int, int, int] | None = None
    place: int = 0


class Listing(NamedTuple):
    """The result of a reader.

    Attributes:
        class_names: in the data set's own order.
        train: training samples.
        test: test samples.
    """

    class_names: list[str]
    train: list[Entry]
    test: list[Entry]


@dataclass(frozen=True)
class ImageSet(ABC):
    """A published set of labeled images in its official layout on disk.

    Args:
        root: the folder of data sets; the set is in the first of ``folders`` that exists.
    """

    root: Path

    name: ClassVar[str]
    """Name in configs and commands."""
    title: ClassVar[str]
    """Name in messages."""
    folders: ClassVar[tuple[str, ...]]
    """Possible folders below the root; messages name the first."""
    required_files: ClassVar[str]
    """The required contents of that folder, in words."""
    download_hint: ClassVar[str]
    """Where and how to download it."""
    paper_counts: ClassVar[str]
    """The numbers of images and classes in Wen et al."""
    native_size: ClassVar[int | None] = None
    """Height and width in pixels, if all images are small squares of the same size."""

    mirrored: ClassVar[bool] = True
    """Whether flipping an image preserves its class."""

    @property
    @abstractmethod
    def counts(self) -> Counts:
        """The published numbers of images, for these options."""

    @property
    @abstractmethod
    def num_classes(self) -> int:
        """The published number of classes, for these options."""

    @abstractmethod
    def read_lists(self) -> Listing:
        """Read the lists and labels; images may be missing."""

    @property
    def folder(self) -> Path:
        """The folder of the set."""
        for name in self.folders:
            if (self.root / name).is_dir():
                return self.root / name
        raise DataError(
            f"Expected {self.title} in {self.root / self.folders[0]}, but there is no such folder. "
            f"It has to hold {self.required_files}. {self.download_hint}"
        )

    @property
    def is_present(self) -> bool:
        """Whether its folder exists, whatever its contents."""
        return any((self.root / name).is_dir() for name in self.folders)

    def checked(self, expect_counts: bool = True) -> Listing:
        """The listing, after checking that all its files exist.

        Args:
            expect_counts: refuse numbers of classes and images other than the published ones.

        Raises:
            DataError: a list is missing or damaged, an image is missing, or a number differs.
        """
        listing = self.read_lists()
        self._refuse_missing_files(listing)
        wrong = self.count_faults(listing)
        if wrong and expect_counts:
            raise DataError(
                f"Expected {self.title} in {self.folder} to have {wrong[0]}. Download the set again, or "
                "set expect_counts to false to use it as it is."
            )
        return listing

    def count_faults(self, listing: Listing) -> list[str]:
        """Describe differences between the listing's numbers and the published ones."""
        found = {"training images": len(listing.train), "test images": len(listing.test)}
        found["images in all"] = sum(found.values())
        wanted = {"classes": self.num_classes, **dict(zip(found, self.counts, strict=True))}
        found = {"classes": len(listing.class_names), **found}
        return [
            f"{number:,} {what}, but got {found[what]:,}"
            for what, number in wanted.items()
            if number is not None and number != found[what]
        ]

    def _refuse_missing_files(self, listing: Listing) -> None:
        paths = dict.fromkeys(entry.path for entry in [*listing.train, *listing.test])
        check_paths_inside(self.folder, paths)
        missing = [path for path in paths if not path.is_file()]
        if missing:
            named = ", ".join(map(str, missing[:MAX_NAMED]))
            more = f" and {len(missing) - MAX_NAMED:,} more" if len(missing) > MAX_NAMED else ""
            verb = "is" if len(missing) == 1 else "are"
            raise DataError(
                f"Expected all images in the lists of {self.title}, but {named}{more} {verb} "
                f"missing. {self.download_hint}"
            )

    @contextmanager
    def open(self, entry: Entry) -> Iterator[Image.Image]:
        """Decode one sample to RGB; resize it inside the block, as for :func:`open_image`.

        Raises:
            Exception: Pillow may raise any exception on a damaged file.
        """
        with open_image(entry.path) as file:
            image: Image.Image = file
            if image.mode == "P":
                image = image.convert("RGBA")
            image = image.convert("RGB")
            if entry.box is not None:
                left, top, right, bottom = entry.box
                right, bottom = min(right, image.width), min(bottom, image.height)
                box = (max(left, 0), max(top, 0), right, bottom)
                if box[0] >= box[2] or box[1] >= box[3]:
                    size = f"{image.width} x {image.height}"
                    raise ValueError(f"box {entry.box} outside of {size} pixels")
                image = image.crop(box)
            yield image

    # ---------------------------------------------------------------------- files of lists

    @contextmanager
    def reading(self, path: Path) -> Iterator[None]:
        """Raise the same kind of error for any problem with a file of lists or labels."""
        try:
            yield
        except DataError:
            raise
        # scipy and the XML parser may raise any exception here.
        except Exception as error:
            if not path.exists():
                raise DataError(
                    f"Expected {path}, a file of {self.title}, but it does not exist. The folder has to "
                    f"hold {self.required_files}. {self.download_hint}"
                ) from error
            raise DataError(
                f"Expected {path} to be an intact file of {self.title}, but got "
                f"{type(error).__name__}: {error}. Download it again. {self.download_hint}"
            ) from error

    def lines(self, path: Path) -> list[str]:
        """The stripped, non-empty lines of a file."""
        with self.reading(path):
            lines = read_text(path, encoding="utf-8-sig").split("\n")
        return [line.strip() for line in lines if line.strip()]

    def fields(self, path: Path, form: str) -> Iterator[list[str]]:
        """Split lines at whitespace into as many fields as ``form``; the last field may contain spaces."""
        count = len(form.split())
        for line in self.lines(path):
            fields = line.split(maxsplit=count - 1)
            if len(fields) != count:
                raise self.fault(path, f"lines of the form '{form}'", repr(line))
            yield fields

    def table(self, path: Path, form: str) -> dict[str, str]:
        """Read lines of two fields into a dictionary; keys have to be unique.

        Raises:
            DataError: the file is missing or damaged.
        """
        rows: dict[str, str] = {}
        for key, value in self.fields(path, form):
            if key in rows:
                raise self.fault(path, "each id once", f"{key} twice")
            rows[key] = value
        return rows

    def join(self, path: Path, table: dict[str, Any], other: Path, ids: Iterable[str]) -> None:
        """Refuse IDs that only one of two files has."""
        ids = set(ids)
        for lacking, odd in ((other, table.keys() - ids), (path, ids - table.keys())):
            if odd:
                having = path if lacking is other else other
                raise DataError(
                    f"Expected {path} and {other} to have the same IDs, but {min(odd)} is in "
                    f"{having.name} and not in {lacking.name}. Download {self.title} again."
                )

    def number(self, path: Path, text: Any, low: int, high: int, what: str) -> int:
        """Parse a whole number in a range."""
        try:
            value = int(text)
        except (TypeError, ValueError):
            value = low - 1
        if not low <= value <= high:
            raise self.fault(path, f"{what} from {low} to {high}", repr(text))
        return value

    def fault(self, path: Path, wanted: str, got: str) -> DataError:
        """The error for a file with unexpected contents."""
        return DataError(
            f"Expected {path} to hold {wanted}, but got {got}. Download {self.title} again."
        )

    def read_mat(self, path: Path, read: Callable[[dict[str, Any]], Any]) -> Any:
        """Apply ``read`` to a Matlab file; damage and missing fields raise one kind of error."""
        with self.reading(path):
            self.refuse_large(path)
            with open_untrusted(path, max_bytes=None) as file:
                return read(loadmat(file, squeeze_me=True))

    def refuse_large(self, path: Path) -> None:
        """Refuse a Matlab file whose arrays are far larger than the file."""
        with open_untrusted(path, max_bytes=None) as file:
            count = sum(int(np.prod(shape, dtype=object)) for _, shape, _ in whosmat(file))
            packed, inflated = matlab_sizes(file)
        refuse_bomb(path, packed, max(8 * count, inflated))
