"""Oxford Flowers: 102 species of flowers."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from bpn_lightning.checks import check_choice
from bpn_lightning.datamodules.image_sets.listing import (
    Counts,
    Entry,
    ImageSet,
    Listing,
)

__all__ = ["Flowers102"]


@dataclass(frozen=True)
class Flowers102(ImageSet):
    """Flowers of 102 kinds (Nilsback and Zisserman, 2008).

    ``imagelabels.mat`` has a label from 1 for each image, ``setid.mat`` the numbers of the images of
    three parts: ``trnid``, ``valid`` and ``tstid``.

    Args:
        train: ``train+val`` uses the 2,040 images of both parts, ``train`` half of them.
    """

    train: str = "train+val"

    name = "flowers"
    title = "Oxford Flowers"
    folders = ("flowers-102", "flowers102", "flowers")
    required_files = "jpg/image_00001.jpg ..., imagelabels.mat and setid.mat"
    download_hint = (
        "Get 102flowers.tgz, imagelabels.mat and setid.mat from "
        "https://www.robots.ox.ac.uk/~vgg/data/flowers/102/, or let torchvision fetch them: "
        "torchvision.datasets.Flowers102(ROOT, download=True)."
    )
    paper_counts = "8,189 images in 102 classes"

    def __post_init__(self) -> None:
        check_choice("train of flowers", self.train, ("train+val", "train"))

    @property
    def counts(self) -> Counts:
        """The sizes of the official parts."""
        return Counts(2040 if self.train == "train+val" else 1020, 6149)

    @property
    def num_classes(self) -> int:
        """The number of species."""
        return 102

    def read_lists(self) -> Listing:
        """Read labels and parts from the two files; classes are named by their numbers."""
        labels_file, parts_file = self.folder / "imagelabels.mat", self.folder / "setid.mat"
        labels = self.read_mat(labels_file, lambda mat: np.atleast_1d(mat["labels"]).astype(int))
        keys = ("trnid", "valid", "tstid")
        parts = self.read_mat(
            parts_file, lambda mat: [np.atleast_1d(mat[key]).astype(int) for key in keys]
        )
        if labels.min() < 1:
            raise self.fault(labels_file, "labels from 1", str(labels.min()))

        def entries(ids: Any) -> list[Entry]:
            found = []
            for number in ids.tolist():
                self.number(parts_file, number, 1, len(labels), "numbers of images")
                path = self.folder / "jpg" / f"image_{number:05d}.jpg"
                found.append(Entry(path, int(labels[number - 1]) - 1))
            return found

        train, val, test = (entries(ids) for ids in parts)
        names = [f"flower {number + 1}" for number in range(labels.max())]
        return Listing(names, train + val if self.train == "train+val" else train, test)
