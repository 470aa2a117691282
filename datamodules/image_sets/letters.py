"""Chars74K: English characters in photographs, handwriting and computer fonts."""

import re
from dataclasses import dataclass
from pathlib import Path
from string import ascii_lowercase, ascii_uppercase, digits
from typing import Any

import numpy as np

from bpn_lightning.checks import check_choice, check_positive_int
from bpn_lightning.datamodules.image_sets.listing import (
    Counts,
    Entry,
    ImageSet,
    Listing,
)
from bpn_lightning.errors import ConfigurationError, DataError
from bpn_lightning.files.untrusted import read_text

__all__ = ["Chars74K"]

_CHARACTERS = digits + ascii_uppercase + ascii_lowercase
_FOLDERS = {"Fnt": "Fnt", "Hnd": "Hnd/Img", "Img": "Img/GoodImg/Bmp"}
_BAD = "Img/BadImag/Bmp"  # the authors' spelling


@dataclass(frozen=True)
class Chars74K(ImageSet):
    """Characters 0 to 9, A to Z and a to z (de Campos et al., 2009).

    A class is a folder ``Sample001`` to ``Sample062``. There is no official split of all images: by
    default a random fraction of each class, with a separate seed, is the test part.

    Args:
        part: ``Fnt`` are the 62,992 images of computer fonts, the number in Wen et al.; ``Img`` are crops
            of photographs, as they describe them; ``Hnd`` are handwritten.
        classes: 62, or 52 without the digits.
        bad: with ``Img``, whether to include images that the authors call bad.
        split: ``seeded``, or ``lists``: the training and test indices of the authors' lists.mat or
            list_English_<part>.m.
        test_fraction: fraction of each class, with ``seeded``.
        split_seed: random seed of the split, with ``seeded``; independent of the run's seed.
        column: index of the split in the lists, from 1.
    """

    part: str = "Fnt"
    classes: int = 62
    bad: bool = False
    split: str = "seeded"
    test_fraction: float = 0.2
    split_seed: int = 0
    column: int = 1

    name = "letters"
    title = "Chars74K"
    folders = ("English", "chars74k/English", "Chars74K/English")
    required_files = "Fnt/Sample001/*.png ... (or Img/GoodImg/Bmp/..., Hnd/Img/...)"
    download_hint = (
        "Get EnglishFnt.tgz (or EnglishImg.tgz, EnglishHnd.tgz, and Lists.tgz for their splits) from "
        "http://www.ee.surrey.ac.uk/CVSSP/demos/chars74k/."
    )
    paper_counts = "62,992 images in 62 classes"
    mirrored = False

    def __post_init__(self) -> None:
        check_choice("part of letters", self.part, tuple(_FOLDERS))
        check_choice("classes of letters", self.classes, (62, 52))
        check_choice("split of letters", self.split, ("seeded", "lists"))
        if not 0 < self.test_fraction < 1:
            raise ConfigurationError(
                "Expected test_fraction of letters to be between 0 and 1, but got "
                f"{self.test_fraction!r}. 0.2 keeps a fifth of each class for the test."
            )
        check_positive_int("column of letters", self.column, "Columns of the lists count from 1.")

    @property
    def native_size(self) -> int | None:  # type: ignore[override]
        """Fonts were drawn at 128 x 128 pixels."""
        return 128 if self.part == "Fnt" else None

    @property
    def counts(self) -> Counts:
        """1,016 fonts per character; the other parts have no reliable number."""
        if self.part != "Fnt" or self.split == "lists":
            return Counts(None, None)
        return Counts(None, None, 1016 * self.classes)

    @property
    def num_classes(self) -> int:
        """The number of characters."""
        return self.classes

    def read_lists(self) -> Listing:
        """Read the folders, or the authors' lists."""
        train, test = self._seeded() if self.split == "seeded" else self._listed()
        first = 62 - self.classes
        labels = sorted({character for _, character in train + test if character >= first})
        places = {character: label for label, character in enumerate(labels)}
        parts = (
            [Entry(path, places[character]) for path, character in part if character in places]
            for part in (train, test)
        )
        return Listing([_CHARACTERS[character] for character in labels], *parts)

    def _seeded(self) -> tuple[list[tuple[Path, int]], list[tuple[Path, int]]]:
        folders = [_FOLDERS[self.part], *([_BAD] if self.bad and self.part == "Img" else [])]
        if not (self.folder / folders[0]).is_dir():
            raise DataError(
                f"Expected the folder {self.folder / folders[0]}, but there is none. The folder has "
                f"to hold {self.required_files}. {self.download_hint}"
            )
        train: list[tuple[Path, int]] = []
        test: list[tuple[Path, int]] = []
        for character in range(62):
            within = [self.folder / part / f"Sample{character + 1:03d}" for part in folders]
            paths = [path for folder in within for path in sorted(folder.glob("*.png"))]
            generator = np.random.default_rng([self.split_seed, character])
            count = min(max(1, round(self.test_fraction * len(paths))), len(paths) - 1)
            chosen = set(generator.permutation(len(paths))[: max(count, 0)].tolist())
            for place, path in enumerate(paths):
                (test if place in chosen else train).append((path, character))
        return train, test

    # ---------------------------------------------------------------------- the authors' lists

    def _listed(self) -> tuple[list[tuple[Path, int]], list[tuple[Path, int]]]:
        path, fields = self._list_fields()
        names, labels = fields["ALLnames"], fields["ALLlabels"]
        if len(names) != len(labels):
            raise self.fault(path, f"a label for each of {len(names)} names", f"{len(labels)}")

        def chosen(key: str) -> list[tuple[Path, int]]:
            columns = fields[key]
            if self.column > columns.shape[1]:
                raise ConfigurationError(
                    f"Expected column of letters to be at most the {columns.shape[1]} splits of "
                    f"{path}, but got {self.column}."
                )
            found = []
            for index in columns[:, self.column - 1].tolist():
                if index:  # shorter columns are padded with 0
                    place = self.number(path, index, 1, len(names), f"indices in {key}") - 1
                    character = self.number(path, labels[place], 1, 62, "labels") - 1
                    found.append((self.folder / f"{names[place]}.png", character))
            return found

        return chosen("TRNind"), chosen("TSTind")

    def _list_fields(self) -> tuple[Path, dict[str, Any]]:
        within = self.folder / self.part
        text = f"list_English_{self.part}.m"
        places = [within / "lists.mat", within / "lists_var_size.mat", within / text]
        path = next((path for path in [*places, self.folder / text] if path.is_file()), places[0])
        if path.suffix == ".m":
            with self.reading(path):
                return path, _fields_of_text(read_text(path))
        return path, self.read_mat(path, _fields_of_mat)


def _fields_of_mat(mat: dict[str, Any]) -> dict[str, Any]:
    found = mat["list"]
    fields: dict[str, Any] = {
        "ALLnames": [str(name).strip() for name in np.atleast_1d(found["ALLnames"].item())],
        "ALLlabels": np.atleast_1d(found["ALLlabels"].item()).tolist(),
    }
    for key in ("TRNind", "TSTind"):
        array = np.asarray(found[key].item())
        fields[key] = array if array.ndim == 2 else array.reshape(-1, 1)
    return fields


def _fields_of_text(text: str) -> dict[str, Any]:
    """Parse statements ``list.<field> = [...];`` of the text version."""
    found = dict(re.findall(r"list\.(\w+)\s*=\s*\[(.*?)\]\s*;", text, re.DOTALL))
    fields: dict[str, Any] = {
        "ALLnames": re.findall(r"'([^']*)'", found["ALLnames"]),
        "ALLlabels": [int(number) for number in re.findall(r"\d+", found["ALLlabels"])],
    }
    for key in ("TRNind", "TSTind"):
        rows = [re.findall(r"\d+", row) for row in re.split(r"[;\n]", found[key])]
        fields[key] = np.array([row for row in rows if row], dtype=int)
    return fields
