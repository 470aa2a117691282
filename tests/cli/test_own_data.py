"""``bpn-data check`` and ``bpn-fit --new`` on data of one's own, whole and broken."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from bpn_lightning.cli.data import main as bpn_data
from bpn_lightning.cli.main import main as bpn_fit
from bpn_lightning.datamodules import SplitArrays, SplitImageFolder
from bpn_lightning.datamodules.survey import survey

Write = Callable[[Path], None]
Said = pytest.CaptureFixture[str]


def image(path: Path, size: tuple[int, int], value: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.full((size[1], size[0], 3), value, np.uint8)
    pixels[0, 0] = 0, value, 255
    Image.fromarray(pixels).save(path)


@pytest.fixture
def leaves(tmp_path: Path) -> Path:
    """Five classes of different sizes and numbers."""
    folder = tmp_path / "leaves"
    for part, times in (("train", 2), ("test", 1)):
        for number, name in enumerate(["ash", "beech", "elm", "oak: red", "1"]):
            for i in range(times * (number + 1)):
                size = (20 + 4 * number, 16)
                image(folder / part / name / f"{i}.png", size, 10 * i + times)
    return folder


def archive(path: Path, kind: str, classes: int = 3) -> Path:
    rng = np.random.default_rng(0)
    arrays = {}
    for part, count in (("train", 8), ("test", 4)):
        labels = np.repeat(np.arange(classes), count)
        if kind == "features":
            arrays[f"{part}_features"] = rng.normal(size=(len(labels), 5))
        elif kind == "images":
            arrays[f"{part}_images"] = rng.integers(256, size=(len(labels), 12, 10), dtype=np.uint8)
        else:
            arrays[f"{part}_tokens"] = rng.integers(9, size=(len(labels), 6))
        arrays[f"{part}_labels"] = labels
    np.savez(path, **arrays)
    return path


def test_it_says_what_is_there(leaves: Path, capsys: Said) -> None:
    assert bpn_data(["check", str(leaves)]) == 0
    said = capsys.readouterr().out
    rows = [line.rsplit(None, 2) for line in said.splitlines()[1:6]]
    assert rows == [
        ["1", "10", "5"],
        ["ash", "2", "1"],
        ["beech", "4", "2"],
        ["elm", "6", "3"],
        ["oak: red", "8", "4"],
    ]
    assert "45 images from 20 x 16 to 36 x 16; 15 have 36 x 16 pixels, in color." in said
    assert "A stream of 2 tasks: 1 + ash; beech + elm + oak: red." in said
    assert f"bpn-fit --new leaves.yaml --data {leaves}" in said
    assert "Note" not in said


def test_the_stream_is_the_one_that_a_datamodule_has(leaves: Path) -> None:
    found = survey(leaves)
    stream = SplitImageFolder(str(leaves), image_size=8, classes_per_task=5)
    stream.setup()
    assert tuple(found.classes) == stream.tasks[0].class_names
    for column, counts in enumerate(found.classes.values()):
        for split, count in zip(("train", "test"), counts, strict=True):
            targets = [batch.targets for batch in stream.loader(0, split)]
            assert sum(int((of == column).sum()) for of in targets) == count


def test_every_broken_file_is_named(leaves: Path, capsys: Said) -> None:
    broken = [leaves / "train" / "elm" / f"{i}.png" for i in range(4)]
    for path in broken:
        path.write_bytes(path.read_bytes()[:60])
    (leaves / "test" / "ash" / "0.png").write_text("not an image")  # its only one
    assert bpn_data(["check", str(leaves)]) == 1
    said = capsys.readouterr().out
    for path in broken:
        assert f"{path} is damaged: " in said
    assert "The class ash has no test samples." in said
    assert "Not usable as it is (6):" in said
    assert "A stream of" not in said


def test_what_looks_odd_is_noted(leaves: Path, capsys: Said) -> None:
    for i in range(30):
        image(leaves / "train" / "beech" / f"more_{i}.png", (22, 16), i)
    twin = leaves / "test" / "elm" / "twin.png"
    twin.write_bytes((leaves / "train" / "ash" / "1.png").read_bytes())
    (leaves / "train" / "elm" / "notes.txt").write_text("seen on Monday")
    assert bpn_data(["check", str(leaves)]) == 0
    said = capsys.readouterr().out
    assert "beech has 17 times the training samples of ash." in said
    assert f"1 test files are training files, too, byte by byte: {twin}." in said
    assert (
        f"1 files are no images by their suffixes, and left out: {leaves}/train/elm/notes.txt"
        in said
    )


def test_gray_images_are_called_gray(tmp_path: Path, capsys: Said) -> None:
    for part in ("train", "test"):
        for name in "ab":
            path = tmp_path / part / name / "0.png"
            path.parent.mkdir(parents=True)
            Image.fromarray(np.full((9, 9), ord(part[1]), np.uint8)).save(path)
    assert bpn_data(["check", str(tmp_path)]) == 0
    assert "4 images of 9 x 9 pixels, gray." in capsys.readouterr().out


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("features", "36 features of 5."),
        ("images", "36 images of 10 x 12 pixels, gray."),
        ("tokens", "36 tokens of 6."),
    ],
)
def test_archives(tmp_path: Path, capsys: Said, kind: str, words: str) -> None:
    assert bpn_data(["check", str(archive(tmp_path / "rows.npz", kind))]) == 0
    said = capsys.readouterr().out
    assert words in said
    assert "A stream of 2 tasks: 0 + 1; 2." in said


def test_images_without_pixels_cannot_be_used(tmp_path: Path, capsys: Said) -> None:
    images, labels = np.zeros((4, 0, 3), np.uint8), np.arange(4) % 2
    arrays = {f"{part}_images": images for part in ("train", "test")}
    np.savez(
        tmp_path / "a.npz", **arrays, **{f"{part}_labels": labels for part in ("train", "test")}
    )
    assert bpn_data(["check", str(tmp_path / "a.npz")]) == 1
    assert "Samples of 3 x 0 hold no numbers." in capsys.readouterr().out


def test_a_layout_that_no_stream_reads_names_the_one_that_it_reads(
    leaves: Path, capsys: Said
) -> None:
    (leaves / "test").rename(leaves.parent / "elsewhere")
    assert bpn_data(["check", str(leaves)]) == 2
    said = capsys.readouterr().err
    assert f"Expected the folder {leaves}/test" in said
    assert f"move a part of each class's images from there to {leaves}/test" in said


# ------------------------------------------------------------------------------ bpn-fit --new


def test_a_new_config_has_the_classes_and_the_stream(
    leaves: Path, monkeypatch: pytest.MonkeyPatch, capsys: Said
) -> None:
    monkeypatch.chdir(leaves.parent)
    assert bpn_fit(["--new", "mine.yaml", "--data", "leaves"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "mine.yaml: 2 tasks: 1 + ash; beech + elm + oak: red.",
        "Next: bpn-fit --config mine.yaml",
    ]
    written = Path("mine.yaml").read_text()
    data = yaml.safe_load(written)["data"]
    stream = SplitImageFolder(**data["init_args"])
    stream.setup()
    assert [task.class_names for task in stream.tasks] == [
        ("1", "ash"),
        ("beech", "elm", "oak: red"),
    ]
    assert stream.input_shape == (3, 36, 36)
    assert written.count("#") > 5


@pytest.mark.slow
@pytest.mark.parametrize("method", [None, "bd+ewc"])
def test_it_learns_small_images(
    leaves: Path, monkeypatch: pytest.MonkeyPatch, method: str | None
) -> None:
    monkeypatch.chdir(leaves.parent)
    assert bpn_fit(["--new", "mine.yaml", "--data", str(leaves)]) == 0
    chosen = [] if method is None else ["--method", method]
    flags = ["--fronts.patches.num_patches", "8", "--data.init_args.epochs_per_task", "1"]
    assert bpn_fit(["--config", "mine.yaml", *chosen, *flags, "--quiet"]) == 0
    assert len(list(Path("runs/mine").glob("*/seed_0/results.json"))) == 1


@pytest.mark.slow
def test_it_learns_features(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    archive(tmp_path / "rows.npz", "features", classes=4)
    assert bpn_fit(["--new", "rows.yaml", "--data", "rows.npz"]) == 0
    config = yaml.safe_load(Path("rows.yaml").read_text())
    stream = SplitArrays(**config["data"]["init_args"])
    stream.setup()
    assert [task.class_names for task in stream.tasks] == [("0", "1"), ("2", "3")]
    assert (
        bpn_fit(["--config", "rows.yaml", "--data.init_args.epochs_per_task", "1", "--quiet"]) == 0
    )


@pytest.mark.slow
def test_it_learns_large_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a network with random weights, as there is no way to torchvision's."""
    monkeypatch.chdir(tmp_path)
    for part in ("train", "test"):
        for number, name in enumerate("abcd"):
            for i in range(2):
                image(tmp_path / "large" / part / name / f"{i}.jpg", (80, 70), 50 * number + i)
    assert bpn_fit(["--new", "large.yaml", "--data", "large"]) == 0
    config = yaml.safe_load(Path("large.yaml").read_text())
    assert config["fronts"]["frozen"]["network"]["init_args"]["weights"] == "DEFAULT"
    assert config["data"]["init_args"]["image_size"] == 224
    flags = ["--fronts.frozen.network.init_args.weights", "null"]
    flags += ["--data.init_args.image_size", "64", "--data.init_args.epochs_per_task", "1"]
    assert bpn_fit(["--config", "large.yaml", *flags, "--quiet"]) == 0


def test_nothing_is_overwritten(
    leaves: Path, monkeypatch: pytest.MonkeyPatch, capsys: Said
) -> None:
    monkeypatch.chdir(leaves.parent)
    Path("mine.yaml").write_text("seed_everything: 1\n")
    assert bpn_fit(["--new", "mine.yaml", "--data", "leaves"]) == 2
    assert "file that does not exist, but mine.yaml does" in capsys.readouterr().err
    assert Path("mine.yaml").read_text() == "seed_everything: 1\n"


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--new", "mine.yaml"], "Expected --new FILE and --data PATH, and nothing else"),
        (["--new", "mine.yaml", "--data", "leaves", "--method", "ewc"], "and nothing else"),
        (["--new"], "Expected --new FILE and --data PATH"),
        (["--new", "mine", "--data", "leaves"], "that ends in .yaml, but got 'mine'"),
        (["--new", "mine.yaml", "--data", "trees"], "there is no "),
        (["--new", "no/mine.yaml", "--data", "leaves"], "can be written"),
        (["--new", "mine.yaml", "--data", "words.npz"], "holds tokens"),
    ],
)
def test_bad_input(
    leaves: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Said,
    argv: list[str],
    words: str,
) -> None:
    monkeypatch.chdir(leaves.parent)
    archive(Path("words.npz"), "tokens")
    assert bpn_fit(argv) == 2
    assert words in capsys.readouterr().err
    assert not Path("mine.yaml").exists()


def test_data_that_cannot_be_used_get_no_config(
    leaves: Path, monkeypatch: pytest.MonkeyPatch, capsys: Said
) -> None:
    monkeypatch.chdir(leaves.parent)
    for i in range(2):
        (leaves / "train" / "ash" / f"{i}.png").write_text("not an image")
    assert bpn_fit(["--new", "mine.yaml", "--data", "leaves"]) == 2
    said = capsys.readouterr().err
    assert f"{leaves}/train/ash/0.png is damaged" in said
    assert f"`bpn-data check {leaves}` lists 3 of such faults" in said
    assert not Path("mine.yaml").exists()
