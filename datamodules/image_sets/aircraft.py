"""FGVC-Aircraft: variants, families and manufacturers of airplanes."""

from dataclasses import dataclass
from pathlib import Path

from bpn_lightning.checks import check_choice
from bpn_lightning.datamodules.image_sets.listing import (
    Counts,
    Entry,
    ImageSet,
    Listing,
)

__all__ = ["FGVCAircraft"]

_LEVELS = {
    "variant": ("variants.txt", 100),
    "family": ("families.txt", 70),
    "manufacturer": ("manufacturers.txt", 30),
}


@dataclass(frozen=True)
class FGVCAircraft(ImageSet):
    """Airplanes (Maji et al., 2013, release b).

    ``images_<level>_<part>.txt`` has lines ``<image id> <class>``, where names may contain spaces
    and slashes; ``<levels>.txt`` has one class per line.

    Args:
        level: what a class is: one of 70 families (the number of Wen et al.), of 100 variants or of
            30 manufacturers.
        train: ``trainval`` uses the 6,667 images of both parts, ``train`` half of them.
        banner: rows cropped at the bottom, in pixels; photographs have a copyright line of 20 pixels.
    """

    level: str = "family"
    train: str = "trainval"
    banner: int = 0

    name = "aircraft"
    title = "FGVC-Aircraft"
    folders = ("fgvc-aircraft-2013b", "fgvc_aircraft", "aircraft")
    required_files = (
        "data/images/<id>.jpg, data/families.txt, data/images_family_trainval.txt and so on"
    )
    download_hint = (
        "Get fgvc-aircraft-2013b.tar.gz from https://www.robots.ox.ac.uk/~vgg/data/fgvc-aircraft/, or "
        "let torchvision fetch it: torchvision.datasets.FGVCAircraft(ROOT, download=True)."
    )
    paper_counts = "10,200 images in 70 classes"

    def __post_init__(self) -> None:
        check_choice("level of aircraft", self.level, tuple(_LEVELS))
        check_choice("train of aircraft", self.train, ("trainval", "train"))

    @property
    def counts(self) -> Counts:
        """The sizes of the official parts."""
        return Counts(6667 if self.train == "trainval" else 3334, 3333)

    @property
    def num_classes(self) -> int:
        """The number of classes of the level."""
        return _LEVELS[self.level][1]

    def read_lists(self) -> Listing:
        """Read the lists of one level."""
        data = self.folder / "data"
        names = self.lines(data / _LEVELS[self.level][0])
        places = {name: label for label, name in enumerate(names)}

        def entries(path: Path) -> list[Entry]:
            found = []
            for image, name in self.fields(path, f"<image_id> <{self.level}>"):
                if name not in places:
                    raise self.fault(path, f"names of {_LEVELS[self.level][0]}", repr(name))
                found.append(Entry(data / "images" / f"{image}.jpg", places[name]))
            return found

        lists = (data / f"images_{self.level}_{part}.txt" for part in (self.train, "test"))
        return Listing(names, *(entries(path) for path in lists))
