"""A look at one's own data before a run: classes, sizes of images, and every file that cannot be used."""

import hashlib
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from bpn_lightning.datamodules.arrays import ARRAYS, KINDS, from_arrays
from bpn_lightning.datamodules.limits import Fault, open_image
from bpn_lightning.datamodules.loading import Samples
from bpn_lightning.datamodules.readers import list_class_folders, read_npz
from bpn_lightning.files.untrusted import open_untrusted

__all__ = ["PARTS", "Survey", "survey"]

PARTS = ("train", "test")
_CHUNK = 1 << 20


@dataclass(frozen=True)
class Survey:
    """What a data set of one's own has.

    Args:
        source: the folder or the archive.
        kind: ``images`` (of an archive), ``folders`` (of images), ``features`` or ``tokens``.
        classes: training and test samples of each class, in the order in which a stream has them.
        shapes: of how many samples: width and height in pixels of images, the shape of others.
        gray: whether no sample has color.
        faults: files that cannot be decoded.
        passed_over: files in the folders of classes that are no images by their suffixes.
        in_both: test files whose bytes are those of a training file.
    """

    source: Path
    kind: str
    classes: Mapping[str, tuple[int, int]]
    shapes: Counter[tuple[int, ...]]
    gray: bool = False
    faults: list[Fault] = field(default_factory=list)
    passed_over: list[Path] = field(default_factory=list)
    in_both: list[Path] = field(default_factory=list)

    @property
    def incomplete(self) -> list[str]:
        """Classes that lack training or test samples."""
        return [name for name, counts in self.classes.items() if not all(counts)]


def survey(source: Path) -> Survey:
    """Read all of a data set once, an image at a time.

    Args:
        source: an absolute path, of a folder with ``{train,test}/<class>/`` or of an ``.npz`` archive as
            :class:`~bpn_lightning.datamodules.SplitArrays` reads it.

    Raises:
        DataError: it has no such layout.
    """
    return _folders(source) if source.is_dir() else _archive(source)


@dataclass(frozen=True)
class _Seen:
    """What is remembered of one file."""

    path: Path
    size: tuple[int, int] = (0, 0)
    gray: bool = False
    digest: bytes = b""
    reason: str = ""


def _folders(folder: Path) -> Survey:
    files = list_class_folders(folder)
    with ThreadPoolExecutor(min(16, 2 * (os.cpu_count() or 1))) as pool:
        seen = {
            part: list(pool.map(lambda path: _look(path, folder), _all_of(files[part])))
            for part in PARTS
        }
    faults = [Fault(one.path, one.reason) for part in PARTS for one in seen[part] if one.reason]
    damaged = {fault.path for fault in faults}
    whole = {part: [one for one in seen[part] if one.path not in damaged] for part in PARTS}
    learned = {one.digest for one in whole["train"]}
    names = sorted(files["train"].keys() | files["test"].keys())
    listed = {path for part in PARTS for path in _all_of(files[part])}
    return Survey(
        source=folder,
        kind="folders",
        classes={
            name: _counts([files[part].get(name, []) for part in PARTS], damaged) for name in names
        },
        shapes=Counter(one.size for part in PARTS for one in whole[part]),
        gray=all(one.gray for part in PARTS for one in whole[part]),
        faults=faults,
        passed_over=[
            path for part in PARTS for path in _others(folder / part, files[part], listed)
        ],
        in_both=[one.path for one in whole["test"] if one.digest in learned],
    )


def _all_of(files: Mapping[str, list[Path]]) -> list[Path]:
    return [path for of_class in files.values() for path in of_class]


def _counts(parts: list[list[Path]], damaged: set[Path]) -> tuple[int, int]:
    train, test = (sum(path not in damaged for path in paths) for paths in parts)
    return train, test


def _others(part: Path, files: Mapping[str, list[Path]], listed: set[Path]) -> Iterator[Path]:
    for name in files:
        for path in sorted((part / name).iterdir()):
            if path not in listed and not path.name.startswith("."):
                yield path


def _look(path: Path, folder: Path) -> _Seen:
    """Decode a file, as a run does."""
    try:
        with open_image(path, within=folder) as image:
            image.load()
            size, gray = image.size, image.mode in ("1", "L", "LA", "I;16", "I", "F")
        return _Seen(path, size, gray, _digest(path, folder))
    # Pillow may raise any exception here.
    except Exception as error:  # noqa: BLE001
        return _Seen(path, reason=f"{type(error).__name__}: {error}")


def _digest(path: Path, folder: Path) -> bytes:
    digest = hashlib.sha256()
    with open_untrusted(path, max_bytes=None, within=folder) as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.digest()


def _archive(path: Path) -> Survey:
    arrays = read_npz(path, ARRAYS)
    data = from_arrays(arrays, str(path))
    kind = next(kind for kind in KINDS if f"train_{kind}" in arrays)
    shapes: Counter[tuple[int, ...]] = Counter()
    for part in (data.train, data.test):
        shape = tuple(part.images.shape[1:])
        shapes[shape[:0:-1] if kind == "images" else shape] += len(part.labels)
    channels = data.train.images.shape[1] if kind == "images" else 0
    counts = zip(*(_per_class(part, len(data.class_names)) for part in data[:2]), strict=True)
    return Survey(
        path, kind, dict(zip(data.class_names, counts, strict=True)), shapes, channels == 1
    )


def _per_class(samples: Samples, count: int) -> list[int]:
    return samples.labels.bincount(minlength=count).tolist()
