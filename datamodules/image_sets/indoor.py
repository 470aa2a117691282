"""MIT Indoor-67: indoor scenes."""

from dataclasses import dataclass
from pathlib import Path

from bpn_lightning.checks import check_choice
from bpn_lightning.datamodules.image_sets.listing import (
    Counts,
    Entry,
    ImageSet,
    Listing,
)

__all__ = ["Indoor67"]

_SUFFIXES = {".jpg", ".jpeg", ".gif", ".png"}


@dataclass(frozen=True)
class Indoor67(ImageSet):
    """67 kinds of scenes (Quattoni and Torralba, 2009).

    ``TrainImages.txt`` and ``TestImages.txt`` have lines ``<class>/<file>`` below ``Images``; classes
    are the folders there, in alphabetical order.

    Args:
        images: ``listed`` uses the images of the two lists, about 80 and 20 of each class; ``all`` trains
            on every image in the folders that is not in the list of test images.
    """

    images: str = "listed"

    name = "scenes"
    title = "MIT Indoor-67"
    folders = ("indoor67", "indoorCVPR_09", "mit_indoor")
    required_files = "Images/<class>/<file>.jpg, TrainImages.txt and TestImages.txt"
    download_hint = (
        "Get indoorCVPR_09.tar, TrainImages.txt and TestImages.txt from "
        "http://web.mit.edu/torralba/www/indoor.html."
    )
    paper_counts = "15,620 images in 67 classes"

    def __post_init__(self) -> None:
        check_choice("images of scenes", self.images, ("listed", "all"))

    @property
    def counts(self) -> Counts:
        """The sizes of the lists, or the number of all images."""
        return Counts(5360, 1340) if self.images == "listed" else Counts(None, 1340, 15620)

    @property
    def num_classes(self) -> int:
        """The number of kinds of scenes."""
        return 67

    def read_lists(self) -> Listing:
        """Read the two lists, or the folders."""
        images = self.folder / "Images"
        with self.reading(images):
            classes = sorted(path.name for path in images.iterdir() if path.is_dir())
        test = self._listed(self.folder / "TestImages.txt", classes)
        if self.images == "listed":
            train = self._listed(self.folder / "TrainImages.txt", classes)
        else:
            taken = {entry.path for entry in test}
            train = [
                Entry(path, label)
                for label, name in enumerate(classes)
                for path in sorted((images / name).iterdir())
                if path.suffix.lower() in _SUFFIXES and path not in taken
            ]
        both = {entry.path for entry in train} & {entry.path for entry in test}
        if both:
            raise self.fault(self.folder / "TestImages.txt", "no training image", str(min(both)))
        return Listing(classes, train, test)

    def _listed(self, path: Path, classes: list[str]) -> list[Entry]:
        places = {name: label for label, name in enumerate(classes)}
        entries = []
        for line in self.lines(path):
            name, slash, file = line.replace("\\", "/").partition("/")
            if not slash or not file:
                raise self.fault(path, "lines of the form '<class>/<file>'", repr(line))
            if name not in places:
                raise self.fault(
                    path, f"classes that are folders in {path.parent / 'Images'}", name
                )
            entries.append(Entry(self.folder / "Images" / name / file, places[name]))
        return entries
