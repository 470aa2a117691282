"""Small trees in the official layouts: shuffled lists, odd line ends, odd images."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

ACTIONS = [
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
]
TRAIN, TEST = 2, 1  # images of each class


class Trees:
    """Writes each set below a root; remembers ``(file, class)`` of each part."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.generator = np.random.default_rng(0)
        self.parts: dict[str, dict[str, list[tuple[str, int]]]] = {}

    def image(self, path: Path, mode: str = "RGB", size: tuple[int, int] = (40, 30)) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        depth = len(Image.new(mode, (1, 1)).getbands())
        shape = (size[1], size[0], depth) if depth > 1 else (size[1], size[0])
        pixels = self.generator.integers(256, size=shape, dtype=np.uint8)
        made = Image.fromarray(pixels[..., :3] if depth > 3 else pixels)
        made.convert(mode).save(path)

    def text(self, path: Path, lines: list[str], shuffle: bool = True) -> None:
        """Shuffled, with the line ends of another system and a blank line at the end."""
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = [lines[i] for i in self.generator.permutation(len(lines))] if shuffle else lines
        path.write_bytes(("\r\n".join(lines) + "\r\n\r\n").encode())

    def labeled(self, name: str, classes: int = 3) -> list[tuple[int, str, int]]:
        """A running number from 1, the part and the class of every image to write."""
        order = [
            (part, label)
            for label in range(classes)
            for part in ["train"] * TRAIN + ["test"] * TEST
        ]
        order = [order[i] for i in self.generator.permutation(len(order))]
        self.parts[name] = {"train": [], "test": []}
        return [(number, *each) for number, each in enumerate(order, 1)]

    def note(self, name: str, part: str, path: Path, label: int) -> Path:
        self.parts[name][part].append((str(path), label))
        return path

    def write(self, *names: str) -> "Trees":
        for name in names or [
            "flowers",
            "scenes",
            "birds",
            "cars",
            "aircraft",
            "actions",
            "letters",
            "svhn",
        ]:
            getattr(self, name)()
        return self

    def flowers(self) -> None:
        folder = self.root / "flowers-102"
        rows = self.labeled("flowers")
        labels = np.array([[label + 1 for _, _, label in rows]], dtype=np.uint8)
        ids: dict[str, list[int]] = {"trnid": [], "valid": [], "tstid": []}
        for number, part, label in rows:
            first = sum(c == label for _, c in self.parts["flowers"]["train"]) == 0
            ids["tstid" if part == "test" else "trnid" if first else "valid"].append(number)
            path = folder / "jpg" / f"image_{number:05d}.jpg"
            self.image(self.note("flowers", part, path, label))
        savemat(folder / "imagelabels.mat", {"labels": labels})
        savemat(folder / "setid.mat", {key: np.array([ids[key]], np.uint16) for key in ids})

    def scenes(self) -> None:
        folder = self.root / "indoor67"
        classes = ["airport_inside", "bakery", "tv_studio"]
        modes = ["RGB", "L", "CMYK"]
        lists: dict[str, list[str]] = {"train": [], "test": []}
        for number, part, label in self.labeled("scenes"):
            relative = f"{classes[label]}/img_{number}.jpg"
            path = self.note("scenes", part, folder / "Images" / relative, label)
            self.image(path, modes[number % 3], [(30, 40), (50, 20), (16, 16)][number % 3])
            lists[part].append(relative)
        self.image(folder / "Images" / "bakery" / "not_in_a_list.jpg")
        self.text(folder / "TrainImages.txt", lists["train"])
        self.text(folder / "TestImages.txt", lists["test"])

    def birds(self) -> None:
        folder = self.root / "CUB_200_2011"
        classes = ["001.Black_footed_Albatross", "002.Laysan_Albatross", "003.Sooty_Albatross"]
        lists: dict[str, list[str]] = {name: [] for name in ("images", "labels", "split", "boxes")}
        for number, part, label in self.labeled("birds"):
            relative = f"{classes[label]}/Bird_{number:04d}.jpg"
            path = self.note("birds", part, folder / "images" / relative, label)
            self.image(path, "L" if number == 2 else "RGB")
            lists["images"].append(f"{number} {relative}")
            lists["labels"].append(f"{number} {label + 1}")
            lists["split"].append(f"{number} {int(part == 'train')}")
            lists["boxes"].append(f"{number} 5.0 6.0 20.0 10.0")
        self.text(folder / "images.txt", lists["images"])
        self.text(folder / "image_class_labels.txt", lists["labels"])
        self.text(folder / "train_test_split.txt", lists["split"])
        self.text(folder / "bounding_boxes.txt", lists["boxes"])
        self.text(folder / "classes.txt", [f"{i} {name}" for i, name in enumerate(classes, 1)])

    def cars(self, one_folder: bool = False) -> None:
        folder = self.root / "stanford_cars"
        names = np.array(
            ["AM General Hummer SUV 2000", "Acura RL 2012", "Audi S4/A4"], dtype=object
        )
        rows = self.labeled("cars")
        kept: dict[str, list[tuple[Any, ...]]] = {"train": [], "test": []}
        for number, part, label in rows:
            place = len(kept[part]) + 1  # both folders count from 1
            file = f"car_ims/{number:06d}.jpg" if one_folder else f"cars_{part}/{place:05d}.jpg"
            self.image(self.note("cars", part, folder / file, label))
            box = (6, 7, 25, 16)
            kept[part].append((*box, label + 1, file.split("/")[1], file, int(part == "test")))
        sides = [(f"bbox_{side}", object) for side in ("x1", "y1", "x2", "y2")]
        if one_folder:
            dtype = [("relative_im_path", object), *sides, ("class", object), ("test", object)]
            records = [(r[6], *r[:5], r[7]) for r in kept["train"] + kept["test"]]
            mat = {"annotations": np.array([records], dtype=dtype), "class_names": names[None]}
            savemat(folder / "cars_annos.mat", mat)
            return
        (folder / "devkit").mkdir()
        savemat(folder / "devkit" / "cars_meta.mat", {"class_names": names[None]})
        dtype = [*sides, ("class", object), ("fname", object)]
        for part, name in (
            ("train", "devkit/cars_train_annos.mat"),
            ("test", "cars_test_annos_withlabels.mat"),
        ):
            records = np.array([[r[:6] for r in kept[part]]], dtype=dtype)
            savemat(folder / name, {"annotations": records})

    def aircraft(self) -> None:
        data = self.root / "fgvc-aircraft-2013b" / "data"
        families = ["Boeing 737", "F/A-18", "MD-80"]
        lists: dict[str, list[str]] = {"trainval": [], "test": []}
        for number, part, label in self.labeled("aircraft"):
            path = data / "images" / f"{number + 34000:07d}.jpg"
            self.image(self.note("aircraft", part, path, label))
            lists["test" if part == "test" else "trainval"].append(f"{path.stem} {families[label]}")
        for level, names in (("families", "family"), ("variants", "variant")):
            self.text(data / f"{level}.txt", families, shuffle=False)
            for part, lines in lists.items():
                self.text(data / f"images_{names}_{part}.txt", lines)

    def actions(self) -> None:
        """One person an image; further images with two people, two actions, and none."""
        folder = self.root / "VOCdevkit" / "VOC2012"
        people: dict[str, list[tuple[str, int, set[int]]]] = {"train": [], "val": []}

        def photograph(image: str, *persons: tuple[set[int], bool]) -> Path:
            objects = "<object><name>horse</name><bndbox><xmax>9</xmax><xmin>1</xmin><ymax>9</ymax>"
            objects += "<ymin>1</ymin></bndbox></object>"  # object 1 is nobody
            for place, (_, other) in enumerate(persons):
                objects += (
                    "<object><name>person</name><bndbox><xmax>"
                    f"{20 + place}.0</xmax><xmin>11</xmin><ymax>16</ymax><ymin>7</ymin></bndbox>"
                    f"<difficult>{place}</difficult><actions><other>{int(other)}</other></actions>"
                    "</object>"
                )
            path = folder / "Annotations" / f"{image}.xml"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"<annotation><filename>{image}.jpg</filename>{objects}</annotation>")
            self.image(folder / "JPEGImages" / f"{image}.jpg")
            return folder / "JPEGImages" / f"{image}.jpg"

        for number, part, label in self.labeled("actions", len(ACTIONS)):
            image = f"2010_{number:06d}"
            people["val" if part == "test" else "train"].append((image, 2, {label}))
            self.note("actions", part, photograph(image, ({label}, False)), label)
        photograph("2011_000001", ({1}, False), ({2}, False))
        people["train"] += [("2011_000001", 2, {1}), ("2011_000001", 3, {2})]
        photograph("2011_000002", ({4, 6}, False))
        people["train"].append(("2011_000002", 2, {4, 6}))
        photograph("2011_000003", (set(), True))
        people["val"].append(("2011_000003", 2, set()))
        lists = folder / "ImageSets" / "Action"
        for part, rows in people.items():
            self.text(lists / f"{part}.txt", sorted({image for image, _, _ in rows}))
            for label, action in enumerate(ACTIONS):
                lines = [f"{i}  {p} {1 if label in does else -1:2d}" for i, p, does in rows]
                self.text(lists / f"{action}_{part}.txt", lines)

    def letters(self) -> None:
        folder = self.root / "English" / "Fnt"
        for character in (0, 10, 36):  # 0, A, a
            for number in range(1, 6):
                name = f"img{character + 1:03d}-{number:05d}.png"
                self.image(folder / f"Sample{character + 1:03d}" / name, "L", (128, 128))

    def svhn(self) -> None:
        (self.root / "svhn").mkdir(parents=True)
        for part, count in (("train", 2), ("test", 1)):
            labels = self.generator.permutation(np.repeat(np.arange(1, 11), count))
            shape = (32, 32, 3, len(labels))
            pixels = self.generator.integers(256, size=shape, dtype=np.uint8)
            mat = {"X": pixels, "y": labels[:, None].astype(np.uint8)}
            savemat(self.root / "svhn" / f"{part}_32x32.mat", mat)


@pytest.fixture
def trees(tmp_path: Path) -> Callable[..., Trees]:
    """``trees("flowers", "cars")`` writes these below the test's folder; ``trees()`` all of them."""

    def write(*names: str) -> Trees:
        return Trees(tmp_path).write(*names)

    return write
