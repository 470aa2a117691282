"""The cache of decoded images: what is in it, when it is built again, and what may go wrong."""

import errno
import multiprocessing
import os
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2
from waiting import PATIENCE

from bpn_lightning.datamodules import image_cache
from bpn_lightning.datamodules.image_cache import CachedImages, cached_images
from bpn_lightning.datamodules.image_sets import Entry
from bpn_lightning.errors import ConfigurationError, DataError


@contextmanager
def decode(entry: Entry) -> Iterator[Image.Image]:
    with Image.open(entry.path) as image:
        yield image.convert("RGB")


@pytest.fixture
def entries(tmp_path: Path) -> list[Entry]:
    generator = np.random.default_rng(0)
    made = []
    for i, size in enumerate([(30, 40), (41, 23), (16, 16), (9, 50)]):
        path = tmp_path / f"{i}.png"
        Image.fromarray(generator.integers(256, size=(*size, 3), dtype=np.uint8)).save(path)
        made.append(Entry(path, i))
    return made


def cached(entries: list[Entry], **changed: Any) -> CachedImages:
    options: dict[str, Any] = {"name": "toy", "size": 16} | changed
    return cached_images(entries, decode, entries[0].path.parent / "cache", **options)


def caches(entries: list[Entry]) -> list[str]:
    return sorted(path.name for path in (entries[0].path.parent / "cache").glob("[!.]*"))


def test_images_are_those_of_torchvisions_resize_and_crop(entries: list[Entry]) -> None:
    transform = v2.Compose([v2.Resize(16), v2.CenterCrop(16), v2.PILToTensor()])
    images = cached(entries).images
    assert (images.dtype, images.shape) == (torch.uint8, (4, 3, 16, 16))
    for image, entry in zip(images, entries, strict=True):
        with decode(entry) as whole:
            assert torch.equal(image, transform(whole))


def test_squeezed_images_are_those_of_torchvisions_resize(entries: list[Entry]) -> None:
    transform = v2.Compose([v2.Resize((16, 16)), v2.PILToTensor()])
    for image, entry in zip(cached(entries, fit="squeeze").images, entries, strict=True):
        with decode(entry) as whole:
            assert torch.equal(image, transform(whole))


def test_a_cache_is_built_once_and_mapped(
    entries: list[Entry], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = cached(entries)
    monkeypatch.setattr(image_cache, "_build", None)  # calling it would fail
    again = cached(entries)
    assert torch.equal(first.images, again.images)
    assert len(caches(entries)) == 1
    mapped = Path("/proc/self/maps")
    if mapped.exists():
        assert caches(entries)[0] in mapped.read_text()


@pytest.mark.parametrize("what", ["size", "fit", "content", "time", "box", "order", "fewer"])
def test_what_changes_the_images_makes_another_cache(what: str, entries: list[Entry]) -> None:
    cached(entries)
    options: dict[str, Any] = {}
    changed = list(entries)
    if what == "size":
        options["size"] = 8
    elif what == "fit":
        options["fit"] = "squeeze"
    elif what == "content":
        Image.new("RGB", (30, 30)).save(entries[2].path)
    elif what == "time":
        os.utime(entries[2].path, (1, 1))
    elif what == "box":
        changed[0] = entries[0]._replace(box=(0, 0, 9, 9))
    elif what == "order":
        changed.reverse()
    else:
        changed.pop()
    images = cached(changed, **options).images
    assert len(caches(entries)) == 2
    if what == "order":
        assert torch.equal(images, cached(entries).images.flip(0))


def test_labels_play_no_part(entries: list[Entry]) -> None:
    cached(entries)
    cached([entry._replace(label=7) for entry in entries])
    assert len(caches(entries)) == 1


def test_a_damaged_image_is_named_and_leaves_no_cache(entries: list[Entry]) -> None:
    whole = entries[1].path.read_bytes()
    entries[1].path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError) as error:
        cached(entries)
    assert str(error.value).startswith(
        f"Expected {entries[1].path} to be an intact image, but got "
    )
    assert str(error.value).endswith(
        "Replace the file, or set on_corrupt to skip to leave damaged images out."
    )
    assert caches(entries) == []
    entries[1].path.write_bytes(whole)
    assert len(cached(entries).images) == 4


def test_damaged_images_are_left_out_and_counted(entries: list[Entry]) -> None:
    expected = cached(entries).images[[0, 3]]
    entries[1].path.write_bytes(b"")
    entries[2].path.write_text("no image")
    for _ in range(2):  # as it is built, and from the disk
        left = cached(entries, on_corrupt="skip")
        assert torch.equal(left.images, expected)
        assert left.kept.tolist() == [0, 3]
        assert [damage.path for damage in left.damaged] == [str(e.path) for e in entries[1:3]]
    with pytest.raises(DataError, match=rf"1 more: {entries[2].path} \(Unid"):
        cached(entries)


def test_nothing_but_damage_is_an_empty_store(entries: list[Entry]) -> None:
    entries[0].path.write_bytes(b"")
    assert cached(entries[:1], on_corrupt="skip").images.shape == (0, 3, 16, 16)


def test_a_full_disk_leaves_nothing_behind(
    entries: list[Entry], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(file: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(DataError, match="No space left on device") as error:
            cached(entries)
    assert "name another folder with cache_dir" in str(error.value)
    folder = entries[0].path.parent / "cache"
    assert [path.name for path in folder.iterdir() if path.is_dir()] == []
    assert len(cached(entries).images) == 4


def test_what_a_killed_process_left_is_replaced(entries: list[Entry]) -> None:
    expected = cached(entries).images.clone()
    (name,) = caches(entries)
    folder = entries[0].path.parent / "cache"
    (folder / name).rename(folder / f".{name}.tmp")
    (folder / f".{name}.tmp" / "images.uint8").write_bytes(b"half")
    assert torch.equal(cached(entries).images, expected)
    assert caches(entries) == [name]


def build(entries: list[Entry], start: Any, answers: Any) -> None:
    decoded = []

    def slowly(entry: Entry) -> AbstractContextManager[Image.Image]:
        decoded.append(entry)
        time.sleep(0.1)
        return decode(entry)

    start.wait()
    folder = entries[0].path.parent / "cache"
    images = cached_images(entries, slowly, folder, name="toy", size=16).images
    answers.put((len(decoded), int(images.sum())))


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_of_two_processes_one_builds_and_both_read(entries: list[Entry]) -> None:
    context = multiprocessing.get_context("fork")
    start, answers = context.Event(), context.Queue()
    processes = [context.Process(target=build, args=(entries, start, answers)) for _ in range(2)]
    for process in processes:
        process.start()
    start.set()
    got = sorted(answers.get(timeout=PATIENCE) for _ in processes)
    for process in processes:
        process.join()
    total = int(cached(entries).images.sum())
    assert got == [(0, total), (4, total)]
    assert len(caches(entries)) == 1


def test_an_unknown_choice_is_refused(entries: list[Entry]) -> None:
    with pytest.raises(ConfigurationError, match="on_corrupt"):
        cached(entries, on_corrupt="ignore")
