"""Runs the cells of a grid as separate ``bpn-fit`` processes, several at a time.

A cell's folder says how far it is: ``results.json`` of all tasks, and it is finished and not run
again; ``failed.json``, and it is reported and run again only on request; a checkpoint, and the next
call continues from it. ``log.txt`` beside them has what the process said. Several calls may share a grid:
a cell that another one runs is left to it.

Where the processes run is an :class:`Executor`'s business: :func:`on_this_machine`, or
:class:`bpn_lightning.bench.ray_executor.OnRay`.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event, Lock
from typing import Any, Literal, Protocol

import yaml

from bpn_lightning.bench.cell import Cell
from bpn_lightning.cli.command import flag_values
from bpn_lightning.errors import ResultsError
from bpn_lightning.files.lock import FolderLock, holder
from bpn_lightning.files.untrusted import MAX_CONFIG_BYTES, open_untrusted, read_json, read_text
from bpn_lightning.files.writing import refuse_outside, write_atomically
from bpn_lightning.run.identity import OBSERVED, decides
from bpn_lightning.terminal import printable

__all__ = ["Executor", "Failure", "Runner", "State", "on_this_machine", "start", "state"]

State = Literal["finished", "failed", "open"]

_TAIL = 2**16  # bytes of a log that are looked at

ATTEMPTS = 3
"""How often a cell is begun whose process is killed, each time from its last checkpoint."""

BPN_FIT = "bpn-fit"

LOST = -signal.SIGKILL
"""What a process has ended with that was killed with the one that started it."""


@dataclass(frozen=True)
class Failure:
    """A cell that did not come to its end.

    Args:
        cell: which one.
        log: the file with what its process said.
        last: the last lines of it.
        earlier: it failed in an earlier call, and was not tried again.
    """

    cell: Cell
    log: Path
    last: str
    earlier: bool = False

    def __str__(self) -> str:
        when = "failed before (--retry tries it again)" if self.earlier else "failed"
        return f"{self.cell.name}: {when}; the whole log is {self.log}\n{_indented(self.last)}"


def state(cell: Cell, root: Path, passed_on: Sequence[str] = ()) -> State:
    """How far a cell is, by its folder.

    Args:
        cell: of a grid.
        root: folder of the grid's runs.
        passed_on: flags that every run of the grid gets besides.

    Raises:
        ResultsError: what lies there is another run, with other settings than the grid's, or a link
            leads out of the root.
    """
    folder = cell.folder(root)
    refuse_outside(root, folder)
    if _learned_all(folder / "results.json"):
        _check_same(cell, folder, passed_on)
        return "finished"
    return "failed" if (folder / "failed.json").is_file() else "open"


class Executor(Protocol):
    """Runs one process, wherever that may be."""

    def __call__(self, line: Sequence[str], log: Path, stopped: Event) -> int:
        """Run a command to its end, or until it is to stop.

        Called from several threads at a time.

        Args:
            line: as :func:`start` takes it.
            log: what it says is added to this file.
            stopped: once it is set, the process is told to end, and waited for.

        Returns:
            Its exit status; below 0 where something killed it that a new attempt may outlive.
        """


def start(line: Sequence[str], log: Path, **options: Any) -> "subprocess.Popen[bytes]":
    """Start a process of one thread, unless $OMP_NUM_THREADS says otherwise.

    Args:
        line: a command; the program ``bpn-fit`` is that of the environment it is started in.
        log: what it says is added to this file.
        options: more for ``Popen``.
    """
    program = bpn_fit() if line[0] == BPN_FIT else [line[0]]
    with log.open("ab") as file:
        return subprocess.Popen(
            [*program, *line[1:]],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            **{"env": environment(), **options},
        )


def environment() -> dict[str, str]:
    """Of the processes of cells: one thread, unless $OMP_NUM_THREADS says otherwise."""
    return {"OMP_NUM_THREADS": "1", **os.environ}


def on_this_machine(line: Sequence[str], log: Path, stopped: Event) -> int:
    """The :class:`Executor` that needs nothing."""
    process = start(line, log)
    while True:
        try:
            return process.wait(timeout=0.2)
        except subprocess.TimeoutExpired:
            if stopped.is_set():
                # Not as Ctrl-C does, which the processes of a script in the background ignore.
                process.terminate()
                return process.wait()


@dataclass
class Runner:
    """Runs cells, each in a process of its own.

    Args:
        root: folder of the grid's runs.
        jobs: processes at a time.
        retry: run again what failed in an earlier call.
        passed_on: more flags for every ``bpn-fit``.
        command: the program.
        executor: runs the processes.
        on_wait: called about twice a second while cells run, and may :meth:`stop` some.
    """

    root: Path
    jobs: int = 1
    retry: bool = False
    passed_on: Sequence[str] = ()
    command: Sequence[str] = (BPN_FIT,)
    executor: Executor = on_this_machine
    on_wait: Callable[[], None] = lambda: None
    _stops: dict[Path, Event] = field(default_factory=dict, init=False)
    _lock: Lock = field(default_factory=Lock, init=False)
    _done: int = field(default=0, init=False)

    def run(self, cells: Sequence[Cell]) -> list[Failure]:
        """Run what is open, and what failed if a retry is wished for.

        Returns:
            What failed, now or before; the other cells are finished all the same.

        Raises:
            ResultsError: a folder holds another run than the grid asks for, before anything runs.
            KeyboardInterrupt: after Ctrl-C, when all processes have ended; what they did is kept.
        """
        states = [state(cell, self.root, self.passed_on) for cell in cells]
        again = {"open", "failed"} if self.retry else {"open"}
        todo = [cell for cell, far in zip(cells, states, strict=True) if far in again]
        todo.sort(key=lambda cell: cell.seed)  # a whole table soon, and then its intervals
        _say(_count(states, len(todo)))
        self._done, started = 0, time.monotonic()
        self._stops = {cell.folder(self.root): Event() for cell in todo}
        with ThreadPoolExecutor(self.jobs) as pool:
            futures = [pool.submit(self._run, cell, len(todo), started) for cell in todo]
            try:
                # With a timeout: Ctrl-C just before a wait without end would not be noticed.
                while (far := wait(futures, 0.5, FIRST_EXCEPTION)).not_done:
                    for future in far.done:
                        future.result()
                    self.on_wait()
                found = [future.result() for future in futures]
            except BaseException:
                for stop in self._stops.values():
                    stop.set()
                pool.shutdown(wait=True, cancel_futures=True)
                raise
        earlier = [
            self._failure(cell, earlier=True)
            for cell, far in zip(cells, states, strict=True)
            if far == "failed" and not self.retry
        ]
        return [*earlier, *(failure for failure in found if failure is not None)]

    def stop(self, cell: Cell) -> None:
        """End a cell early, which is then neither finished nor failed."""
        folder = cell.folder(self.root)
        if folder in self._stops:  # else it is finished
            self._stops[folder].set()

    def _run(self, cell: Cell, total: int, started: float) -> Failure | None:
        folder = cell.folder(self.root)
        lock = FolderLock(folder, ".cell.lock")
        try:
            owner = lock.acquire() or holder(folder)
        except OSError as error:
            raise ResultsError(
                f"Expected {folder} to be a folder that can be written to, but got: {error}. "
                "Choose another with --runs."
            ) from error
        try:
            if self._stops[folder].is_set():
                return None
            if owner:
                _say(f"{cell.name}: left to {owner}, which runs it")
            elif (
                state(cell, self.root, self.passed_on) != "finished"
            ):  # by another call, since this one began
                return self._run_locked(cell, folder, total, started)
            return None
        finally:
            lock.release()

    def _run_locked(self, cell: Cell, folder: Path, total: int, started: float) -> Failure | None:
        for earlier in ("failed.json", "log.txt"):
            (folder / earlier).unlink(missing_ok=True)
        line = [*self.command, *cell.flags, *self.passed_on]
        line += ["--runs", str(cell.runs(self.root)), "--ckpt_path", "last"]
        line += ["--trainer.enable_progress_bar", "false"]
        begun = time.monotonic()
        code = self._attempt(cell, line, folder / "log.txt")
        failure = None
        if not _learned_all(folder / "results.json"):
            if self._stops[folder].is_set():
                return None
            if owner := holder(folder):  # a bpn-fit that began beside this one
                _say(f"{cell.name}: left to {owner}, which runs it")
                return None
            record = {"command": line, "status": code}
            write_atomically(folder / "failed.json", json.dumps(record, indent=2).encode())
            failure = self._failure(cell)
        with self._lock:
            self._done += 1
            left = (time.monotonic() - started) / self._done * (total - self._done)
            outcome = "failed" if failure else "done"
            if code and not failure:
                outcome = f"done, but it ended with status {code} (see its log.txt)"
            seconds = time.monotonic() - begun
            _say(
                f"[{self._done}/{total}] {cell.name}: {outcome} in {seconds:.0f} s"
                + (f", about {left / 60:.0f} min left" if left >= 60 else "")
            )
        return failure

    def _attempt(self, cell: Cell, line: Sequence[str], log: Path) -> int:
        """The exit status of the cell's process, or of the last one where some were killed."""
        stop = self._stops[cell.folder(self.root)]
        for attempt in range(1, ATTEMPTS + 1):
            code = self.executor(line, log, stop)
            if code >= 0 or stop.is_set():
                break
            said = f"killed by signal {-code}, attempt {attempt} of {ATTEMPTS}"
            _say(f"{cell.name}: {said}")
            with log.open("a", encoding="utf-8") as file:
                file.write(f"bpn-bench: {said}\n")
        return code

    def _failure(self, cell: Cell, earlier: bool = False) -> Failure:
        log = cell.folder(self.root) / "log.txt"
        try:
            lines = _tail(log).strip().splitlines()
        except OSError:
            lines = []
        return Failure(cell, log, "\n".join(lines[-8:]) or "(it said nothing)", earlier)


def _tail(log: Path) -> str:
    """The end of a log, which may be long."""
    with open_untrusted(log, max_bytes=None) as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL))
        return file.read().decode(errors="replace")


def _learned_all(path: Path) -> bool:
    try:
        results = read_json(path)
        return not results["tasks_not_learned"]
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _check_same(cell: Cell, folder: Path, passed_on: Sequence[str]) -> None:
    """Results of an earlier wording of the grid, or of other flags, must not pass for this one's."""
    try:
        config = yaml.safe_load(read_text(folder / "config.yaml", max_bytes=MAX_CONFIG_BYTES))
    except (OSError, yaml.YAMLError, ValueError, RecursionError):
        return  # only the results were kept
    for key, wanted in (*flag_values(passed_on), *cell.settings, *cell.variant):
        found = _at(config, key.split("."))
        if key in OBSERVED or not decides(key) or _agree(found, wanted):
            continue
        raise ResultsError(
            f"Expected {folder} to hold a run with {key} {wanted!r}, but got one with {found!r}. "
            "Remove that folder, or give another with --runs."
        )


_MISSING = object()


def _at(config: Any, keys: Sequence[str]) -> Any:
    """The value of a key, in which the ``init_args`` of a class may be left out, as on the command line."""
    for key in keys:
        if isinstance(config, Mapping) and key not in config:
            config = config.get("init_args")
        if not isinstance(config, Mapping) or key not in config:
            return _MISSING
        config = config[key]
    return config


def _agree(found: Any, wanted: Any) -> bool:
    """Whether a resolved value may be what a flag or a grid asks for."""
    if found is _MISSING or found == wanted:
        return True
    if isinstance(wanted, str):
        if isinstance(found, Mapping):  # a class, by its short name or its path
            return str(found.get("class_path")).endswith(wanted.rpartition(".")[2])
        if isinstance(found, int | float):
            try:
                return float(wanted) == found  # YAML takes 1e-3 for a text
            except ValueError:
                pass
        return "${" in wanted or wanted.startswith("--")
    return False


def bpn_fit() -> list[str]:
    """The command of the environment that this one runs in."""
    beside = Path(sys.executable).with_name("bpn-fit")
    found = str(beside) if beside.exists() else shutil.which("bpn-fit")
    return [found] if found else [sys.executable, "-m", "bpn_lightning.cli.main"]


def _count(states: Sequence[State], todo: int) -> str:
    finished, failed = states.count("finished"), states.count("failed")
    return f"{len(states)} runs: {finished} finished, {failed} failed before, {todo} to do"


def _say(line: str) -> None:
    print(f"bpn-bench: {printable(line)}", file=sys.stderr, flush=True)


def _indented(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.splitlines())
