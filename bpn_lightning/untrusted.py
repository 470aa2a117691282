"""The one place where files from outside are opened: regular, of a bounded size, inside their folder.

Opening a FIFO waits for a writer, reading ``/dev/zero`` never ends, and a link may lead anywhere. So
whatever the package reads goes through :func:`open_untrusted`, or, for libraries that want a path,
:func:`check_untrusted`; a test reads the sources and fails on any other way. Both raise ``OSError``, as
``open`` does, so that each reader has one message for a file that is missing and one that is refused.
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
"""Of a text that is parsed as a whole: 32 MiB. The largest that this package writes have a few."""

MOST_BYTES = 2**30
MOST_TIMES = 100
"""What is larger than this many bytes unpacked must not be this many times its size."""

MAX_CONFIG_BYTES = 2**21
"""Of YAML, whose parser takes half a minute for 1 MiB; the largest packaged config has a few KiB."""

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
    """Open a file for reading bytes, without waiting for anybody.

    Args:
        path: of the file; links are followed.
        max_bytes: the largest size that is opened; None where what is read is as large as its file, as
            arrays are.
        within: a folder that the file has to lie in when links are resolved; the folder may be one.

    Raises:
        OSError: it cannot be opened, is no regular file, is too large, or lies elsewhere.
    """
    if within is not None and not is_inside(within, path):
        raise OSError(errno.EACCES, f"it leads out of {within}", str(path))
    # Windows knows no FIFOs in folders, and would change the ends of lines.
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
    """The path of a file that :func:`open_untrusted` opens, for a library that wants a path.

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
    """The text of a file, its ends of lines as line feeds.

    Raises:
        OSError: as :func:`open_untrusted`; also where the file has grown beyond its bound.
        UnicodeDecodeError: it is of another encoding.
    """
    with open_untrusted(path, max_bytes=max_bytes, within=within) as file:
        content = file.read(max_bytes + 1)
    if len(content) > max_bytes:
        _refuse_size(path, max_bytes)
    return content.decode(encoding).replace("\r\n", "\n").replace("\r", "\n")


def read_json(path: str | os.PathLike[str], *, within: Path | None = None) -> Any:
    """What a file of JSON holds; see :func:`parse_json`.

    Raises:
        OSError: as :func:`read_text`.
        ValueError: it is no such JSON; of the kinds of ``RecursionError`` too.
    """
    return parse_json(read_text(path, within=within))


def parse_json(text: str) -> Any:
    """JSON whose numbers are finite and fit into 64 bits.

    Python's own reader takes ``NaN``, ``Infinity``, ``1e999`` and whole numbers of any length, with
    which sums and means end in an ``OverflowError`` somewhere else.

    >>> parse_json('{"a": [1, 2.5, null]}')
    {'a': [1, 2.5, None]}

    Raises:
        ValueError: it is no JSON, nests too deeply, or has another number.
    """
    try:
        return json.loads(
            text, parse_constant=_refuse_number, parse_float=_finite, parse_int=_integer
        )
    except RecursionError as error:
        raise ValueError("it nests too deeply") from error


def is_bomb(packed: int, unpacked: int) -> bool:
    """Whether something says of itself that it unpacks to too much.

    Args:
        packed: bytes of the file.
        unpacked: bytes of what it is said to hold.
    """
    return unpacked > MOST_BYTES and unpacked > MOST_TIMES * max(packed, 1)


def is_inside(folder: str | os.PathLike[str], path: str | os.PathLike[str]) -> bool:
    """Whether a path lies in a folder when links are resolved; the folder itself may be a link."""
    real = os.path.realpath(folder)
    try:
        return os.path.commonpath([real, os.path.realpath(path)]) == real
    except ValueError:  # a null character, or another drive
        return False


def refuse_deflated(file: BinaryIO, archive: ZipFile) -> int:
    """Refuse an archive of torch whose records are larger than the file that has them.

    Torch stores its records as they are, so that their sizes add up to less than the file's.

    Returns:
        The file's size in bytes.

    Raises:
        ValueError: a record is deflated, or several share their bytes.
    """
    packed = file.seek(0, os.SEEK_END)
    records = archive.infolist()
    unpacked = sum(record.file_size for record in records)
    if any(record.compress_type != ZIP_STORED for record in records) or unpacked > packed:
        raise ValueError(
            f"its {packed:,} bytes unpack to {unpacked:,}, and torch does not pack what it saves"
        )
    return packed


def _refuse_size(path: str | os.PathLike[str], max_bytes: int) -> NoReturn:
    raise OSError(errno.EINVAL, f"it has more than {max_bytes:,} bytes", str(path))


def _refuse_number(text: str) -> NoReturn:
    raise ValueError(f"{text:.40} is no finite number of 64 bits")


def _finite(text: str) -> float:
    value = float(text)
    return value if abs(value) < float("inf") else _refuse_number(text)


def _integer(text: str) -> int:
    if len(text) > 20:
        _refuse_number(text)
    value = int(text)
    return value if -_MAX_INTEGER <= value < _MAX_INTEGER else _refuse_number(text)
