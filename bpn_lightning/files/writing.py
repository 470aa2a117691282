"""Atomic writes, CSV, and checks that folders are at their configured location."""

import csv
import os
from collections.abc import Callable, Iterable
from io import StringIO
from math import isnan
from pathlib import Path
from pickle import UnpicklingError
from typing import BinaryIO

from bpn_lightning.errors import ConfigurationError, ResultsError

__all__ = [
    "EXPORT_FILES",
    "check_name",
    "csv_text",
    "flush",
    "has_variable",
    "refuse_outside",
    "why_unreadable",
    "write_atomically",
]

EXPORT_FILES = ("model.safetensors", "config.json")
"""Files by which a folder is known as a bundle: shared tensors, and the record of what they are."""

_LONGEST = 255  # bytes of a file name, the usual limit of file systems


def check_name(argument: str, name: str) -> None:
    """Refuse an invalid name of a folder, such as ``..`` or a path.

    Raises:
        ConfigurationError: names the argument.
    """
    encoded = name.encode(errors="replace")
    plain = name.isprintable() and len(encoded) <= _LONGEST
    if not plain or name in ("", ".", "..") or "/" in name or os.sep in name or has_variable(name):
        shown = name if len(name) <= 60 else f"{name[:60]}... ({len(name)} characters)"
        never = "slashes or variables" if has_variable(name) else "slashes"
        raise ConfigurationError(
            f"Expected {argument} to be the name of a folder, but got {shown!r}. Use 1 to "
            f"{_LONGEST} characters without {never}; --runs sets the location of the folders."
        )


def has_variable(path: str) -> bool:
    """Whether a path contains environment variables, which loggers expand."""
    return "$" in path or (os.name == "nt" and "%" in path)


def refuse_outside(root: Path, folder: Path) -> None:
    """Refuse a run's folder that is not below its root, or whose files are not.

    The root itself may be a link. Files of third-party loggers in subfolders are not checked.

    Raises:
        ResultsError: names the link.
    """
    real = root.resolve()
    written = [path for part in ("*", "figures/*", "checkpoints/*") for path in folder.glob(part)]
    for path in (folder, *(path for path in written if path.is_symlink())):
        if not path.resolve().is_relative_to(real):
            raise ResultsError(
                f"Expected {path} to be in {root}, but a link leads to {path.resolve()}. Remove the "
                "link, or set the other location with --runs."
            )


def write_atomically(path: Path, content: bytes | Callable[[BinaryIO], object]) -> None:
    """Write a file atomically.

    The bytes are written to ``.<name>.<process>.tmp`` in the same folder and flushed to disk; the file
    is then renamed, and the rename is flushed too. If two processes write the same file, one wins. A
    killed process leaves the earlier file and at most one such temporary file.

    Args:
        path: the file.
        content: its bytes, or a function that writes them to an open file.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            if callable(content):
                content(file)
            else:
                file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:  # on a full disk, free the space again
        temporary.unlink(missing_ok=True)
        raise
    flush(path.parent)


def csv_text(rows: Iterable[Iterable[object]]) -> str:
    r"""Rows as CSV: numbers by their repr, so that reading gives the very same ones; None and NaN are empty.

    >>> csv_text([["task", "accuracy"], [1, 0.1], [2, None]])
    'task,accuracy\n1,0.1\n2,\n'
    """
    text = StringIO()
    csv.writer(text, lineterminator="\n").writerows(
        ["" if isinstance(cell, float) and isnan(cell) else cell for cell in row] for row in rows
    )
    return text.getvalue()


def flush(path: Path) -> None:
    """Flush a file, or the renames in a folder, to disk."""
    if path.is_dir() and not hasattr(os, "O_DIRECTORY"):  # Windows cannot flush folders
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def why_unreadable(error: Exception) -> str:
    """One line for messages, without torch's advice to load untrusted files."""
    if isinstance(error, UnpicklingError):
        return "it holds more than tensors and plain values, possibly code"
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(". ")
