"""A run's folder while a process writes to it: locked, and nothing in it lost before its time.

::

    <runs>/<experiment>/<method>/seed_<n>/
    ├── .lock        the process that writes here, while it does
    └── .replaced/   an earlier run that --overwrite replaces, until the new one has a checkpoint

An earlier run is moved aside when training begins, and removed when the new one has something to go on
from: its first checkpoint, or results. Where the new one ends before, by whatever, the earlier one is
put back, by the same process or by the next one that takes the folder. Files of other names stay.
"""

import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

from bpn_lightning.errors import ResultsError
from bpn_lightning.files import flush
from bpn_lightning.run.lock import FolderLock

__all__ = ["RunFolder", "written_files"]

_FILES = (
    "results.json",
    "accuracy_matrix.csv",
    "task_metrics.csv",
    "config.yaml",
    "metrics.csv",
)
_FOLDERS = ("figures", "checkpoints")

# What a run writes, by whatever hand: --overwrite replaces these and nothing else. results.json
# comes first, so that a folder never looks finished while its parts disappear.
_WRITTEN = (
    *_FILES,
    "figures/accuracy_over_stream.*",
    "figures/accuracy_matrix.*",
    "checkpoints/*.ckpt",
)

_UNFINISHED = (".*.tmp", "figures/.*.tmp", "checkpoints/.*.tmp")  # of writes that a crash ended

_ASIDE = ".replaced"
_MOVING = ".replacing"  # not all of it has been moved, one way or the other
_REMOVED = ".removed.tmp"


class RunFolder:
    """The folder of a run.

    Args:
        path: of the folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = FolderLock(path)

    def acquire(self) -> bool:
        """Take the folder for this process; it is made where it is missing.

        Returns:
            Whether an earlier run was put back that an interrupted one had moved aside.

        Raises:
            ResultsError: another process has it, it cannot be written to, or something else lies where
                results go.
        """
        try:
            owner = self._lock.acquire()
            if owner is None:
                self._check_places()
                for path in _matching(self.path, _UNFINISHED):
                    _remove(path)
                return self._settle()
        except OSError as error:
            self._lock.release()
            raise ResultsError(
                f"Expected {self.path} to be a folder that can be written to, but got: {error}. "
                "Choose another with --runs."
            ) from error
        except ResultsError:
            self._lock.release()
            raise
        raise ResultsError(
            f"Expected {self.path} to be free, but {owner} writes there. Wait for its end or stop it, or "
            "choose another folder with --runs. If that process is on another machine and gone for "
            f"good, remove {self._lock.path}."
        )

    def set_aside(self) -> None:
        """Move what an earlier run wrote out of the way, all or nothing."""
        files = _matching(self.path, _WRITTEN)
        if files:
            moving = self.path / _MOVING
            _move(files, self.path, moving)
            moving.rename(self.path / _ASIDE)
            flush(self.path)

    def settle(self) -> None:
        """Remove what was set aside if the new run has something to go on from."""
        if (self.path / _ASIDE).is_dir() and self._has_begun():
            self._settle()

    def release(self) -> bool:
        """Give the folder back.

        Returns:
            Whether an earlier run was put back, since the new one left nothing to go on from.
        """
        try:
            return self._lock.is_held and self._settle()
        finally:
            self._lock.release()

    def replaced(self, name: str) -> Path | None:
        """Which file of an earlier run a path leads to, by whatever way, if it leads to one."""
        try:
            given = os.stat(name)
        except (OSError, ValueError):  # no path at all, mostly
            return None
        for written in _matching(self.path, _WRITTEN):
            for one in [written, *written.rglob("*")] if written.is_dir() else [written]:
                if one.exists() and os.path.samestat(given, one.stat()):
                    return one
        return None

    def _has_begun(self) -> bool:
        last = (self.path / "checkpoints" / f"{name}.ckpt" for name in ("last", "previous"))
        return (self.path / "results.json").exists() or any(path.exists() for path in last)

    def _settle(self) -> bool:
        """Finish what was begun, whichever way: whether an earlier run was put back."""
        aside, moving = self.path / _ASIDE, self.path / _MOVING
        if aside.is_dir():
            if self._has_begun():
                aside.rename(self.path / _REMOVED)
                shutil.rmtree(self.path / _REMOVED)
                return False
            for path in _matching(self.path, _WRITTEN):
                _remove(path)
            aside.rename(moving)
        if not moving.is_dir():
            return False
        _move(_matching(moving, _WRITTEN), moving, self.path)
        shutil.rmtree(moving)
        return True

    def _check_places(self) -> None:
        """Refuse before training what would be found out when the results are written."""
        for name in (*_FILES, *_FOLDERS):
            path = self.path / name
            if path.exists() and path.is_dir() != (name in _FOLDERS):
                kind = "folder" if name in _FOLDERS else "file"
                raise ResultsError(
                    f"Expected {path} to be a {kind} of a run, but something else lies there. Move "
                    "it, or choose another folder with --runs."
                )
            if path.is_dir() and not os.access(path, os.W_OK | os.X_OK):
                raise ResultsError(
                    f"Expected {path} to be a folder that can be written to, but it is not. Give write "
                    "access, or choose another folder with --runs."
                )


def written_files(folder: Path) -> list[Path]:
    """What a run left in its folder, without its checkpoints."""
    found = {path for path in _matching(folder, _WRITTEN) if path.is_file()}
    return sorted(path for path in found if path.suffix != ".ckpt")


def _matching(folder: Path, patterns: Iterable[str]) -> list[Path]:
    def found() -> Iterator[Path]:
        for pattern in patterns:
            yield from sorted(folder.glob(pattern))

    return list(found())


def _move(paths: Iterable[Path], here: Path, there: Path) -> None:
    """Rename files and folders to the same places below another folder."""
    for path in paths:
        target = there / path.relative_to(here)
        target.parent.mkdir(parents=True, exist_ok=True)
        path.replace(target)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():  # a sharded checkpoint is a folder
        shutil.rmtree(path)
    else:
        path.unlink()
