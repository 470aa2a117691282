"""Opening untrusted files: only regular ones, of bounded size, inside their folder.

Opening a FIFO waits for a writer, reading ``/dev/zero`` never ends, and a link may lead anywhere. So
everything that the package reads goes through :func:`open_untrusted`, or, for libraries that need a path,
:func:`check_untrusted`; a test checks the sources for other ways. Both raise ``OSError``, like ``open``, so
that callers handle missing and refused files alike.
"""

import errno
import json
import os
import stat
from pathlib import Path
from typing import Any, BinaryIO, NoReturn
from zipfile import ZIP_STORED, ZipFile

__all__ = [
    "MAX_CONFIG_BYTES",
    "MAX_TEXT_BYTES",
    "check_untrusted",
    "is_bomb",
    "is_inside",
    "open_untrusted",
    "parse_json",
    "read_json",
    "read_text",
    "refuse_deflated",
]

MAX_TEXT_BYTES = 2**25
"""Size limit of text files that are parsed in memory: 32 MiB; this package writes at most a few MiB."""

MOST_BYTES = 2**30
MOST_TIMES = 100
"""Limits of an archive: at most this many times its size, if larger than this many bytes unpacked."""

MAX_CONFIG_BYTES = 2**21
"""Size limit of YAML, whose parser takes half a minute for 1 MiB; packaged configs have a few KiB."""

_MAX_INTEGER = 2**63
_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def open_untrusted(
    path: str | os.PathLike[str], *, max_bytes: int | None, within: Path | None = None
) -> BinaryIO:
    """Open a file for reading bytes, without blocking.

    Args:
        path: the file; links are followed.
        max_bytes: size limit; None if the contents take no more memory than the file, such as arrays.
        within: a folder that has to contain the file after resolving links; it may itself be a link.

    Raises:
        OSError: the file cannot be opened, is not regular, is too large, or is outside the folder.
    """
    if within is not None and not is_inside(within, path):
        raise OSError(errno.EACCES, f"it leads out of {within}", str(path))
    # Windows has no FIFOs in folders, and would convert line ends.
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOCTTY", 0)
    try:
        descriptor = os.open(path, flags | getattr(os, "O_BINARY", 0))
    except OSError as error:
        if error.errno == errno.ENXIO:  # a socket
            raise OSError(errno.EINVAL, "it is a socket, not a regular file", str(path)) from error
        raise
    except ValueError as error:  # a null character
        raise OSError(errno.EINVAL, str(error), str(path)) from error
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            kind = _KINDS.get(stat.S_IFMT(status.st_mode), "something else")
            raise OSError(errno.EINVAL, f"it is {kind}, not a regular file", str(path))
        if max_bytes is not None and status.st_size > max_bytes:
            _refuse_size(path, max_bytes)
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def check_untrusted(
    path: str | os.PathLike[str], *, max_bytes: int | None = None, within: Path | None = None
) -> Path:
    """Check a file like :func:`open_untrusted` and return its path, for a library that needs a path.

    Raises:
        OSError: as there.
    """
    open_untrusted(path, max_bytes=max_bytes, within=within).close()
    return Path(path)


def read_text(
    path: str | os.PathLike[str],
    *,
    encoding: str = "utf-8",
    max_bytes: int = MAX_TEXT_BYTES,
    within: Path | None = None,
) -> str:
    """The text of a file, with line ends converted to line feeds.

    Raises:
        OSError: as :func:`open_untrusted`, also if the file has grown beyond its limit.
        UnicodeDecodeError: the file has another encoding.
    """
    with open_untrusted(path, max_bytes=max_bytes, within=within) as file:
        content = file.read(max_bytes + 1)
    if len(content) > max_bytes:
        _refuse_size(path, max_bytes)
    return content.decode(encoding).replace("\r\n", "\n").replace("\r", "\n")


def read_json(path: str | os.PathLike[str], *, within: Path | None = None) -> Any:
    """Read a JSON file; see :func:`parse_json`.

    Raises:
        OSError: as :func:`read_text`.
        ValueError: the file is not valid JSON.
    """
    return parse_json(read_text(path, within=within))


def parse_json(text: str) -> Any:
    """Parse JSON, accepting only finite numbers that fit into 64 bits.

    Python's own parser accepts ``NaN``, ``Infinity``, ``1e999`` and integers of any length, which later
    cause an ``OverflowError`` in sums and means.

    >>> parse_json('{"a": [1, 2.5, null]}')
    {'a': [1, 2.5, None]}

    Raises:
        ValueError: it is not JSON, is nested too deeply, or has another number.
    """
    try:
        return json.loads(
            text, parse_constant=_refuse_number, parse_float=_finite, parse_int=_integer
        )
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def is_bomb(packed: int, unpacked: int) -> bool:
    """Whether the declared unpacked size is too large.

    Args:
        packed: size of the file in bytes.
        unpacked: declared unpacked size in bytes.
    """
    return unpacked > MOST_BYTES and unpacked > MOST_TIMES * max(packed, 1)


def is_inside(folder: str | os.PathLike[str], path: str | os.PathLike[str]) -> bool:
    """Whether a path is inside a folder after resolving links; the folder itself may be a link."""
    real = os.path.realpath(folder)
    try:
        return os.path.commonpath([real, os.path.realpath(path)]) == real
    except ValueError:  # a null character, or another drive
        return False


def refuse_deflated(file: BinaryIO, archive: ZipFile) -> int:
    """Refuse an archive of torch whose records are larger than the file.

    Torch stores its records uncompressed, so their total size is less than the file's.

    Returns:
        The file's size in bytes.

    Raises:
        ValueError: a record is compressed, or several share bytes.
    """
    packed = file.seek(0, os.SEEK_END)
    records = archive.infolist()
    unpacked = sum(record.file_size for record in records)
    if any(record.compress_type != ZIP_STORED for record in records) or unpacked > packed:
        raise ValueError(
            f"its {packed:,} bytes unpack to {unpacked:,}, but torch does not compress"
        )
    return packed


def _refuse_size(path: str | os.PathLike[str], max_bytes: int) -> NoReturn:
    raise OSError(errno.EINVAL, f"it has more than {max_bytes:,} bytes", str(path))


def _refuse_number(text: str) -> NoReturn:
    raise ValueError(f"{text:.40} is not a finite 64-bit number")


def _finite(text: str) -> float:
    value = float(text)
    return value if abs(value) < float("inf") else _refuse_number(text)


def _integer(text: str) -> int:
    if len(text) > 20:
        _refuse_number(text)
    value = int(text)
    return value if -_MAX_INTEGER <= value < _MAX_INTEGER else _refuse_number(text)
