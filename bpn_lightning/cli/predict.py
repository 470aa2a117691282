"""The command ``bpn-predict``: classes of images and arrays by a bundle of ``bpn-export``, line by line."""

import argparse
import os
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bpn_lightning.checks import check_number, check_positive_int
from bpn_lightning.cli.entry_point import entry_point
from bpn_lightning.cli.trust import add_trusted_names
from bpn_lightning.errors import BPNLightningError, ConfigurationError, DataError, ResultsError
from bpn_lightning.files.untrusted import is_inside
from bpn_lightning.files.writing import csv_text, write_atomically
from bpn_lightning.terminal import printable

if TYPE_CHECKING:
    from bpn_lightning.cli.answers import Write
    from bpn_lightning.modes import Modes

__all__ = ["main"]

KINDS = ("images", "features", "tokens")
KEYS = (*KINDS, "labels", *(f"test_{kind}" for kind in (*KINDS, "labels")))

MAX_FILES = 10_000_000
"""Images of one folder."""


@dataclass(frozen=True)
class Item:
    """One input.

    Args:
        name: of the file, and its place in an archive.
        array: channels first, as the stream holds its inputs.
        label: the name of its class, where it is known.
    """

    name: str
    array: Any
    label: str | None


@entry_point("bpn-predict", interrupted="Lines that were printed are complete.")
def main(argv: Sequence[str]) -> int:
    """Run the command.

    Args:
        argv: arguments without the program's name; by default those of the process.

    Returns:
        0, 1 if bad files were skipped, 2 on a usage error, 130 after Ctrl-C.
    """
    arguments = _parser().parse_args(argv)
    check_positive_int("batch_size", arguments.batch_size)
    check_number("reject_below", arguments.reject_below, "0 rejects nothing.", at_most=1)
    # slow: they import torch
    from bpn_lightning.cli.answers import answer_file, format_of
    from bpn_lightning.modes import load

    kind = format_of(arguments.format, arguments.to)
    net = load(arguments.bundle, trust=arguments.trust, device=arguments.device)
    task = arguments.task
    if task is not None and task not in net.tasks and task.isdecimal():
        task = int(task)
    bad = _Bad(arguments.skip_bad)
    items = _items(arguments.inputs, _shape_of(net, task), bad, arguments.confusion is not None)
    with answer_file(kind, arguments.to) as write:
        counts = _predict(net, task, items, arguments, write, bad)
    if arguments.confusion is not None:
        _write_confusion(Path(arguments.confusion), counts)
    return 1 if bad.number else 0


class _Bad:
    """Files that cannot be read: an error, or a line for each where they are skipped by request."""

    def __init__(self, skip: bool) -> None:
        self.skip = skip
        self.number = 0

    def report(self, name: str, reason: str) -> None:
        reason = " ".join(reason.split())[:300].rstrip(".")
        if not self.skip:
            raise DataError(
                f"Expected {name} to be an input of the bundle, but got {reason}. Replace it, or skip bad files "
                "with --skip_bad."
            )
        self.number += 1
        print(f"bpn-predict: skipped {printable(name)}: {printable(reason)}", file=sys.stderr)


def _predict(
    net: "Modes",
    task: Any,
    items: Iterable[Item],
    arguments: argparse.Namespace,
    write: "Write",
    bad: _Bad,
) -> Counter[tuple[str, str]]:
    """Write a line for each input; returns how often each class was answered for each label."""
    import numpy as np

    counts: Counter[tuple[str, str]] = Counter()
    done = 0
    for batch in _batches(items, arguments.batch_size):
        found = _answers(net, np.stack([one.array for one in batch]), task, arguments, batch, bad)
        answered = [(one, a) for one, a in zip(batch, found, strict=True) if a is not None]
        write([(one.name, a.class_name, a.task, a.confidence, a.rejected) for one, a in answered])
        counts.update((one.label, a.class_name) for one, a in answered if one.label is not None)
        done += len(batch)
        if sys.stderr.isatty():
            print(f"\rbpn-predict: {done:,} inputs", end="", file=sys.stderr, flush=True)
    if sys.stderr.isatty():
        print(file=sys.stderr)
    return counts


def _answers(
    net: "Modes",
    array: Any,
    task: Any,
    arguments: argparse.Namespace,
    batch: list[Item],
    bad: _Bad,
) -> list[Any]:
    try:
        return net.predict(array, task=task, reject_below=arguments.reject_below)
    except BPNLightningError as error:
        if task is None and "to be given where" in str(error):
            raise
        if len(batch) == 1:  # the one that it was
            bad.report(batch[0].name, str(error))
            return [None]
        alone = zip(array, batch, strict=True)
        return [
            a for row, one in alone for a in _answers(net, row[None], task, arguments, [one], bad)
        ]


def _batches(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """Inputs of one shape, one after another."""
    batch: list[Item] = []
    for item in items:
        if batch and (len(batch) == size or item.array.shape != batch[0].array.shape):
            yield batch
            batch = []
        batch.append(item)
    if batch:
        yield batch


# --- inputs --------------------------------------------------------------------------------------


def _shape_of(net: "Modes", task: Any) -> tuple[int, ...]:
    """Of one raw input; 0 for images of any size."""
    return net.raw_shape(net.tasks[0] if task is None else task)


def _items(
    inputs: Sequence[str], shape: tuple[int, ...], bad: _Bad, labeled: bool
) -> Iterator[Item]:
    for named in inputs:
        path = Path(named)
        if os.path.isdir(path):
            for file in _images_in(path):
                label = file.parent.name if labeled else None
                yield from _image(file, path, shape, bad, label)
        elif path.suffix.lower() == ".npz":
            yield from _arrays(path, bad)
        else:
            yield from _image(path, None, shape, bad, None)


def _images_in(folder: Path) -> Iterator[Path]:
    from PIL import Image

    suffixes = frozenset(Image.registered_extensions())
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in suffixes)
    if not found or len(found) > MAX_FILES:
        raise DataError(
            f"Expected {folder} to hold 1 to {MAX_FILES:,} images, but got {len(found):,}. Name another folder."
        )
    yield from found


def _image(
    path: Path, folder: Path | None, shape: tuple[int, ...], bad: _Bad, label: str | None
) -> Iterator[Item]:
    if len(shape) != 3 or shape[0] not in (1, 3):
        raise ConfigurationError(
            f"Expected archives of arrays for a bundle whose inputs are of the shape {shape}, but got the image "
            f"{path}. Write them to an .npz archive."
        )
    try:
        array = _pixels(path, folder, shape)
    # Pillow may raise any exception here.
    except Exception as error:  # noqa: BLE001
        bad.report(str(path), f"{type(error).__name__}: {error}")
        return
    yield Item(_text(path), array, None if label is None else _text(label))


def _text(path: str | Path) -> str:
    """A file's name, of which bytes that are no text are written as escapes."""
    return str(path).encode(errors="backslashreplace").decode()


def _pixels(path: Path, folder: Path | None, shape: tuple[int, ...]) -> Any:
    from bpn_lightning.datamodules.limits import open_image, raw_pixels

    if folder is not None and not is_inside(folder, path):
        raise OSError(f"it leads out of {folder}")
    with open_image(path, within=folder) as image:
        return raw_pixels(image, shape)


def _arrays(path: Path, bad: _Bad) -> Iterator[Item]:
    from bpn_lightning.datamodules.readers import read_npz

    try:
        held = read_npz(path, KEYS)
    except DataError as error:
        bad.report(str(path), str(error))
        return
    kinds = [key for key in KEYS if key in held and not key.endswith("labels")]
    if len(kinds) != 1:
        raise DataError(
            f"Expected {path} to hold one of {', '.join(KINDS)} (or test_images and so on), but got "
            f"{', '.join(held) or 'none of them'}. Write the inputs under one of these names."
        )
    array = held[kinds[0]]
    prefix = "test_" if kinds[0].startswith("test_") else ""
    labels = held.get(f"{prefix}labels")
    fits = array.ndim in (3, 4) if kinds[0].endswith("images") else array.ndim > 1
    if not fits or array.dtype.kind not in "buif":
        bad.report(
            str(path),
            f"{kinds[0]} of {array.dtype} of the shape {array.shape}, not numbers of a batch",
        )
        return
    if labels is not None and labels.shape != (len(array),):
        raise DataError(
            f"Expected labels in {path} to have one entry for each of the {len(array)} inputs, but got "
            f"the shape {labels.shape}. Write both completely to the archive."
        )
    if kinds[0].endswith("images"):
        array = array[:, None] if array.ndim == 3 else array.transpose(0, 3, 1, 2)
    elif kinds[0].endswith("features"):
        array = array.astype("float32")
    for number, one in enumerate(array):
        label = None if labels is None else str(labels[number])
        yield Item(f"{path}[{number}]", one, label)


# --- output --------------------------------------------------------------------------------------


def _write_confusion(path: Path, counts: Counter[tuple[str, str]]) -> None:
    """Rows are labels, columns are answers, in CSV."""
    from bpn_lightning.cli.answers import without_formula

    if not counts:
        raise DataError(
            "Expected labels for --confusion, but got none: they are the names of the folders that images lie in, "
            "or the array labels. Leave it out."
        )
    labels = sorted({label for label, _ in counts})
    answers = sorted({answer for _, answer in counts})
    rows = [["label", *map(without_formula, answers)]]
    rows += [
        [without_formula(label), *(str(counts[label, answer]) for answer in answers)]
        for label in labels
    ]
    right = sum(number for (label, answer), number in counts.items() if label == answer)
    print(f"bpn-predict: {right:,} of {counts.total():,} answers are the label", file=sys.stderr)
    try:
        write_atomically(path, csv_text(rows).encode())
    except OSError as error:
        raise ResultsError(
            f"Expected to write {path}, but got: {error.strerror}. Free some space or grant write access."
        ) from error


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="bpn-predict",
        description="Answer for images and arrays from a bundle of bpn-export, one line for each input.",
    )
    parser.add_argument("bundle", metavar="BUNDLE", help="the folder that bpn-export wrote")
    parser.add_argument(
        "inputs",
        metavar="INPUT",
        nargs="+",
        help="images, folders of images, and .npz archives with one of images, features and tokens",
    )
    parser.add_argument(
        "--task", help="the name or the ID of the inputs' task; by default it is not given"
    )
    parser.add_argument(
        "--format",
        choices=("csv", "jsonl", "parquet"),
        help="by default that of the ending of --to, or csv; parquet needs "
        "pip install 'bpn_lightning[parquet]'",
    )
    parser.add_argument(
        "--to", metavar="FILE", help="a new file for the answers; by default they are printed"
    )
    parser.add_argument(
        "--reject_below",
        metavar="P",
        type=float,
        default=0.0,
        help="confidence, from 0 to 1, below which an answer is marked as rejected",
    )
    parser.add_argument(
        "--confusion",
        metavar="FILE",
        help="write a CSV table of labels and answers; labels are the names of the folders that images lie in, "
        "or the array labels",
    )
    parser.add_argument(
        "--skip_bad",
        action="store_true",
        help="skip files that cannot be read, with a line for each, and end with exit status 1",
    )
    parser.add_argument("--batch_size", metavar="N", type=int, default=64, help="inputs at a time")
    parser.add_argument("--device", default="cpu", help="where it answers, such as cuda")
    add_trusted_names(parser)
    return parser


if __name__ == "__main__":
    sys.exit(main())
