"""Files as they should not be: what the rows of bad_input.yaml name, by their kind and their name."""

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

Prepare = Callable[[pytest.MonkeyPatch], object]

BEE = "set/train/bee/1.png"
OWL = "birds/images/002.O/3.png"


@pytest.fixture(scope="module", autouse=True)
def _without_pictures(no_pictures: None) -> None:
    """tests/run/ looks at them."""


class Payload:
    """Unpickling it makes a file."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("owned"),)


def image(path: str, size: tuple[int, int] = (8, 8), mode: str = "RGB") -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size).save(path)


def folders(*_: object) -> None:
    """Two classes, an image of each in either part."""
    for part in ("train", "test"):
        for name in ("ant", "bee"):
            image(f"set/{part}/{name}/1.png")


def with_folders(change: Callable[[], object]) -> Prepare:
    def prepare(_: object) -> None:
        folders()
        change()

    return prepare


def link(place: str, target: str) -> None:
    Path("elsewhere").mkdir()
    image("elsewhere/1.png")
    if Path(place).is_dir():
        Path(place, "1.png").unlink()
        Path(place).rmdir()
    else:
        Path(place).unlink()
    Path(place).symlink_to(Path(target).absolute())


def arrays(**change: Any) -> Prepare:
    def prepare(_: object) -> None:
        images, labels = np.zeros((4, 8, 8), np.uint8), np.arange(4) % 2
        whole = {"train_images": images, "train_labels": labels}
        whole |= {"test_images": images, "test_labels": labels}
        kept = {key: value for key, value in (whole | change).items() if value is not None}
        np.savez_compressed("x.npz", allow_pickle=True, **kept)

    return prepare


def cut(_: object) -> None:
    arrays()(None)
    Path("x.npz").write_bytes(Path("x.npz").read_bytes()[:-40])


def array_bomb(patch: pytest.MonkeyPatch) -> None:
    """Instead of a gigabyte: as if much less were too much."""
    patch.setattr("bpn_lightning.files.untrusted.MOST_BYTES", 2**20)
    arrays(train_images=np.zeros((2**15, 8, 8), np.uint8))(None)


def birds(**change: str) -> Prepare:
    """A small CUB-200-2011 of two species, two training images and a test image each."""

    def prepare(_: object) -> None:
        lists = {
            "classes": "1 001.Auk\n2 002.Owl\n",
            "images": "".join(f"{k} 00{k % 2 + 1}.{'AO'[k % 2]}/{k}.png\n" for k in range(1, 7)),
            "image_class_labels": "".join(f"{k} {k % 2 + 1}\n" for k in range(1, 7)),
            "train_test_split": "".join(f"{k} {int(k < 5)}\n" for k in range(1, 7)),
        }
        Path("birds").mkdir()
        for name, text in (lists | change).items():
            if text:
                Path(f"birds/{name}.txt").write_text(text)
        for k in range(1, 7):
            image(f"birds/images/00{k % 2 + 1}.{'AO'[k % 2]}/{k}.png")

    return prepare


def with_birds(change: Callable[[], object]) -> Prepare:
    def prepare(_: object) -> None:
        birds()(None)
        change()

    return prepare


def mnist(_: object) -> None:
    folder = Path("set/MNIST/raw")
    folder.mkdir(parents=True)
    for name in ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1"):
        # It says that it has 2**32 - 1 images of as many pixels.
        (folder / f"{name}-ubyte").write_bytes(bytes([0, 0, 8, int(name[-1])]) + b"\xff" * 12)


def odd_label(_: object) -> None:
    """Whole files, whose last label is no digit."""
    folder = Path("set/MNIST/raw")
    folder.mkdir(parents=True)
    for part in ("train", "t10k"):
        images = bytes([0, 0, 8, 3, 0, 0, 0, 2, 0, 0, 0, 28, 0, 0, 0, 28]) + bytes(2 * 28 * 28)
        (folder / f"{part}-images-idx3-ubyte").write_bytes(images)
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(bytes([0, 0, 8, 1, 0, 0, 0, 2, 0, 10]))


def cifar(_: object) -> None:
    folder = Path("set/cifar-10-batches-py")
    folder.mkdir(parents=True)
    for name in (*(f"data_batch_{k}" for k in range(1, 6)), "test_batch", "batches.meta"):
        (folder / name).write_bytes(pickle.dumps(Payload()))


def checkpoint(content: Any) -> Prepare:
    return lambda _: torch.save(content, "x.ckpt")


def poisoned_download(patch: pytest.MonkeyPatch) -> None:
    patch.setenv("TORCH_HOME", "home")
    Path("home/hub/checkpoints").mkdir(parents=True)
    torch.save(Payload(), "home/hub/checkpoints/resnet18-f37072fd.pth")


def of_birds(line: str) -> str:
    """A line for each of the six images; k stands for its id."""
    return "".join(line.replace("k", str(k)) + "\n" for k in range(1, 7))


FILES: dict[str, dict[str, Prepare]] = {
    "folders": {
        "no test part": lambda _: image("set/train/ant/1.png"),
        "no images": with_folders(lambda: Path(BEE).unlink()),
        "a truncated image": with_folders(
            lambda: Path(BEE).write_bytes(Path(BEE).read_bytes()[:40])
        ),
        "words": with_folders(lambda: Path(BEE).write_text("no image")),
        "a program for Ghostscript": with_folders(
            lambda: Path(BEE).write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n")
        ),
        "deep pixels": with_folders(lambda: image("set/train/bee/1.tiff", mode="F")),
        "a bomb": with_folders(lambda: image(BEE, (9500, 9500), "1")),
        "a large bomb": with_folders(lambda: image(BEE, (14000, 14000), "1")),
        "a link to a file": with_folders(lambda: link(BEE, "elsewhere/1.png")),
        "a link to a folder": with_folders(lambda: link("set/train/bee", "elsewhere")),
        "a link to nowhere": with_folders(lambda: link(BEE, "nowhere")),
    },
    "arrays": {
        "a cut archive": cut,
        "a pickle": lambda _: Path("x.npz").write_bytes(pickle.dumps(Payload())),
        "pickled objects": arrays(train_labels=np.array([Payload()] * 4, object)),
        "a missing array": arrays(test_labels=None),
        "floats": arrays(train_images=np.zeros((4, 8, 8))),
        "five dimensions": arrays(train_images=np.zeros((4, 8, 8, 3, 1), np.uint8)),
        "too few labels": arrays(train_labels=np.arange(3)),
        "labels of two kinds": arrays(train_labels=np.array(list("abab"))),
        "targets of regression": arrays(train_labels=np.arange(4) / 4),
        "several labels each": arrays(train_labels=np.zeros((4, 2), int)),
        "two sizes": arrays(test_images=np.zeros((4, 9, 8), np.uint8)),
        "one class": arrays(train_labels=np.zeros(4, int), test_labels=np.zeros(4, int)),
        "no images": arrays(
            train_images=np.zeros((0, 8, 8), np.uint8), train_labels=np.zeros(0, int)
        ),
        "a bomb": array_bomb,
    },
    "birds": {
        "a whole set": birds(),
        "a missing list": birds(images=""),
        "an id without an image": with_birds(lambda: Path(OWL).unlink()),
        "an id of one list only": birds(train_test_split="1 1\n"),
        "an id twice": birds(classes="1 001.Auk\n1 002.Owl\n"),
        "a label out of range": birds(image_class_labels=of_birds("k 3")),
        "half a line": birds(train_test_split="1\n"),
        "a way out": birds(images=of_birds("k ../../../etc/k.png")),
        "a whole path": birds(images=of_birds("k /etc/k.png")),
        "a null character": birds(images=of_birds("k \0k.png")),
        "a link out": with_birds(lambda: link(OWL, "elsewhere/1.png")),
        "a corrupt image in the middle": with_birds(lambda: Path(OWL).write_bytes(b"")),
        "a bomb": with_birds(lambda: image(OWL, (9500, 9500), "1")),
    },
    "torchvision": {
        "sizes of no file": mnist,
        "a label that is no digit": odd_label,
        "pickles": cifar,
        "a poisoned download": poisoned_download,
    },
    "x.ckpt": {
        "a pickle": lambda _: Path("x.ckpt").write_bytes(pickle.dumps(Payload())),
        "a payload": checkpoint(Payload()),
        "a payload in its weights": checkpoint({"state_dict": Payload()}),
        "a payload in its callbacks": checkpoint({"state_dict": {}, "callbacks": Payload()}),
        "a list": checkpoint([1, 2]),
        "nothing": lambda _: Path("x.ckpt").write_bytes(b""),
        "a network": checkpoint(torch.nn.Linear(1, 1)),
        "another module's": checkpoint({"state_dict": {}}),
        "another network's": checkpoint({"a": torch.zeros(1)}),
    },
}


@pytest.fixture
def bad_file(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """Makes the files of a kind and a name in the current folder."""
    return lambda kind, name: FILES[kind][name](monkeypatch)
