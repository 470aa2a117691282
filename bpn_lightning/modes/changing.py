"""Changes of a bundle's folder: one writer at a time, and each task at once, for those that read it meanwhile."""

import json
import shutil
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from bpn_lightning.errors import ResultsError
from bpn_lightning.files.lock import FolderLock
from bpn_lightning.files.untrusted import read_json
from bpn_lightning.files.writing import write_atomically
from bpn_lightning.modes.bundle import (
    ACCURACY,
    CONFIG,
    GATE,
    TASKS,
    Bundle,
    TaskFiles,
    explained,
    write_task,
)
from bpn_lightning.modes.hashed import is_named_by_hash, write_named
from bpn_lightning.modes.training_state import FOLDER

__all__ = ["add_files", "changing", "formats_of", "replace_files", "write_formats"]

WAIT = 60.0
"""Seconds that a writer waits for another one."""

_EVERY = 0.1

#: What a writer that was killed may have left.
_UNFINISHED = (".*.tmp", f"{TASKS}/.*.tmp", f"{TASKS}/.*.removed", f"{FOLDER}/.*.tmp")


@contextmanager
def changing(folder: Path, wait: float = WAIT) -> Iterator[None]:
    """Let no other process write to a bundle; those that read it need no lock.

    The lock is a file of the folder that the operating system unlocks when the process ends, however it ends.

    Args:
        folder: of the bundle.
        wait: seconds to wait for another writer.

    Raises:
        CheckpointError: there is no bundle.
        ResultsError: another process is writing to it for longer, or it cannot be written.
    """
    _named_files(folder)
    lock, end = FolderLock(folder), time.monotonic() + wait
    try:
        while (owner := lock.acquire()) is not None:
            if time.monotonic() > end:
                raise ResultsError(
                    f"Expected to be the only one that writes to {folder}, but {owner} has been doing so for "
                    f"{wait:g} seconds. Wait for it to end or stop it. If that process was on another machine "
                    f"that is no longer running, remove {lock.path}."
                )
            time.sleep(_EVERY)
        _remove_leftovers(folder, _named_files(folder))
        yield
    except OSError as error:
        raise ResultsError(
            f"Expected to write {folder}, but got: {error}. Free some space or grant write access."
        ) from error
    finally:
        lock.release()


def _named_files(folder: Path) -> dict[str, str]:
    """What ``config.json`` calls the files next to it."""
    with explained(folder):
        record = read_json(folder / CONFIG, within=folder)
        return {name: str(sums.get("name", name)) for name, sums in record["files"].items()}


def _remove_leftovers(folder: Path, files: Mapping[str, str]) -> None:
    for path in (path for pattern in _UNFINISHED for path in folder.glob(pattern)):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    for name in (ACCURACY, GATE):
        for path in [folder / name, *folder.glob(f"{Path(name).stem}-*.safetensors")]:
            known = path.name == name or is_named_by_hash(path.name)
            if known and path.name != files.get(name, name):
                path.unlink(missing_ok=True)


def add_files(folder: Path, bundle: Bundle, one: TaskFiles) -> Path:
    """Write the folder of a task into a bundle's; it appears only when it is complete.

    Args:
        folder: of the bundle, which this process changes alone; see :func:`changing`.
        bundle: as it was read.
        one: a task of the same base.

    Returns:
        The task's folder.
    """
    (folder / TASKS).mkdir(exist_ok=True)
    write_task(one, folder / TASKS / one.name, bundle.record)
    return folder / TASKS / one.name


def replace_files(
    folder: Path, bundle: Bundle, files: Mapping[str, Mapping[str, Tensor]], **record: Any
) -> None:
    """Replace files next to ``config.json``, and fields in it, at once.

    They get other names, which ``config.json`` takes up when they are there. Those before are removed by the next
    change, so that who reads them meanwhile finds them.

    Args:
        folder: of the bundle, which this process changes alone; see :func:`changing`.
        bundle: that is in it; its record and its files are changed too.
        files: tensors by the file's name. Those of all tasks may not be among them: they belong to their base.
        record: fields of ``config.json``.
    """
    for name, tensors in files.items():
        bundle.record["files"][name] = write_named(folder, name, tensors)
        bundle.files[name] = dict(tensors)
    bundle.record.update(record)
    write_atomically(folder / CONFIG, json.dumps(bundle.record, indent=1).encode())


def formats_of(folder: Path) -> list[str]:
    """The names of other formats that a bundle has, which hold the head of all tasks."""
    from bpn_lightning.modes.exporters import WRITERS

    return [name for name in WRITERS if (folder / name).is_dir()]


def write_formats(folder: Path, trust: Collection[str] = ()) -> None:
    """Make the files of other formats again after tasks have changed.

    Args:
        folder: of the bundle.
        trust: as of :func:`bpn_lightning.modes.load`.
    """
    names = formats_of(folder)
    if not names:
        return
    from bpn_lightning.modes import load
    from bpn_lightning.modes.exporters import WRITERS

    net = load(folder, trust=trust)
    for name in names:
        WRITERS[name](net, folder / name)
