"""What readers refuse before they read, and how much is decoded at the same time."""

import struct
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from zipfile import ZIP_DEFLATED, ZipFile

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from bpn_lightning.datamodules import SplitArrays, limits
from bpn_lightning.datamodules.image_sets import Indoor67
from bpn_lightning.datamodules.limits import Quota, matlab_sizes, open_image
from bpn_lightning.errors import DataError


@pytest.mark.parametrize("limit", [100, 250, 1000])
def test_what_is_held_together_stays_within_the_limit(limit: int) -> None:
    """An independent count of what is held; what is larger than the limit is held alone."""
    quota, lock = Quota(limit), threading.Lock()
    held: list[int] = []
    seen: list[list[int]] = []

    def work(size: int) -> None:
        with quota.take(size):
            with lock:
                held.append(size)
                seen.append(list(held))
            time.sleep(0.001)
            with lock:
                held.remove(size)

    sizes = [30, 90, 120, 400] * 8
    with ThreadPoolExecutor(16) as pool:
        assert len(list(pool.map(work, sizes))) == len(sizes)
    assert all(sum(now) <= limit or len(now) == 1 for now in seen)
    assert max(map(len, seen)) > 1 or limit < 120  # and they are not simply one after the other
    assert quota.used == 0


def test_a_quota_is_given_back_after_an_error() -> None:
    quota = Quota(10)
    with pytest.raises(ValueError, match="x"), quota.take(10):
        raise ValueError("x")
    assert quota.used == 0


def test_large_images_wait_for_each_other_before_they_are_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.init()  # some of its plugins load a picture of their own
    monkeypatch.setattr(limits, "_decoded", quota := Quota(8 * 300 * 300))
    Image.new("RGB", (200, 200)).save(tmp_path / "x.png")
    decoding: list[int] = []
    load = Image.Image.load

    def watched(image: Image.Image) -> object:
        decoding.append(quota.used)
        return load(image)

    monkeypatch.setattr(Image.Image, "load", watched)

    def decode(_: int) -> int:
        with open_image(tmp_path / "x.png") as image:
            return image.convert("L").width

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(decode, range(16))) == [200] * 16
    assert set(decoding) <= {8 * 200 * 200, 2 * 8 * 200 * 200}  # there is no room for three


# --- Matlab --------------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("form", ["5", "4"])
def test_sizes_of_matlab_files(form: str, packed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Inflating is zlib's; of what is not deflated, the size is that of the file."""
    monkeypatch.setattr(limits, "is_bomb", lambda packed, unpacked: unpacked > 500 * packed)
    file = BytesIO()
    values = {"x": np.zeros((50, 60)), "y": np.arange(7.0)}
    savemat(file, values, do_compression=packed, format=form)
    size, inflated = matlab_sizes(file)
    assert size == len(file.getvalue())
    content, expected = file.getvalue(), 0
    if form == "4" or not packed:
        assert size - 200 < inflated <= size
        return
    place = 128
    while place < size:
        kind, length = struct.unpack("<II", content[place : place + 8])
        assert kind == 15
        expected += len(zlib.decompress(content[place + 8 : place + 8 + length]))
        place += 8 + length
    assert inflated == expected


def test_a_bomb_inside_of_a_structure_is_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Matlab's table of contents says of a structure that it is one thing."""
    monkeypatch.setattr("bpn_lightning.files.untrusted.MOST_BYTES", 2**20)
    path = tmp_path / "x.mat"
    savemat(path, {"a": {"b": {"c": np.zeros(2**22, np.uint8)}}}, do_compression=True)
    with pytest.raises(DataError, match="to unpack to at most 100 times its"):
        Indoor67(tmp_path).read_mat(path, dict)
    savemat(path, {"a": {"b": {"c": np.zeros(2**19, np.uint8)}}}, do_compression=True)
    assert Indoor67(tmp_path).read_mat(path, dict)["a"]["b"].item()["c"].item().shape == (2**19,)


def test_a_matlab_file_that_is_cut_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bpn_lightning.files.untrusted.MOST_BYTES", 2**10)
    path = tmp_path / "x.mat"
    savemat(path, {"a": np.random.default_rng(0).random(1000)}, do_compression=True)
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(DataError, match="to be an intact file of MIT Indoor-67"):
        Indoor67(tmp_path).read_mat(path, dict)


# --- archives ------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_members_that_share_their_bytes_count_once_as_packed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A directory that names one member a thousand times would make a bomb look harmless."""
    monkeypatch.setattr("bpn_lightning.files.untrusted.MOST_BYTES", 2**20)
    path = tmp_path / "x.npz"
    images, labels = np.zeros((2**15, 8, 8), np.uint8), np.zeros(2**15, np.int8)
    made = {"train_images": images, "test_images": images, "train_labels": labels}
    np.savez_compressed(path, **made, test_labels=labels)
    noise = np.random.default_rng(0).integers(0, 256, 2**12, np.uint8).tobytes()
    with ZipFile(path, "a", ZIP_DEFLATED) as archive:
        archive.writestr("train_images.npy", noise)
        record = archive.infolist().pop()
        archive.filelist[:0] = [record] * 100  # the last of a name is the one that is read
        archive._didModify = True
    with pytest.raises(DataError, match="to unpack to at most 100 times its"):
        SplitArrays(path=str(path)).setup()
