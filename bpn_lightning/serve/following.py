"""A bundle's folder that changes while it is served: seen by the files' times, and read again."""

import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bpn_lightning.errors import BPNLightningError
from bpn_lightning.files.untrusted import read_json
from bpn_lightning.modes import Modes
from bpn_lightning.modes.bundle import CONFIG, TASK_CONFIG, TASKS
from bpn_lightning.terminal import printable

__all__ = ["Follower", "fingerprint", "task_table"]

State = tuple[tuple[str, int, int, int], ...]


def fingerprint(folder: str | os.PathLike[str]) -> State:
    """Name, inode, time and size of each file of a bundle; a file that changes, changes one of them."""
    found = []
    for place in [Path(folder), *_task_folders(Path(folder))]:
        try:
            with os.scandir(place) as entries:
                for entry in entries:
                    if entry.is_file() and entry.name[0] != ".":  # else of a writer
                        state = entry.stat()
                        found.append((entry.path, state.st_ino, state.st_mtime_ns, state.st_size))
        except OSError:  # it was removed just now
            continue
    return tuple(sorted(found))


def _task_folders(root: Path) -> list[Path]:
    try:
        with os.scandir(root / TASKS) as entries:
            return sorted(Path(e.path) for e in entries if e.is_dir() and e.name[0] != ".")
    except OSError:
        return []


def task_table(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """The tasks of a bundle's folder, without their tensors.

    Returns:
        ``tasks``, a list of ``name``, ``id`` and ``classes`` in the order of IDs; ``gate``, whether a task
        may be left out.
    """
    root, tasks = Path(folder), []
    for place in _task_folders(root):
        try:
            task = read_json(place / TASK_CONFIG, within=root)["task"]
            classes = [str(one) for one in task["class_names"]]
            tasks.append({"name": place.name, "id": int(task["id"]), "classes": classes})
        except (OSError, ValueError, KeyError, TypeError):  # it is being written or removed
            continue
    gates = read_json(root / CONFIG, within=root).get("gates")
    return {"tasks": sorted(tasks, key=lambda one: one["id"]), "gate": bool(gates)}


class Follower(threading.Thread):
    """Reads a bundle again when its folder has changed; until then, and if it cannot, the network stays.

    Args:
        net: loaded from the folder.
        every: seconds between two looks.
        after: called with whether the folder could be read, after each change.
    """

    def __init__(self, net: Modes, every: float, after: Callable[[bool], None]) -> None:
        super().__init__(name="bpn-serve-follower", daemon=True)
        self.net, self.every, self.after = net, every, after
        self.seen: State = ()
        self._stopped = threading.Event()

    def run(self) -> None:
        """Look until :meth:`stop`."""
        while not self._stopped.wait(self.every):
            self.look()

    def stop(self) -> None:
        """End after the current look."""
        self._stopped.set()

    def look(self) -> None:
        """Read the folder if it has changed since the last look."""
        now = fingerprint(self.net.folder)
        if now == self.seen:
            return
        self.seen = now  # before it is read: what changes meanwhile is seen by the next look
        try:
            self.net.reload()
        except BPNLightningError as error:
            self.after(False)
            self._say(f"what was read before goes on answering. {error}")
            return
        self.after(True)
        self._say(f"answers for {len(self.net.tasks)} tasks: {', '.join(self.net.tasks[:20])}")

    @staticmethod
    def _say(text: str) -> None:
        print(f"bpn-serve: {printable(text)}", file=sys.stderr, flush=True)
