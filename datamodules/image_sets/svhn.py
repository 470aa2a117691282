"""Street View House Numbers: digits cropped from photographs."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
from PIL import Image
from scipy.io import loadmat, whosmat

from bpn_lightning.datamodules.image_sets.listing import Counts, Entry, ImageSet, Listing
from bpn_lightning.files.untrusted import open_untrusted

__all__ = ["SVHN"]


@dataclass(frozen=True)
class SVHN(ImageSet):
    """Digits of house numbers, 32 x 32 pixels (Netzer et al., 2011).

    ``train_32x32.mat`` and ``test_32x32.mat`` have ``X``, uint8 (32, 32, 3, n), and ``y``, (n, 1), in
    which the digit 0 is labeled 10.
    """

    _arrays: dict[Path, Any] = field(default_factory=dict, init=False, repr=False, compare=False)
    _lock: Any = field(default_factory=Lock, init=False, repr=False, compare=False)

    name = "svhn"
    title = "SVHN"
    folders = ("svhn", "SVHN")
    required_files = "train_32x32.mat and test_32x32.mat"
    download_hint = (
        "Get train_32x32.mat and test_32x32.mat from http://ufldl.stanford.edu/housenumbers/, or let "
        "torchvision fetch them: torchvision.datasets.SVHN(ROOT + '/svhn', 'train', download=True), "
        "and 'test'."
    )
    paper_counts = "99,289 images in 10 classes"
    native_size = 32
    mirrored = False

    @property
    def counts(self) -> Counts:
        """The sizes without the additional images in extra_32x32.mat."""
        return Counts(73257, 26032)

    @property
    def num_classes(self) -> int:
        """The number of digits."""
        return 10

    def read_lists(self) -> Listing:
        """Read the labels of both files; images are read on first use."""
        train, test = (self._part(self.folder / f"{part}_32x32.mat") for part in ("train", "test"))
        return Listing([str(digit) for digit in range(10)], train, test)

    def _part(self, path: Path) -> list[Entry]:
        with self.reading(path):
            self.refuse_large(path)
            with open_untrusted(path, max_bytes=None) as file:
                shapes = {name: shape for name, shape, _ in whosmat(file)}
                labels = loadmat(file, variable_names=["y"])["y"].reshape(-1).tolist()
            images = shapes["X"]
        if images[:3] != (32, 32, 3) or images[3:] not in ((len(labels),), ()):
            wanted = f"X of shape (32, 32, 3, {len(labels)}), an image for each label"
            raise self.fault(path, wanted, str(images))
        return [
            Entry(path, self.number(path, label, 0, 10, "labels") % 10, place=place)
            for place, label in enumerate(labels)
        ]

    @contextmanager
    def open(self, entry: Entry) -> Iterator[Image.Image]:
        """Return one image of the array, which is read once."""
        with self._lock:
            if entry.path not in self._arrays:
                with open_untrusted(entry.path, max_bytes=None) as file:
                    images = loadmat(file, variable_names=["X"])["X"]
                # contiguous per image
                self._arrays[entry.path] = np.ascontiguousarray(np.moveaxis(images, 3, 0))
        yield Image.fromarray(self._arrays[entry.path][entry.place])
