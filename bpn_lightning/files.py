"""Files that are either whole or not there."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

__all__ = ["flush", "write_atomically"]


def write_atomically(path: Path, content: bytes | Callable[[BinaryIO], object]) -> None:
    """Write a file so that no reader, and no crash, ever meets half of it.

    The bytes go to ``.<name>.tmp`` in the same folder, reach the disk, and take the final name in
    one step, which reaches the disk too. What a crash leaves behind is the earlier file, and at most
    one such temporary file that the next write replaces.

    Args:
        path: of the file.
        content: its bytes, or what writes them into an open file.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            if callable(content):
                content(file)
            else:
                file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except OSError:  # a full disk wants the room back
        temporary.unlink(missing_ok=True)
        raise
    os.replace(temporary, path)
    flush(path.parent)


def flush(path: Path) -> None:
    """Let what was written to a file, or renamed in a folder, reach the disk."""
    if path.is_dir() and not hasattr(os, "O_DIRECTORY"):  # Windows flushes no folders
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
