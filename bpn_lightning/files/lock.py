"""A lock that lets only one process at a time write to a folder.

The lock is an ``flock`` on a file in the folder. The operating system releases it when the process ends,
also on SIGKILL or a power failure, so no stale locks are left; on NFS the server does this, which may take
a minute or two after a machine is lost. The contents of the file (process and host) are only used in
messages.
"""

import errno
import fcntl
import os
import platform
import re
import warnings
from contextlib import suppress
from pathlib import Path
from types import TracebackType

__all__ = ["FolderLock", "holder"]

#: Error codes of file systems without locks.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)

#: Number of retries if another process, at its end, removes the file or folder in between.
_FLAGS = os.O_NOFOLLOW | os.O_NONBLOCK  # no links, and no waiting for the writer of a FIFO
_ATTEMPTS = 100

_held: set[int] = set()  # descriptors


class FolderLock:
    """A lock on a folder, which is created if necessary.

    Args:
        folder: the folder.
        name: name of the lock file in it; locks with different names are independent.

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
        """Whether this object holds the lock."""
        return self._descriptor is not None

    def acquire(self) -> str | None:
        """Acquire the lock, without waiting.

        Returns:
            None on success, else a description of the process that holds it.

        Raises:
            OSError: the folder or the file cannot be created.
        """
        self._made = [one for one in (self.folder, *self.folder.parents) if not one.exists()]
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                descriptor = os.open(self.path, _FLAGS | os.O_RDWR | os.O_CREAT, 0o666)
            except FileNotFoundError:  # another run has removed the empty folder that it created
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
                    f"The file system of {self.folder} does not support locks, so a second run may write "
                    "there at the same time.",
                    stacklevel=2,
                )
            if self._is_file(descriptor):
                break
            os.close(descriptor)  # its holder has removed the file between the two calls
        # A full disk: the lock holds, and whoever waits for it is told of another process.
        with suppress(OSError):
            os.ftruncate(descriptor, 0)
            os.write(descriptor, f"{os.getpid()} {platform.node()}\n".encode())
        self._descriptor = descriptor
        _held.add(descriptor)
        return None

    def release(self) -> None:
        """Release the lock if it is held, and remove the folders that it created if they are empty."""
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
        """Whether the file at this path is still the locked one."""
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
    """Describe the process that is writing to a folder; None if there is none."""
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
    match = re.fullmatch(rb"(\d+) ([\w.-]+)\n", os.pread(descriptor, 300, 0))
    return f"process {match[1].decode()} on {match[2].decode()}" if match else "another process"


def _forget() -> None:
    """Close the locks in a forked process, such as a data loader's, which may outlive its parent."""
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_forget)
