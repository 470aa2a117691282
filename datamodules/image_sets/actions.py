"""PASCAL VOC 2012: actions of people in photographs."""

from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

from bpn_lightning.checks import check_choice
from bpn_lightning.datamodules.image_sets.listing import (
    Counts,
    Entry,
    ImageSet,
    Listing,
)
from bpn_lightning.datamodules.limits import check_paths_inside
from bpn_lightning.errors import ConfigurationError
from bpn_lightning.files.untrusted import MAX_TEXT_BYTES, open_untrusted

__all__ = ["VOCActions"]

_ACTIONS = (
    "jumping",
    "phoning",
    "playinginstrument",
    "reading",
    "ridingbike",
    "ridinghorse",
    "running",
    "takingphoto",
    "usingcomputer",
    "walking",
)


class _Person(NamedTuple):
    """An object of an annotation: its box, and whether it is marked as difficult, or as other."""

    box: tuple[float, float, float, float]
    difficult: bool
    other: bool


@dataclass(frozen=True)
class VOCActions(ImageSet):
    """People in ten actions (Everingham et al., 2012).

    ``ImageSets/Action/<action>_<part>.txt`` has lines ``<image id> <object> <1 or -1>``, where the
    object is an index from 1 into the ``<object>`` elements of ``Annotations/<image id>.xml``. Only people
    with exactly one action are used. The labels of the official test part were never published, so
    ``train`` is the training part and ``val`` the test part.

    Args:
        take: ``image`` uses whole images for which the lists name one person; ``person`` crops the box of
            every person.
        context: with ``person``, the size of the crop as a multiple of the box.
        other: whether people with none of the ten actions form an eleventh class; otherwise they are
            excluded.
        difficult: whether to include people marked as difficult.
    """

    take: str = "image"
    context: float = 1.0
    other: bool = False
    difficult: bool = True

    name = "actions"
    title = "VOC 2012 actions"
    folders = ("VOCdevkit/VOC2012", "VOC2012", "VOCtrainval_11-May-2012/VOCdevkit/VOC2012")
    required_files = (
        "JPEGImages/, Annotations/ and ImageSets/Action/{train,val,jumping_train, ...}.txt"
    )
    download_hint = (
        "Get VOCtrainval_11-May-2012.tar from http://host.robots.ox.ac.uk/pascal/VOC/voc2012/, or let "
        "torchvision fetch it: torchvision.datasets.VOCDetection(ROOT, '2012', 'train', "
        "download=True)."
    )
    paper_counts = "3,334 images in 10 classes"

    def __post_init__(self) -> None:
        check_choice("take of actions", self.take, ("image", "person"))
        if not 1 <= self.context <= 10:
            raise ConfigurationError(
                "Expected context of actions to be a factor from 1 to 10, but got "
                f"{self.context!r}. 1 crops the box itself, 1.5 enlarges it by half."
            )

    @property
    def counts(self) -> Counts:
        """No numbers are published for people with one action."""
        return Counts(None, None)

    @property
    def num_classes(self) -> int:
        """The number of actions."""
        return len(_ACTIONS) + self.other

    def read_lists(self) -> Listing:
        """Join the lists of both parts with the annotations."""
        names = [*_ACTIONS, *(["other"] if self.other else [])]
        return Listing(names, self._part("train"), self._part("val"))

    def _part(self, part: str) -> list[Entry]:
        people = self._labels(part)
        per_image = Counter(image for image, _ in people)
        annotations: dict[str, list[_Person]] = {}
        entries = []
        for (image, place), actions in people.items():
            if image not in annotations:
                annotations[image] = self._annotation(image)
            objects = annotations[image]
            if place > len(objects):
                raise self.fault(
                    self._list(part, _ACTIONS[0]),
                    f"objects of {self._xml(image)}, which has {len(objects)}",
                    f"object {place}",
                )
            person = objects[place - 1]
            labels = list(actions)
            if self.other and not labels and person.other:
                labels = [len(_ACTIONS)]
            if len(labels) != 1 or (person.difficult and not self.difficult):
                continue
            path = self.folder / "JPEGImages" / f"{image}.jpg"
            if self.take == "person":
                entries.append(Entry(path, labels[0], self._widened(person.box)))
            elif per_image[image] == 1:
                entries.append(Entry(path, labels[0]))
        return entries

    def _labels(self, part: str) -> dict[tuple[str, int], list[int]]:
        """The actions of each person of a part, by image and object."""
        images = self.folder / "ImageSets" / "Action" / f"{part}.txt"
        known = {line.split()[0] for line in self.lines(images)}
        people: dict[tuple[str, int], list[int]] = defaultdict(list)
        for label, action in enumerate(_ACTIONS):
            path = self._list(part, action)
            for image, place, flag in self.fields(path, "<image_id> <object> <1|-1>"):
                if image not in known:
                    raise self.fault(path, f"ids of {images.name}", image)
                person = (image, self.number(path, place, 1, 10_000, "objects"))
                actions = people[person]  # creates the entry, with or without an action
                if self.number(path, flag, -1, 1, "labels") == 1:
                    actions.append(label)
        return people

    def _list(self, part: str, action: str) -> Path:
        return self.folder / "ImageSets" / "Action" / f"{action}_{part}.txt"

    def _xml(self, image: str) -> Path:
        return self.folder / "Annotations" / f"{image}.xml"

    def _annotation(self, image: str) -> list[_Person]:
        path = self._xml(image)
        check_paths_inside(self.folder, [path])
        with self.reading(path), open_untrusted(path, max_bytes=MAX_TEXT_BYTES) as file:
            return [_person(each) for each in ElementTree.parse(file).getroot().findall("object")]

    def _widened(self, box: tuple[float, float, float, float]) -> tuple[int, int, int, int]:
        """Enlarge a box around its center; boxes are 1-based and include the last pixel."""
        left, top, right, bottom = box[0] - 1, box[1] - 1, box[2], box[3]
        across = (self.context - 1) / 2 * (right - left)
        down = (self.context - 1) / 2 * (bottom - top)
        return round(left - across), round(top - down), round(right + across), round(bottom + down)


def _person(element: Any) -> _Person:
    """Parse a person; sides are read by name, because their order differs between years."""
    sides = [float(element.findtext(f"bndbox/{side}")) for side in ("xmin", "ymin", "xmax", "ymax")]
    flags = (element.findtext(tag, "0").strip() == "1" for tag in ("difficult", "actions/other"))
    return _Person((sides[0], sides[1], sides[2], sides[3]), *flags)
