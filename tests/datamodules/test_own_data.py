"""People's own images: trees of folders and archives, whole and broken."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2.functional import to_dtype

from bpn_lightning.datamodules import SplitArrays, SplitImageFolder
from bpn_lightning.datamodules.readers import read_class_folders
from bpn_lightning.errors import DataError

Write = Callable[..., dict[str, np.ndarray]]

# ---------------------------------------------------------------------- folders


def test_images_are_resized_as_pillow_does(tmp_path: Path, write_tree: Write) -> None:
    written = write_tree(tmp_path, ("b", "a"), (20, 10, 3), count=2)
    stream = SplitImageFolder(str(tmp_path), image_size=8)
    stream.setup()
    assert stream.input_shape == (3, 8, 8)
    assert stream.tasks[0].class_names == ("a", "b")
    (batch,) = stream.loader(0, "train")
    names = [f"train/{name}/{i}" for name in ("a", "b") for i in range(2)]
    for image, name in zip(batch.inputs, names, strict=True):
        resized = Image.fromarray(written[name]).resize((8, 8), Image.Resampling.BILINEAR)
        assert np.array_equal(image.permute(1, 2, 0).numpy(), np.asarray(resized))


def test_every_kind_of_image_is_read_and_other_files_are_passed_over(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    gray = generator.integers(256, size=(8, 8), dtype=np.uint8)
    color = generator.integers(256, size=(8, 8, 3), dtype=np.uint8)
    for part in ("train", "test"):
        for name in ("a", "b"):
            folder = tmp_path / part / name
            folder.mkdir(parents=True)
            Image.fromarray(gray).save(folder / "1_gray.png")
            Image.fromarray(color).save(folder / "2_bitmap.BMP")
            Image.fromarray(color).convert("RGBA").save(folder / "3_alpha.png")
            Image.fromarray(gray).convert("P").save(folder / "4_palette.gif")
            Image.fromarray(color).convert("CMYK").save(folder / "5_print.tiff")
            (folder / "notes.txt").write_text("not an image")
            (folder / ".6_hidden.png").write_text("not an image")
        (tmp_path / part / ".git").mkdir()
        (tmp_path / part / "labels.csv").write_text("not a class")
    stream = SplitImageFolder(str(tmp_path), image_size=8)
    stream.setup()
    assert [task.class_names for task in stream.tasks] == [("a", "b")]
    (batch,) = stream.loader(0, "train")
    assert batch.targets.tolist() == [0] * 5 + [1] * 5
    images = batch.inputs.permute(0, 2, 3, 1).numpy()
    for i, expected in enumerate([gray[:, :, None].repeat(3, 2), color, color]):
        assert np.array_equal(images[i], expected)
    assert np.array_equal(images[3], images[0])


def test_grayscale_reads_one_channel(tmp_path: Path, write_tree: Write) -> None:
    written = write_tree(tmp_path, ("a", "b"), (8, 8, 3), count=1)
    stream = SplitImageFolder(str(tmp_path), image_size=8, channels=1)
    stream.setup()
    (batch,) = stream.loader(0, "train")
    expected = np.asarray(Image.fromarray(written["train/a/0"]).convert("L"))
    assert np.array_equal(batch.inputs[0].numpy(), expected[None])


def test_a_home_folder_is_found(
    tmp_path: Path, write_tree: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    write_tree(tmp_path / "mine", ("a", "b"), count=1)
    SplitImageFolder("~/mine").setup()


def test_height_comes_before_width(tmp_path: Path, write_tree: Write) -> None:
    written = write_tree(tmp_path, ("a",), (20, 10, 3), count=1)
    data = read_class_folders(tmp_path, 3, 20, 10, resize=False)
    assert np.array_equal(data.test.images[0].permute(1, 2, 0).numpy(), written["test/a/0"])


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[: len(data) // 2],
        lambda data: b"",
        lambda data: b"no image at all",
        lambda data: data[:40] + bytes(20) + data[60:],
    ],
    ids=["truncated", "empty", "foreign", "corrupt"],
)
def test_a_broken_image_is_named(
    tmp_path: Path, write_tree: Write, damage: Callable[[bytes], bytes]
) -> None:
    write_tree(tmp_path, ("a", "b"))
    file = tmp_path / "test" / "b" / "1.png"
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(DataError, match=rf"{file} to be an intact image .* Replace the file"):
        SplitImageFolder(str(tmp_path)).setup()


def test_every_broken_image_is_named(tmp_path: Path, write_tree: Write) -> None:
    write_tree(tmp_path, ("a", "b"), count=8)
    broken = sorted((tmp_path / "train").rglob("[1-6].png"))
    broken.append(tmp_path / "test" / "a" / "0.png")
    for file in broken:
        file.write_text("no image")
    with pytest.raises(
        DataError, match=rf"{broken[0]} to be an intact image .* 12 more: "
    ) as error:
        SplitImageFolder(str(tmp_path)).setup()
    named = [file for file in broken if f"{file} (Unidentified" in str(error.value)]
    assert named == broken[1:10]
    assert "and 3 more. Replace the file" in str(error.value)


@pytest.mark.parametrize("order", ["<u2", ">u2"])
@pytest.mark.parametrize("suffix", [".png", ".tiff", ".pgm"])
def test_images_of_16_bits_are_read_as_torchvision_does(
    tmp_path: Path, suffix: str, order: str
) -> None:
    pixels = np.random.default_rng(0).integers(2**16, size=(9, 7), dtype=np.uint16)
    pixels[0, :2] = 0, 2**16 - 1
    for part in ("train", "test"):
        for name in ("a", "b"):
            (tmp_path / part / name).mkdir(parents=True)
            path = tmp_path / part / name / f"0{suffix}"
            if suffix == ".pgm":  # by hand: Pillow 10 does not write them with 16 bits
                path.write_bytes(b"P5 7 9 65535\n" + pixels.astype(">u2").tobytes())
                continue
            Image.fromarray(pixels.astype(order) if suffix == ".tiff" else pixels).save(path)
    data = read_class_folders(tmp_path, 1, 9, 7, resize=False)
    scaled = to_dtype(torch.from_numpy(pixels), torch.uint8, scale=True)
    assert torch.equal(data.train.images, scaled.expand(2, 1, 9, 7))


def test_dark_images_of_16_bits_are_warned_of(tmp_path: Path, write_tree: Write) -> None:
    write_tree(tmp_path, ("a", "b"), (8, 8), count=1)
    file = tmp_path / "train" / "a" / "0.png"
    Image.fromarray(np.full((8, 8), 4095, dtype=np.uint16)).save(file)
    with pytest.warns(UserWarning, match=r"is 4,095 of 65,535, so that they become 16 of 256"):
        SplitImageFolder(str(tmp_path)).setup()


def test_pixels_of_other_depths_are_refused(tmp_path: Path, write_tree: Write) -> None:
    write_tree(tmp_path, ("a", "b"))
    for kind, mode in ((np.int32, "I"), (np.float32, "F")):
        file = tmp_path / "train" / "a" / "0.tiff"
        Image.fromarray(np.full((8, 8), 1000, dtype=kind)).save(file)
        with pytest.raises(DataError, match=rf"{file} .* not of 8 or 16 bits \(mode {mode}\)"):
            SplitImageFolder(str(tmp_path)).setup()


@pytest.mark.parametrize(
    ("folders", "root", "said"),
    [
        (["train/a"], ".", "There is {root}/train: move a part .* to {root}/test/<class>/"),
        (["test/a"], ".", "There is {root}/test: move a part .* to {root}/train/<class>/"),
        (["a", "b"], ".", "The classes a, b are in {root} itself: move the images of each to"),
        (["train/a", "test/a"], "train", "Name {root} instead, the folder that holds train and"),
        (["x/train/a", "x/test/a"], ".", "Name {root}/x instead, which holds train and test"),
        ([], "none", "There is no folder {root}/none: name the one that holds train and test"),
        (["empty"], ".", "Arrange the images as {root}/.train,test./<class>/"),
    ],
)
def test_folders_without_parts_are_told_what_helps(
    tmp_path: Path, folders: list[str], root: str, said: str
) -> None:
    for folder in folders:
        (tmp_path / folder).mkdir(parents=True)
        if folder != "empty":
            Image.new("L", (8, 8)).save(tmp_path / folder / "0.png")
    with pytest.raises(DataError, match=said.format(root=tmp_path)):
        SplitImageFolder(str(tmp_path / root)).setup()


def test_a_class_without_test_images_is_named(tmp_path: Path, write_tree: Write) -> None:
    write_tree(tmp_path, ("a", "b"), count=1)
    (tmp_path / "test" / "b" / "0.png").unlink()
    with pytest.raises(DataError, match=rf"test images in {tmp_path}, but got none of 'b'"):
        SplitImageFolder(str(tmp_path)).setup()


def test_a_class_folder_that_cannot_be_read_is_named(
    tmp_path: Path, write_tree: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_tree(tmp_path, ("a", "b"), count=1)
    real = Path.iterdir

    def refuse(path: Path) -> object:
        if path.name == "b":
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(Path, "iterdir", refuse)
    with pytest.raises(DataError, match=r"readable, but got PermissionError: .*b'"):
        SplitImageFolder(str(tmp_path)).setup()


# ---------------------------------------------------------------------- archives


def arrays(color: bool = False, column: bool = False) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    made = {}
    for part, count in (("train", 12), ("val", 4), ("test", 6)):
        shape = (count, 9, 7, 3) if color else (count, 9, 7)
        made[f"{part}_images"] = generator.integers(256, size=shape, dtype=np.uint8)
        labels = np.arange(count) % 2 + 4
        made[f"{part}_labels"] = labels[:, None] if column else labels
    return made


@pytest.mark.parametrize("color", [False, True])
@pytest.mark.parametrize("column", [False, True])
def test_arrays_are_read_as_they_are(tmp_path: Path, color: bool, column: bool) -> None:
    made = arrays(color, column)
    np.savez_compressed(tmp_path / "a.npz", **made)
    stream = SplitArrays(str(tmp_path / "a.npz"), class_order=["5", "4"])
    stream.setup()
    assert stream.tasks[0].class_names == ("5", "4")
    assert stream.input_shape == ((3, 9, 7) if color else (1, 9, 7))
    for split in ("train", "test"):
        (batch,) = stream.loader(0, split)  # type: ignore[arg-type]
        images = batch.inputs.permute(0, 2, 3, 1).numpy().reshape(made[f"{split}_images"].shape)
        assert np.array_equal(images, made[f"{split}_images"])
        assert torch.equal(batch.targets, torch.tensor(5 - made[f"{split}_labels"].flatten()))


def broken(change: Callable[[dict[str, np.ndarray]], object]) -> dict[str, np.ndarray]:
    made = arrays()
    change(made)
    return made


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (broken(lambda a: a.pop("test_labels")), "but got .*Add test_labels"),
        (
            broken(lambda a: a.update(train_images=a["train_images"] / 255)),
            r"train_images in .* uint8 .* but got float64 of shape \(12, 9, 7\)",
        ),
        (
            broken(lambda a: a.update(test_images=a["test_images"][0])),
            r"test_images in .* but got uint8 of shape \(9, 7\)",
        ),
        (
            broken(lambda a: a.update(train_labels=a["train_labels"][:5])),
            "train_labels in .* each of the 12 images, but got 5",
        ),
        (
            broken(lambda a: a.update(train_labels=np.zeros((12, 14), dtype=int))),
            r"train_labels .* but got int64 of shape \(12, 14\)\. Samples with several labels",
        ),
        (
            broken(lambda a: a.update(test_labels=np.array(["a"] * 6))),
            "of one kind, but got int64 and <U1. Make both integers, or both strings",
        ),
        (
            broken(lambda a: a.update(train_labels=a["train_labels"] / 3)),
            "Regression targets are not classes: discretize them.* numpy.digitize",
        ),
        (
            broken(lambda a: a.update(train_labels=a["train_labels"] / 1)),
            r"train_labels .* but got float64 of shape \(12,\)\. Convert them with \.astype",
        ),
        (
            broken(lambda a: a.update(test_labels=np.array([b"\xff"] * 6))),
            "test_labels in .* to be strings in UTF-8",
        ),
        (
            broken(lambda a: a.update(train_images=a["train_images"].astype(np.int32))),
            "uint8 or uint16 .* but got int32",
        ),
        (
            broken(lambda a: a.update(test_images=a["test_images"][:, :5])),
            r"one size, but got \(1, 9, 7\) and \(1, 5, 7\)",
        ),
        (
            broken(lambda a: a.update(train_labels=np.array([{}] * 12))),
            "plain arrays, but got ValueError: .*allow_pickle=False. .* strings with .astype",
        ),
        (
            broken(lambda a: a.update(test_labels=a["test_labels"] * 0 + 4)),
            "test images in .*a.npz, but got none of '5'",
        ),
    ],
)
def test_wrong_arrays_are_errors(tmp_path: Path, made: dict[str, np.ndarray], message: str) -> None:
    np.savez(tmp_path / "a.npz", **made)
    with pytest.raises(DataError, match=message) as caught:
        SplitArrays(str(tmp_path / "a.npz")).setup()
    assert str(tmp_path / "a.npz") in str(caught.value)


@pytest.mark.parametrize("left", [0, 10, 1000, -1])
@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_a_truncated_archive_is_named(tmp_path: Path, left: int, save: Callable[..., None]) -> None:
    file = tmp_path / "a.npz"
    save(file, **arrays())
    file.write_bytes(file.read_bytes()[:left])
    with pytest.raises(DataError, match=rf"{file} to be an intact \.npz archive"):
        SplitArrays(str(file)).setup()


def test_flipped_bytes_in_an_archive_are_found(tmp_path: Path) -> None:
    file = tmp_path / "a.npz"
    np.savez(file, **arrays())
    data = bytearray(file.read_bytes())
    data[300:310] = bytes(255 - byte for byte in data[300:310])
    file.write_bytes(data)
    with pytest.raises(DataError, match=rf"{file} to be an intact \.npz archive"):
        SplitArrays(str(file)).setup()


def test_a_single_array_and_a_missing_file_are_no_archives(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.zeros(3))
    with pytest.raises(DataError, match=r"a\.npy to be an intact \.npz archive"):
        SplitArrays(str(tmp_path / "a.npy")).setup()
    with pytest.raises(DataError, match=r"none\.npz to be readable, but got FileNotFoundError"):
        SplitArrays(str(tmp_path / "none.npz")).setup()
