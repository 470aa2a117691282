"""One process at a time writes into a folder.

The lock is an ``flock`` on a file in the folder. The system gives it back when its process ends, by
SIGKILL and a power cut too, so no lock is ever left behind; on NFS this is the server's business, which
may take a minute or two after a machine was lost. What the file says (which process, on which host) is
for messages only.
"""

import errno
import fcntl
import os
import platform
import re
import warnings
from pathlib import Path
from types import TracebackType

__all__ = ["FolderLock", "holder"]

#: What the system says of a file system that knows no locks.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)

#: How often to try again what another process, at its end, removed in between.
_FLAGS = os.O_NOFOLLOW | os.O_NONBLOCK  # no link, and no waiting for who writes to a FIFO
_ATTEMPTS = 100

_held: set[int] = set()  # descriptors


class FolderLock:
    """A lock on a folder, which is made where it is missing.

    Args:
        folder: any.
        name: of the lock's file in it; locks of different names do not know each other.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     one, other = FolderLock(Path(folder, "run")), FolderLock(Path(folder, "run"))
    ...     print(one.acquire(), other.acquire() == f"process {os.getpid()} on {platform.node()}")
    ...     one.release()
    ...     print(other.acquire())
    ...     other.release()
    None True
    None
    """

    def __init__(self, folder: Path, name: str = ".lock") -> None:
        self.folder = folder
        self.path = folder / name
        self._descriptor: int | None = None
        self._made: list[Path] = []

    @property
    def is_held(self) -> bool:
        """Whether this object has it."""
        return self._descriptor is not None

    def acquire(self) -> str | None:
        """Take the lock, without waiting.

        Returns:
            None, or which process has it, in words.

        Raises:
            OSError: the folder or the file cannot be made.
        """
        self._made = [one for one in (self.folder, *self.folder.parents) if not one.exists()]
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                descriptor = os.open(self.path, _FLAGS | os.O_RDWR | os.O_CREAT, 0o666)
            except FileNotFoundError:  # an empty folder goes with the run that made it
                if attempt == _ATTEMPTS:
                    raise
                continue
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                owner = _owner(descriptor)
                os.close(descriptor)
                return owner
            except OSError as error:
                if error.errno not in _NO_LOCKS:
                    os.close(descriptor)
                    raise
                warnings.warn(
                    f"The file system of {self.folder} knows no locks, so nothing keeps a second run "
                    "from writing there.",
                    stacklevel=2,
                )
            if self._is_file(descriptor):
                break
            os.close(descriptor)  # its holder removed the file between the two calls
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"{os.getpid()} {platform.node()}\n".encode())
        self._descriptor = descriptor
        _held.add(descriptor)
        return None

    def release(self) -> None:
        """Give the lock back, if it was taken; folders that it made go, too, if they are still empty."""
        if self._descriptor is None:
            return
        if self._is_file(self._descriptor):
            self.path.unlink(missing_ok=True)
        _held.discard(self._descriptor)
        os.close(self._descriptor)
        self._descriptor = None
        for folder in self._made:
            try:
                folder.rmdir()
            except OSError:
                break

    def _is_file(self, descriptor: int) -> bool:
        """Whether the file of this name is still the one that is locked."""
        try:
            return os.path.samestat(os.fstat(descriptor), os.lstat(self.path))
        except FileNotFoundError:
            return False

    def __enter__(self) -> str | None:
        return self.acquire()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.release()


def holder(folder: Path) -> str | None:
    """Which process writes into a folder now, in words; None where none does."""
    try:
        descriptor = os.open(folder / ".lock", _FLAGS | os.O_RDONLY)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return _owner(descriptor)
    except OSError:
        return None
    finally:
        os.close(descriptor)
    return None


def _owner(descriptor: int) -> str:
    said = re.fullmatch(rb"(\d+) ([\w.-]+)\n", os.pread(descriptor, 300, 0))
    return f"process {said[1].decode()} on {said[2].decode()}" if said else "another process"


def _forget() -> None:
    """A forked process, such as a data loader's, would hold the lock beyond the end of its parent."""
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_forget)
