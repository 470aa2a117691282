"""Well-known data sets from made files in torchvision's layouts and from folders; no network."""

import gzip
import os
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.error import URLError

import numpy as np
import pytest
import torch
from torchvision import datasets

from bpn_lightning.datamodules import (
    SplitCIFAR10,
    SplitCIFAR100,
    SplitFashionMNIST,
    SplitMNIST,
)
from bpn_lightning.datamodules.class_incremental import ClassIncrementalDataModule
from bpn_lightning.errors import ConfigurationError, DataError

Write = Callable[..., dict[str, np.ndarray]]


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object, **keywords: object) -> None:
        raise URLError("no network in tests")

    monkeypatch.setattr("urllib.request.urlopen", refuse)


def idx(array: np.ndarray) -> bytes:
    """The file format of MNIST: a magic number, the sizes, the bytes."""
    sizes = struct.pack(f">{array.ndim}I", *array.shape)
    return bytes([0, 0, 8, array.ndim]) + sizes + array.tobytes()


def mnist_files(count: int = 40) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    files = {}
    for part in ("train", "t10k"):
        shape = (count, 28, 28)
        files[f"{part}-images-idx3-ubyte"] = generator.integers(256, size=shape, dtype=np.uint8)
        files[f"{part}-labels-idx1-ubyte"] = (np.arange(count) % 10).astype(np.uint8)
    return files


def write_mnist(folder: Path) -> dict[str, np.ndarray]:
    folder.mkdir(parents=True)
    files = mnist_files()
    for name, array in files.items():
        (folder / name).write_bytes(idx(array))
    return files


def write_cifar(root: Path, dataset: Any, key: str, names: list[str]) -> dict[str, np.ndarray]:
    """Batches as the authors pickled them; pixels in planes, red then green then blue."""
    folder = root / dataset.base_folder
    folder.mkdir(parents=True)
    generator = np.random.default_rng(0)
    written: dict[str, Any] = {}
    for file, _ in [*dataset.train_list, *dataset.test_list]:
        count = 3 * len(names)
        pixels = generator.integers(256, size=(count, 3072), dtype=np.uint8)
        batch = {"data": pixels, key: [i % len(names) for i in range(count)]}
        (folder / file).write_bytes(pickle.dumps(batch))
        written[file] = pixels
    meta = {dataset.meta["key"]: names}
    (folder / dataset.meta["filename"]).write_bytes(pickle.dumps(meta))
    return written


def one_task(stream: ClassIncrementalDataModule, split: str) -> tuple[torch.Tensor, list[str]]:
    """All images of a split in the order of the files, and the names of their classes."""
    (task,) = stream.tasks
    (batch,) = stream.loader(0, split, 100_000)  # type: ignore[arg-type]
    return batch.inputs, [task.class_names[column] for column in batch.targets.tolist()]


@pytest.mark.parametrize("kind", [SplitMNIST, SplitFashionMNIST])
def test_mnist_from_torchvisions_files(
    kind: type[SplitMNIST] | type[SplitFashionMNIST], tmp_path: Path
) -> None:
    files = write_mnist(tmp_path / kind.class_in_torchvision / "raw")
    stream = kind(str(tmp_path), num_tasks=1, classes_per_task=10)
    stream.prepare_data()
    stream.setup()
    names = [str(i) for i in range(10)] if kind is SplitMNIST else datasets.FashionMNIST.classes
    for split, part in (("train", "train"), ("test", "t10k")):
        images, classes = one_task(stream, split)
        assert np.array_equal(images[:, 0].numpy(), files[f"{part}-images-idx3-ubyte"])
        assert classes == [names[label] for label in files[f"{part}-labels-idx1-ubyte"]]
    assert stream.input_shape == (1, 28, 28)


def test_padded_mnist_is_normalized_as_in_hsu_et_al(tmp_path: Path) -> None:
    """32 x 32 pixels with mean .1000 and standard deviation .2752: their figures (.1000) up to rounding."""
    files = write_mnist(tmp_path / "MNIST" / "raw")
    stream = SplitMNIST(str(tmp_path), num_tasks=1, classes_per_task=10, padding=2)
    stream.setup()
    (mean,), (std,) = stream.normalization
    assert (round(mean, 4), round(std, 4)) == (0.1001, 0.2752)
    images, _ = one_task(stream, "train")
    assert np.array_equal(images[:, 0, 2:-2, 2:-2].numpy(), files["train-images-idx3-ubyte"])
    border = images.clone()
    border[:, :, 2:-2, 2:-2] = 0
    assert stream.input_shape == (1, 32, 32)
    assert not border.any()


def test_padding_below_nothing_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="Expected padding to be a number of pixels"):
        SplitMNIST(padding=-1)


@pytest.mark.parametrize(
    ("kind", "dataset", "key", "names"),
    [
        (SplitCIFAR10, datasets.CIFAR10, "labels", [f"c{i}" for i in range(10)]),
        (SplitCIFAR100, datasets.CIFAR100, "fine_labels", [f"f{i:02}" for i in range(100)]),
    ],
)
def test_cifar_from_torchvisions_files(
    kind: type[SplitCIFAR10],
    dataset: Any,
    key: str,
    names: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # made files do not have the MD5 sums that torchvision knows
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda path, md5: True)
    files = write_cifar(tmp_path, dataset, key, names)
    stream = kind(str(tmp_path), num_tasks=1, classes_per_task=len(names))
    stream.prepare_data()
    stream.setup()
    images, classes = one_task(stream, "train")
    pixels = np.concatenate([files[file] for file, _ in dataset.train_list])
    assert np.array_equal(images.numpy(), pixels.reshape(-1, 3, 32, 32))
    assert classes == names * (len(pixels) // len(names))
    assert torch.equal(
        one_task(stream, "test")[0].flatten(1), torch.tensor(files[dataset.test_list[0][0]])
    )


@pytest.mark.parametrize(
    ("kind", "size"),
    [(SplitMNIST, (28, 28)), (SplitFashionMNIST, (28, 28)), (SplitCIFAR10, (32, 32, 3))],
)
def test_folders_of_images_come_first(
    kind: type[SplitMNIST], size: tuple[int, ...], tmp_path: Path, write_tree: Write
) -> None:
    write_mnist(tmp_path / "MNIST" / "raw")
    written = write_tree(tmp_path / kind.tree, ("dog", "ant", "cat"), size)
    stream = kind(str(tmp_path), num_tasks=1, classes_per_task=2, class_order=["dog", "cat"])
    stream.prepare_data()  # would fail without a network
    stream.setup()
    images, classes = one_task(stream, "test")
    assert classes == ["cat"] * 3 + ["dog"] * 3, "alphabetical within the part"
    got = images.permute(0, 2, 3, 1).numpy().reshape(6, *size)
    expected = [written[f"test/{name}/{i}"] for name in ("cat", "dog") for i in range(3)]
    assert np.array_equal(got, np.stack(expected))


def test_twenty_classes_of_a_hundred_are_enough(tmp_path: Path, write_tree: Write) -> None:
    names = tuple(f"c{i:02}" for i in range(20))
    write_tree(tmp_path / "cifar100", names, count=1)
    stream = SplitCIFAR100(str(tmp_path))
    stream.setup()
    assert [task.class_names for task in stream.tasks] == list(
        zip(names[::2], names[1::2], strict=True)
    )


def test_the_root_is_the_argument_then_the_variable_then_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert SplitMNIST().root_folder == tmp_path / "data"
    monkeypatch.setenv("BPN_DATA", "elsewhere")
    assert SplitMNIST().root_folder == tmp_path / "elsewhere"
    assert SplitMNIST("here").root_folder == tmp_path / "here"


# ---------------------------------------------------------------------- downloads


def test_download_fetches_what_torchvision_would(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = mnist_files()

    def fetch(url: str, download_root: str, filename: str, md5: str) -> None:
        raw = idx(files[filename.removesuffix(".gz")])
        (Path(download_root) / filename.removesuffix(".gz")).write_bytes(raw)

    monkeypatch.setattr("torchvision.datasets.mnist.download_and_extract_archive", fetch)
    stream = SplitMNIST(str(tmp_path), num_tasks=1, classes_per_task=10)
    stream.prepare_data()
    stream.setup()
    assert np.array_equal(
        one_task(stream, "train")[0][:, 0].numpy(), files["train-images-idx3-ubyte"]
    )


@pytest.mark.parametrize("kind", [SplitMNIST, SplitFashionMNIST, SplitCIFAR10, SplitCIFAR100])
@pytest.mark.parametrize("download", [True, False])
def test_no_data_and_no_network_is_one_clear_error(
    kind: type[SplitMNIST], download: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    stream = kind("nothing", download=download)
    with pytest.raises(DataError) as caught:
        stream.prepare_data() if download else stream.setup()
    message = str(caught.value)
    assert "\n" not in message
    root = tmp_path / "nothing"
    for part in [
        f"the images of {kind.title} in {root}, but",
        f"{root / kind.tree}{os.sep}{{train,test}}{os.sep}<class>",
        f"torchvision's files in {root}{os.sep}",
        "(missing: ",
        "no network in tests" if download else "download is off",
        "--data.init_args.root DIR",
        "export BPN_DATA=DIR",
        "download them from http",
    ]:
        assert part in message
    assert "damaged" not in message


@pytest.mark.parametrize(
    ("place", "root", "said"),
    [
        (
            "MNIST/raw",
            ".",
            r"are in {root}/MNIST/raw: unpack them with `gunzip -k {root}/MNIST/raw",
        ),
        (".", ".", r"are in {root}: move them to {root}/MNIST/raw and unpack them"),
        ("MNIST", ".", r"are in {root}/MNIST: move them to {root}/MNIST/raw and unpack them"),
        ("mnist", ".", r"are in {root}/mnist: move them to"),
        ("MNIST/raw", "MNIST", r"are in {root}/MNIST/raw: move them to {root}/MNIST/MNIST/raw and"),
    ],
)
def test_packed_files_are_not_fetched_again(
    tmp_path: Path, place: str, root: str, said: str
) -> None:
    folder = tmp_path / place
    folder.mkdir(parents=True, exist_ok=True)
    for name, array in mnist_files().items():
        (folder / f"{name}.gz").write_bytes(gzip.compress(idx(array)))
    with pytest.raises(DataError, match=said.format(root=tmp_path)) as error:
        SplitMNIST(str(tmp_path / root), download=False).setup()
    assert "download them from" not in str(error.value)


def test_unpacked_files_in_another_place_are_found(tmp_path: Path) -> None:
    write_mnist(tmp_path / "MNIST" / "raw")
    with pytest.raises(DataError, match=rf"set the root with `--data.init_args.root {tmp_path}`"):
        SplitMNIST(str(tmp_path / "MNIST"), download=False).setup()
    with pytest.raises(
        DataError, match="download them from"
    ):  # other images, whose files' names are equal
        SplitFashionMNIST(str(tmp_path), download=False).setup()


def test_a_packed_cifar_is_not_fetched_again(tmp_path: Path) -> None:
    (tmp_path / datasets.CIFAR10.filename).write_bytes(b"")
    with pytest.raises(DataError, match=rf"unpack them with `tar -xzf {tmp_path}/cifar-10-python"):
        SplitCIFAR10(str(tmp_path), download=False).setup()


def test_download_off_leaves_the_network_alone(tmp_path: Path) -> None:
    SplitMNIST(str(tmp_path), download=False).prepare_data()
    assert list(tmp_path.iterdir()) == []


def test_setup_alone_says_that_it_does_not_download(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"only prepare_data\(\) does that"):
        SplitMNIST(str(tmp_path)).setup()


def test_a_root_that_cannot_be_written_is_named_with_its_reason(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(DataError, match=r"NotADirectoryError|FileExistsError"):
        SplitMNIST(str(tmp_path / "file")).prepare_data()


# ---------------------------------------------------------------------- damage


@pytest.mark.parametrize(
    "name", ["train-images-idx3-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"]
)
@pytest.mark.parametrize("left", [0, 3, 100])
def test_a_truncated_mnist_file_is_named(tmp_path: Path, name: str, left: int) -> None:
    folder = tmp_path / "MNIST" / "raw"
    write_mnist(folder)
    file = folder / name
    file.write_bytes(file.read_bytes()[: min(left, file.stat().st_size - 1)])
    with pytest.raises(DataError, match=rf"\(damaged: {name}\).*Delete damaged files"):
        SplitMNIST(str(tmp_path)).setup()


def test_a_damaged_cifar_file_is_named(tmp_path: Path) -> None:
    write_cifar(tmp_path, datasets.CIFAR100, "fine_labels", ["a"])
    (tmp_path / datasets.CIFAR100.base_folder / "meta").unlink()
    with pytest.raises(DataError, match=r"\(missing: meta; damaged: train, test\)"):
        SplitCIFAR100(str(tmp_path)).setup()


def test_a_folder_that_cannot_be_read_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path) -> bool:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "is_dir", refuse)
    with pytest.raises(DataError, match=r"mnist to be readable, but got PermissionError"):
        SplitMNIST(str(tmp_path)).prepare_data()


def test_an_image_of_another_size_is_named(tmp_path: Path, write_tree: Write) -> None:
    write_tree(tmp_path / "cifar10", ("ant", "bee"), (16, 32, 3))
    with pytest.raises(DataError, match=r"\d\.png .* got ValueError: 32 x 16 pixels where 32 x 32"):
        SplitCIFAR10(str(tmp_path)).setup()
