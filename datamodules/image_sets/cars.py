"""Stanford Cars: makes, models and years."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bpn_lightning.datamodules.image_sets.listing import Counts, Entry, ImageSet, Listing
from bpn_lightning.errors import DataError

__all__ = ["StanfordCars"]

_SIDES = ("x1", "y1", "x2", "y2")


@dataclass(frozen=True)
class StanfordCars(ImageSet):
    """Cars of 196 models (Krause et al., 2013), in either of the two published layouts.

    Two folders: ``cars_train/``, ``cars_test/``, ``devkit/`` with ``cars_meta.mat`` and
    ``cars_train_annos.mat``, and ``cars_test_annos_withlabels.mat``, which is a separate file. One
    folder: ``car_ims/`` and ``cars_annos.mat`` with labels, names and a flag for test images. If both
    exist, the first is read.

    Args:
        crop: whether to crop the car's box.
    """

    crop: bool = False

    name = "cars"
    title = "Stanford Cars"
    folders = ("stanford_cars", "cars")
    required_files = (
        "either cars_train/, cars_test/, devkit/cars_meta.mat, devkit/cars_train_annos.mat and "
        "cars_test_annos_withlabels.mat, or car_ims/ and cars_annos.mat"
    )
    download_hint = (
        "The authors' page, https://ai.stanford.edu/~jkrause/cars/car_dataset.html, no longer serves "
        "the files; copies in either layout are available elsewhere, such as on Kaggle."
    )
    paper_counts = "16,185 images in 196 classes"

    @property
    def counts(self) -> Counts:
        """The sizes of the official split."""
        return Counts(8144, 8041)

    @property
    def num_classes(self) -> int:
        """The number of models."""
        return 196

    def read_lists(self) -> Listing:
        """Read the layout that exists."""
        if (self.folder / "devkit").is_dir():
            return self._read_two_folders()
        if (self.folder / "cars_annos.mat").is_file():
            return self._read_one_folder()
        raise DataError(
            f"Expected {self.folder} to hold {self.required_files}, but it has neither devkit nor "
            f"cars_annos.mat. {self.download_hint}"
        )

    def _read_two_folders(self) -> Listing:
        devkit = self.folder / "devkit"
        meta = devkit / "cars_meta.mat"
        names = self.read_mat(meta, lambda mat: [str(x) for x in np.atleast_1d(mat["class_names"])])
        beside = self.folder / "cars_test_annos_withlabels.mat"
        inside = devkit / "cars_test_annos_withlabels.mat"
        test = inside if inside.is_file() and not beside.is_file() else beside

        def entries(path: Path, images: Path) -> list[Entry]:
            rows = self.read_mat(path, lambda mat: [*np.atleast_1d(mat["annotations"])])
            return [self._entry(path, row, images / str(row["fname"]), names) for row in rows]

        return Listing(
            names,
            entries(devkit / "cars_train_annos.mat", self.folder / "cars_train"),
            entries(test, self.folder / "cars_test"),
        )

    def _read_one_folder(self) -> Listing:
        path = self.folder / "cars_annos.mat"
        names, rows = self.read_mat(
            path,
            lambda mat: (
                [str(name) for name in np.atleast_1d(mat["class_names"])],
                [*np.atleast_1d(mat["annotations"])],
            ),
        )
        parts: tuple[list[Entry], list[Entry]] = ([], [])
        for row in rows:
            with self.reading(path):
                image, testing = self.folder / str(row["relative_im_path"]), int(row["test"])
            parts[1 if testing else 0].append(self._entry(path, row, image, names))
        return Listing(names, *parts)

    def _entry(self, path: Path, row: Any, image: Path, names: list[str]) -> Entry:
        with self.reading(path):
            label = self.number(path, row["class"], 1, len(names), "classes")
            box = None
            if self.crop:
                # 1-based, the last pixel included
                left, top, right, bottom = (int(row[f"bbox_{side}"]) for side in _SIDES)
                box = (left - 1, top - 1, right, bottom)
        return Entry(image, label - 1, box)
