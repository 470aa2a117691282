"""Files that are either whole or not there, in folders that lie where they were asked for."""

import os
from collections.abc import Callable
from pathlib import Path
from pickle import UnpicklingError
from typing import BinaryIO

from bpn_lightning.errors import ConfigurationError, ResultsError

__all__ = [
    "check_name",
    "flush",
    "has_variable",
    "refuse_outside",
    "why_unreadable",
    "write_atomically",
]

_LONGEST = 255  # bytes of a name, as file systems have it


def check_name(argument: str, name: str) -> None:
    """Refuse what is no name for one folder, such as ``..`` or a path.

    Raises:
        ConfigurationError: names the argument.
    """
    encoded = name.encode(errors="replace")
    plain = name.isprintable() and len(encoded) <= _LONGEST
    if not plain or name in ("", ".", "..") or "/" in name or os.sep in name or has_variable(name):
        shown = name if len(name) <= 60 else f"{name[:60]}... ({len(name)} characters)"
        never = "slashes or variables" if has_variable(name) else "slashes"
        raise ConfigurationError(
            f"Expected {argument} to be a name for a folder, but got {shown!r}. Write 1 to "
            f"{_LONGEST} characters without {never}; --runs says where the folders lie."
        )


def has_variable(path: str) -> bool:
    """Whether a path may lead elsewhere once the environment's variables are put in, as loggers do."""
    return "$" in path or (os.name == "nt" and "%" in path)


def refuse_outside(root: Path, folder: Path) -> None:
    """Refuse a run's folder that lies elsewhere than below its root, or whose files do.

    The root itself may be a link. What a logger of somebody else's keeps deeper in it is not looked at.

    Raises:
        ResultsError: names the link.
    """
    real = root.resolve()
    written = [path for part in ("*", "figures/*", "checkpoints/*") for path in folder.glob(part)]
    for path in (folder, *(path for path in written if path.is_symlink())):
        if not path.resolve().is_relative_to(real):
            raise ResultsError(
                f"Expected {path} to lie in {root}, but a link leads to {path.resolve()}. Remove the "
                "link, or name the other place with --runs."
            )


def write_atomically(path: Path, content: bytes | Callable[[BinaryIO], object]) -> None:
    """Write a file so that no reader, and no crash, ever meets half of it.

    The bytes go to ``.<name>.<process>.tmp`` in the same folder, reach the disk, and take the final
    name in one step, which reaches the disk too. Of two processes that write one file, one wins. What a
    kill leaves behind is the earlier file, and at most one such temporary file.

    Args:
        path: of the file.
        content: its bytes, or what writes them into an open file.
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
    except BaseException:  # a full disk wants the room back
        temporary.unlink(missing_ok=True)
        raise
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


def why_unreadable(error: Exception) -> str:
    """One line for messages, without torch's advice to load a file whatever is in it."""
    if isinstance(error, UnpicklingError):
        return "it holds more than tensors and plain values, perhaps a program"
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(". ")
