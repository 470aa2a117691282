"""A run's folder: locked while a process writes to it, with earlier results kept until they are replaced.

::

    <runs>/<experiment>/<method>/seed_<n>/
    ├── .lock        the process that is writing here
    └── .replaced/   an earlier run that --overwrite replaces, until the new one has a checkpoint

An earlier run is moved aside when training begins, and removed when the new one can be resumed or is
finished: at its first checkpoint, or results. If the new one ends before that, for any reason, the earlier
one is restored, by the same process or by the next one that uses the folder. Other files are not touched.
"""

import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

from bpn_lightning.errors import ResultsError
from bpn_lightning.files.lock import FolderLock
from bpn_lightning.files.writing import flush

__all__ = ["RunFolder", "written_files"]

_FILES = (
    "results.json",
    "accuracy_matrix.csv",
    "task_metrics.csv",
    "gates.csv",
    "config.yaml",
    "metrics.csv",
)
_FOLDERS = ("figures", "checkpoints")

# All files of a run: --overwrite replaces only these. results.json comes first, so that a folder never
# looks finished while its files are being moved.
_WRITTEN = (
    *_FILES,
    "figures/accuracy_over_stream.*",
    "figures/accuracy_matrix.*",
    "figures/gates_over_stream.*",
    "figures/gate_calibration.*",
    "checkpoints/*.ckpt",
)

_UNFINISHED = (".*.tmp", "figures/.*.tmp", "checkpoints/.*.tmp")  # of interrupted writes

_ASIDE = ".replaced"
_MOVING = ".replacing"  # while files are being moved in either direction
_REMOVED = ".removed.tmp"


class RunFolder:
    """The folder of a run.

    Args:
        path: the folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = FolderLock(path)

    def acquire(self) -> bool:
        """Lock the folder for this process, creating it if necessary.

        Returns:
            Whether an earlier run was restored that an interrupted one had moved aside.

        Raises:
            ResultsError: another process has locked it, it is not writable, or a path of the results is
                something else.
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
                f"Expected {self.path} to be a writable folder, but got: {error}. "
                "Choose another with --runs."
            ) from error
        except ResultsError:
            self._lock.release()
            raise
        raise ResultsError(
            f"Expected {self.path} to be unused, but {owner} is writing there. Wait for it to end or stop "
            "it, or choose another folder with --runs. If that process was on another machine that is no "
            f"longer running, remove {self._lock.path}."
        )

    def set_aside(self) -> None:
        """Move all files of an earlier run aside, or none."""
        files = _matching(self.path, _WRITTEN)
        if files:
            moving = self.path / _MOVING
            _move(files, self.path, moving)
            moving.rename(self.path / _ASIDE)
            flush(self.path)

    def settle(self) -> None:
        """Remove the earlier run if the new one has a checkpoint or results."""
        if (self.path / _ASIDE).is_dir() and self._has_begun():
            self._settle()

    def release(self) -> bool:
        """Unlock the folder.

        Returns:
            Whether an earlier run was restored, because the new one has no checkpoint and no results.
        """
        try:
            return self._lock.is_held and self._settle()
        finally:
            self._lock.release()

    def replaced(self, name: str) -> Path | None:
        """The file of an earlier run that a path resolves to, if any."""
        try:
            given = os.stat(name)
        except (OSError, ValueError):  # mostly values that are not paths
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
        """Complete an interrupted move in either direction; whether an earlier run was restored."""
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
        """Check before training that the results can be written."""
        for name in (*_FILES, *_FOLDERS):
            path = self.path / name
            if path.exists() and path.is_dir() != (name in _FOLDERS):
                kind = "folder" if name in _FOLDERS else "file"
                raise ResultsError(
                    f"Expected {path} to be a {kind} of a run, but it is something else. Move "
                    "it, or choose another folder with --runs."
                )
            if path.is_dir() and not os.access(path, os.W_OK | os.X_OK):
                raise ResultsError(
                    f"Expected {path} to be a writable folder, but it is not. Grant write access, or "
                    "choose another folder with --runs."
                )


def written_files(folder: Path) -> list[Path]:
    """All files that a run wrote to its folder, without its checkpoints."""
    found = {path for path in _matching(folder, _WRITTEN) if path.is_file()}
    return sorted(path for path in found if path.suffix != ".ckpt")


def _matching(folder: Path, patterns: Iterable[str]) -> list[Path]:
    def found() -> Iterator[Path]:
        for pattern in patterns:
            yield from sorted(folder.glob(pattern))

    return list(found())


def _move(paths: Iterable[Path], here: Path, there: Path) -> None:
    """Move files and folders to the same relative paths below another folder."""
    for path in paths:
        target = there / path.relative_to(here)
        target.parent.mkdir(parents=True, exist_ok=True)
        path.replace(target)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():  # a sharded checkpoint is a folder
        shutil.rmtree(path)
    else:
        path.unlink()
