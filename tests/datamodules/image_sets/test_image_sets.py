"""Every reader on a small tree in the official layout, whole and broken."""

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from scipy.io import loadmat, savemat
from torchvision import datasets

from bpn_lightning.datamodules.image_sets import (
    CUB200,
    IMAGE_SETS,
    SVHN,
    Chars74K,
    Entry,
    FGVCAircraft,
    Flowers102,
    ImageSet,
    Indoor67,
    StanfordCars,
    VOCActions,
    make_image_set,
)
from bpn_lightning.errors import ConfigurationError, DataError

Trees = Callable[..., Any]
LISTED = ("flowers", "scenes", "birds", "cars", "aircraft", "actions")


def read(image_set: ImageSet) -> Any:
    return image_set.checked(expect_counts=False)


def pairs(entries: list[Entry]) -> list[tuple[str, int]]:
    return sorted((str(entry.path), entry.label) for entry in entries)


# ---------------------------------------------------------------------- what is read


@pytest.mark.parametrize("name", LISTED)
def test_reads_what_was_written(name: str, trees: Trees) -> None:
    tree = trees(name)
    listing = read(IMAGE_SETS[name](tree.root))
    assert pairs(listing.train) == sorted(tree.parts[name]["train"])
    assert pairs(listing.test) == sorted(tree.parts[name]["test"])


@pytest.mark.parametrize(
    ("name", "names"),
    [
        ("scenes", ["airport_inside", "bakery", "tv_studio"]),
        ("birds", ["001.Black_footed_Albatross", "002.Laysan_Albatross", "003.Sooty_Albatross"]),
        ("cars", ["AM General Hummer SUV 2000", "Acura RL 2012", "Audi S4/A4"]),
        ("aircraft", ["Boeing 737", "F/A-18", "MD-80"]),
        ("letters", ["0", "A", "a"]),
    ],
)
def test_classes_have_the_names_of_the_set(name: str, names: list[str], trees: Trees) -> None:
    assert read(IMAGE_SETS[name](trees(name).root)).class_names == names


def pixels(image_set: Any, entry: Entry) -> Any:
    """``(height, width, 3)`` uint8."""
    with image_set.open(entry) as image:
        return np.asarray(image)


@pytest.mark.parametrize("name", list(IMAGE_SETS))
def test_every_image_is_decoded_to_color(name: str, trees: Trees) -> None:
    """Among them gray ones, and those of four inks."""
    image_set = IMAGE_SETS[name](trees(name).root)
    listing = read(image_set)
    for entry in [*listing.train, *listing.test]:
        with image_set.open(entry) as image:
            assert (image.mode, image.size > (0, 0)) == ("RGB", True)


# ---------------------------------------------------------------------- torchvision reads the same


def of_torchvision(dataset: Any) -> list[tuple[str, int]]:
    return sorted((str(p), y) for p, y in zip(dataset._image_files, dataset._labels, strict=True))


def test_torchvision_reads_the_same_flowers(trees: Trees, monkeypatch: pytest.MonkeyPatch) -> None:
    root = trees("flowers").root
    monkeypatch.setattr(datasets.Flowers102, "_check_integrity", lambda self: True)
    listing = read(Flowers102(root))
    parts = {part: datasets.Flowers102(root, part) for part in ("train", "val", "test")}
    assert pairs(read(Flowers102(root, train="train")).train) == of_torchvision(parts["train"])
    both = of_torchvision(parts["train"]) + of_torchvision(parts["val"])
    assert pairs(listing.train) == sorted(both)
    assert pairs(listing.test) == of_torchvision(parts["test"])


def test_torchvision_reads_the_same_aircraft(trees: Trees) -> None:
    root = trees("aircraft").root
    listing = read(FGVCAircraft(root))
    for path in (root / "fgvc-aircraft-2013b" / "data").glob("*.txt"):
        path.write_text(path.read_text().strip())  # torchvision stumbles over a blank line
    theirs = {part: datasets.FGVCAircraft(root, part, "family") for part in ("trainval", "test")}
    assert pairs(listing.train) == of_torchvision(theirs["trainval"])
    assert pairs(listing.test) == of_torchvision(theirs["test"])
    assert listing.class_names == theirs["test"].classes


def test_torchvision_reads_the_same_cars(trees: Trees) -> None:
    root = trees("cars").root
    listing = read(StanfordCars(root))
    for part in ("train", "test"):
        theirs = datasets.StanfordCars(root, part)
        assert pairs(getattr(listing, part)) == sorted((str(p), y) for p, y in theirs._samples)
    assert listing.class_names == [*theirs.classes]


def test_torchvision_reads_the_same_svhn(trees: Trees, monkeypatch: pytest.MonkeyPatch) -> None:
    root = trees("svhn").root
    monkeypatch.setattr(datasets.SVHN, "_check_integrity", lambda self: True)
    image_set = SVHN(root)
    for part in ("train", "test"):
        theirs = datasets.SVHN(root / "svhn", part)
        entries = getattr(read(image_set), part)
        assert 0 in theirs.labels
        assert [entry.label for entry in entries] == theirs.labels.tolist()
        for entry, (image, _) in zip(entries, theirs, strict=True):
            assert np.array_equal(pixels(image_set, entry), np.asarray(image))


# ---------------------------------------------------------------------- options


def test_the_older_layout_of_cars_gives_the_same(trees: Trees) -> None:
    tree = trees()
    other = type(tree)(tree.root / "older")
    other.cars(one_folder=True)
    listing = read(StanfordCars(other.root))
    assert pairs(listing.train) == sorted(other.parts["cars"]["train"])
    assert pairs(listing.test) == sorted(other.parts["cars"]["test"])


@pytest.mark.parametrize(("kind", "size"), [(CUB200, (20, 10)), (StanfordCars, (20, 10))])
def test_boxes_are_cut_out(kind: Any, size: tuple[int, int], trees: Trees) -> None:
    """Cars' boxes count from 1 and include the last pixel; birds' have a width and a height."""
    image_set = kind(trees(kind.name).root, crop=True)
    entry = read(image_set).train[0]
    assert entry.box == (5, 6, 25, 16)
    assert pixels(image_set, entry).shape == (*reversed(size), 3)
    whole = pixels(replace(image_set, crop=False), entry._replace(box=None))
    assert np.array_equal(pixels(image_set, entry), whole[6:16, 5:25])


def test_all_scenes_are_those_of_the_folders(trees: Trees) -> None:
    tree = trees("scenes")
    listed, every = (read(Indoor67(tree.root, images=which)) for which in ("listed", "all"))
    assert every.test == listed.test
    more = {entry.path.name for entry in every.train} - {entry.path.name for entry in listed.train}
    assert (more, len(every.train)) == ({"not_in_a_list.jpg"}, len(listed.train) + 1)


def test_people_are_the_objects_that_the_lists_number_from_one(trees: Trees) -> None:
    """Object 1 of every annotation is a horse. Two people in an image are two samples."""
    tree = trees("actions")
    listing = read(VOCActions(tree.root, take="person"))
    by_image: dict[str, list[Entry]] = {}
    for entry in listing.train:
        by_image.setdefault(entry.path.stem, []).append(entry)
    assert "2011_000002" not in by_image  # one person, two actions
    assert sorted((e.label, e.box) for e in by_image["2011_000001"]) == [
        (1, (10, 6, 20, 16)),
        (2, (10, 6, 21, 16)),
    ]
    easy = read(VOCActions(tree.root, take="person", difficult=False)).train
    assert len(listing.train) - len(easy) == 1


def test_context_widens_the_box_around_its_middle(trees: Trees) -> None:
    image_set = VOCActions(trees("actions").root, take="person", context=2)
    entry = read(image_set).test[0]
    assert entry.box == (5, 1, 25, 21)
    wide = entry._replace(box=(-5, -1, 99, 21))
    assert pixels(image_set, wide).shape == (21, 40, 3)  # what lies outside is left out


def test_others_are_an_eleventh_class(trees: Trees) -> None:
    tree = trees("actions")
    without, within = (read(VOCActions(tree.root, other=flag)) for flag in (False, True))
    assert within.class_names == [*without.class_names, "other"]
    extra = set(pairs(within.test)) - set(pairs(without.test))
    assert [(Path(path).stem, label) for path, label in extra] == [("2011_000003", 10)]


def test_letters_are_split_by_class_and_always_in_the_same_way(trees: Trees) -> None:
    root = trees("letters").root
    first, again = read(Chars74K(root)), read(Chars74K(root))
    assert first == again
    assert read(Chars74K(root, split_seed=1)) != first
    assert [sum(e.label == label for e in first.test) for label in range(3)] == [1, 1, 1]
    assert len({e.path for e in first.train} | {e.path for e in first.test}) == 15
    half = read(Chars74K(root, test_fraction=0.4))
    assert [sum(e.label == label for e in half.test) for label in range(3)] == [2, 2, 2]


def test_letters_without_digits(trees: Trees) -> None:
    listing = read(Chars74K(trees("letters").root, classes=52))
    assert listing.class_names == ["A", "a"]
    assert {(e.path.parent.name, e.label) for e in listing.train} == {
        ("Sample011", 0),
        ("Sample037", 1),
    }


def test_letters_of_photographs_are_in_two_folders(trees: Trees) -> None:
    tree = trees()
    for kind in ("GoodImg", "BadImag"):
        for sample in ("Sample001", "Sample002"):
            folder = tree.root / "English" / "Img" / kind / "Bmp" / sample
            tree.image(folder / "img-00001.png")
            tree.image(folder / "img-00002.png")
    good = read(Chars74K(tree.root, part="Img"))
    every = read(Chars74K(tree.root, part="Img", bad=True))
    assert (len(good.train), len(good.test)) == (2, 2)
    assert len(every.train) + len(every.test) == 8


def letters_by_list(tree: Any) -> tuple[list[str], list[int]]:
    folder = tree.root / "English"
    paths = sorted((folder / "Fnt").rglob("*.png"))
    names = [path.relative_to(folder).with_suffix("").as_posix() for path in paths]
    return names, [int(path.parent.name[-3:]) for path in paths]


@pytest.mark.parametrize("form", ["lists.mat", "list_English_Fnt.m"])
def test_letters_by_the_authors_lists(form: str, trees: Trees) -> None:
    """Two splits side by side, the shorter one filled up with zeros."""
    tree = trees("letters")
    names, labels = letters_by_list(tree)
    train, test = np.array([[1, 6], [7, 0], [11, 0]]), np.array([[2, 12], [0, 3]])
    path = tree.root / "English" / "Fnt" / form
    if form.endswith(".mat"):
        cells = np.array(names)
        fields = {"ALLnames": cells, "ALLlabels": np.array(labels)[:, None]}
        fields |= {"TRNind": train, "TSTind": test}
        savemat(path, {"list": fields})
    else:
        text = "list.ALLnames = [" + ";\n".join(f"'{name}'" for name in names) + "];\n"
        text += "list.ALLlabels = [" + ";\n".join(map(str, labels)) + "];\n"
        for key, array in (("TRNind", train), ("TSTind", test)):
            text += f"list.{key} = [" + ";\n".join(" ".join(map(str, r)) for r in array) + "];\n"
        path.write_text(text)
    first = read(Chars74K(tree.root, split="lists"))
    second = read(Chars74K(tree.root, split="lists", column=2))
    stem = [f"img001-0000{i}" for i in range(1, 6)]
    assert [e.path.stem for e in first.train] == [stem[0], "img011-00002", "img037-00001"]
    assert ([e.label for e in first.train], [e.label for e in first.test]) == ([0, 1, 2], [0])
    assert [e.path.stem for e in second.train] == ["img011-00001"]
    assert [e.path.stem for e in second.test] == ["img037-00002", stem[2]]
    with pytest.raises(ConfigurationError, match="at most the 2 splits"):
        read(Chars74K(tree.root, split="lists", column=3))


def test_aircraft_by_variant(trees: Trees) -> None:
    tree = trees("aircraft")
    (tree.root / "fgvc-aircraft-2013b" / "data" / "families.txt").unlink()
    assert pairs(read(FGVCAircraft(tree.root, level="variant")).test)
    with pytest.raises(DataError, match=r"families\.txt"):
        read(FGVCAircraft(tree.root))


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("aircraft", {"level": "familly"}, "Did you mean 'family'?"),
        ("aircraft", {"levle": "family"}, "Did you mean 'level'?"),
        ("aircrafts", {}, "Did you mean 'aircraft'?"),
        ("actions", {"context": 0.5}, "Expected context of actions to be a factor from 1 to 10"),
        ("actions", {"other": "yes"}, "Expected other of actions to be of type bool"),
        ("letters", {"classes": 60}, "Expected classes of letters to be one of 62, 52"),
        (
            "letters",
            {"test_fraction": 1},
            "Expected test_fraction of letters to be between 0 and 1",
        ),
        ("letters", {"column": 0}, "Expected column of letters to be a whole number of at least 1"),
        ("svhn", {"extra": True}, "It takes none."),
    ],
)
def test_a_wrong_option_is_named(name: str, options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigurationError) as error:
        make_image_set(name, Path("data"), options)
    assert said in str(error.value)


# ---------------------------------------------------------------------- broken sets


@pytest.mark.parametrize("name", list(IMAGE_SETS))
def test_an_absent_set_says_where_it_belongs_and_where_to_get_it(name: str, tmp_path: Path) -> None:
    image_set = IMAGE_SETS[name](tmp_path)
    assert not image_set.is_present
    with pytest.raises(DataError) as error:
        image_set.checked()
    assert str(tmp_path / image_set.folders[0]) in str(error.value)
    assert image_set.download_hint in str(error.value)


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("flowers", "flowers-102/imagelabels.mat"),
        ("flowers", "flowers-102/setid.mat"),
        ("scenes", "indoor67/TestImages.txt"),
        ("scenes", "indoor67/TrainImages.txt"),
        ("birds", "CUB_200_2011/images.txt"),
        ("birds", "CUB_200_2011/train_test_split.txt"),
        ("birds", "CUB_200_2011/classes.txt"),
        ("cars", "stanford_cars/devkit/cars_meta.mat"),
        ("cars", "stanford_cars/cars_test_annos_withlabels.mat"),
        ("aircraft", "fgvc-aircraft-2013b/data/images_family_trainval.txt"),
        ("actions", "VOCdevkit/VOC2012/ImageSets/Action/walking_val.txt"),
        ("actions", "VOCdevkit/VOC2012/ImageSets/Action/train.txt"),
        ("actions", "VOCdevkit/VOC2012/Annotations/2010_000001.xml"),
        ("svhn", "svhn/test_32x32.mat"),
    ],
)
def test_a_missing_or_damaged_list_is_named(name: str, file: str, trees: Trees) -> None:
    path = trees(name).root / file
    path.write_bytes(b"\xff\xfe\x00 no such thing")
    with pytest.raises(DataError) as damaged:
        read(IMAGE_SETS[name](Path(str(path)[: -len(file) - 1])))
    path.unlink()
    with pytest.raises(DataError) as missing:
        read(IMAGE_SETS[name](Path(str(path)[: -len(file) - 1])))
    assert str(path) in str(damaged.value)
    assert f"{path}, a file of" in str(missing.value)


@pytest.mark.parametrize("name", LISTED)
def test_a_missing_image_is_named(name: str, trees: Trees) -> None:
    tree = trees(name)
    gone = Path(tree.parts[name]["test"][0][0])
    gone.unlink()
    with pytest.raises(DataError, match="is missing") as error:
        read(IMAGE_SETS[name](tree.root))
    assert str(gone) in str(error.value)


@pytest.mark.parametrize("file", ["images.txt", "image_class_labels.txt", "train_test_split.txt"])
def test_an_id_of_one_file_only_is_named(file: str, trees: Trees) -> None:
    path = trees("birds").root / "CUB_200_2011" / file
    path.write_text("\n".join(line for line in path.read_text().split("\n") if line[:2] != "3 "))
    with pytest.raises(DataError, match="but 3 is in") as error:
        read(CUB200(path.parent.parent))
    assert f"not in {file}" in str(error.value)


@pytest.mark.parametrize(
    ("name", "file", "line", "said"),
    [
        ("birds", "CUB_200_2011/images.txt", "1 a/b.jpg", "each id once, but got 1 twice"),
        ("birds", "CUB_200_2011/images.txt", "12", "'<image_id> <class>/<file>', but got '12'"),
        ("scenes", "indoor67/TrainImages.txt", "barn/a.jpg", "but got barn"),
        ("scenes", "indoor67/TrainImages.txt", "barn", "'<class>/<file>'"),
        (
            "aircraft",
            "fgvc-aircraft-2013b/data/images_family_test.txt",
            "0034001 Boeing 747",
            "'Boeing 747'",
        ),
        (
            "actions",
            "VOCdevkit/VOC2012/ImageSets/Action/reading_train.txt",
            "2010_000001 9 1",
            "",
        ),
        (
            "actions",
            "VOCdevkit/VOC2012/ImageSets/Action/reading_train.txt",
            "2009_000009 1 1",
            "ids of train.txt, but got 2009_000009",
        ),
    ],
)
def test_a_line_that_does_not_fit_is_shown(
    name: str, file: str, line: str, said: str, trees: Trees
) -> None:
    path = trees(name).root / file
    with path.open("a") as lines:
        lines.write(f"{line}\n")
    with pytest.raises(DataError) as error:
        read(IMAGE_SETS[name](Path(str(path)[: -len(file) - 1])))
    assert said in str(error.value)


def test_an_image_in_both_lists_of_scenes_is_refused(trees: Trees) -> None:
    tree = trees("scenes")
    lists = tree.root / "indoor67"
    (lists / "TestImages.txt").write_bytes((lists / "TrainImages.txt").read_bytes())
    with pytest.raises(DataError, match="no training image"):
        read(Indoor67(tree.root))


def test_a_number_of_svhn_that_does_not_fit_is_refused(trees: Trees) -> None:
    tree = trees("svhn")
    path = tree.root / "svhn" / "train_32x32.mat"
    mat = loadmat(path)
    savemat(path, {"X": mat["X"][..., :-1], "y": mat["y"]})
    with pytest.raises(DataError, match="an image for each label"):
        read(SVHN(tree.root))


@pytest.mark.parametrize("name", [name for name in IMAGE_SETS if name != "actions"])
def test_a_wrong_count_is_refused_unless_it_is_expected(name: str, trees: Trees) -> None:
    tree = trees(name)
    image_set = IMAGE_SETS[name](tree.root)
    with pytest.raises(DataError, match=r"to have [\d,]+ (classes|training images), but got"):
        image_set.checked()
    assert image_set.count_faults(read(image_set))


def test_published_numbers_are_those_of_the_paper() -> None:
    """Wen et al. count all images of a set, and their 10,200 aircraft are those of all three levels."""
    for name, image_set in IMAGE_SETS.items():
        counts = image_set(Path("data")).counts
        of_paper = int(image_set.paper_counts.split()[0].replace(",", ""))
        total = counts.total or sum(counts[:2]) if counts != (None, None, None) else None
        if name in ("flowers", "birds", "cars", "letters", "svhn"):
            assert total == of_paper
        assert f"{image_set(Path('data')).num_classes} classes" in image_set.paper_counts


@pytest.mark.skipif("BPN_IMAGE_SETS" not in os.environ, reason="set it to the root of real sets")
@pytest.mark.parametrize("name", list(IMAGE_SETS))
def test_real_sets_have_their_published_numbers(name: str) -> None:
    image_set = IMAGE_SETS[name](Path(os.environ["BPN_IMAGE_SETS"]))
    if not image_set.is_present:
        pytest.skip("absent")
    assert image_set.checked().train


def test_a_palette_and_deep_pixels(tmp_path: Path) -> None:
    image_set = Indoor67(tmp_path)
    Image.new("P", (4, 4)).save(tmp_path / "gif.gif")
    assert pixels(image_set, Entry(tmp_path / "gif.gif", 0)).shape == (4, 4, 3)
    Image.new("I;16", (4, 4), 257 * 200).save(tmp_path / "deep.png")
    assert (pixels(image_set, Entry(tmp_path / "deep.png", 0)) == 200).all()
    Image.new("F", (4, 4)).save(tmp_path / "float.tiff")
    with pytest.raises(ValueError, match=r"not of 8 or 16 bits \(mode F\)"):
        pixels(image_set, Entry(tmp_path / "float.tiff", 0))
