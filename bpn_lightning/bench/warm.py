"""Cells in processes that are forked from one that has imported everything.

A cell of a small stream would spend as long on ``import torch, lightning`` as on learning. It stays a
process of its own, with its signals, its exit status and its log, and a crash takes it alone.
"""

import atexit
import gc
import json
import os
import select
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from importlib import import_module
from pathlib import Path
from threading import Event, Lock
from types import ModuleType

from bpn_lightning.bench.runner import BPN_FIT, LOST, bpn_fit, environment, on_this_machine

__all__ = ["WarmProcesses", "serve"]

#: What a fit imports; it starts no thread, without which a process may be forked.
IMPORTED = ("bpn_lightning.cli.main", "bpn_lightning.cli.train")

_POLL = 0.2  # seconds

#: The current folder is no place for imports, as for a console script.
_SERVE = (
    "import sys; '' in sys.path and sys.path.remove(''); "
    "from bpn_lightning.bench.warm import serve; serve()"
)


class WarmProcesses(AbstractContextManager["WarmProcesses"]):
    """The :class:`~bpn_lightning.bench.runner.Executor` that imports once for each process at a time.

    A context manager: when it is left, the processes that wait for cells end.
    """

    def __init__(self) -> None:
        self._idle: list[subprocess.Popen[str]] = []
        self._lock = Lock()

    def __exit__(self, *_: object) -> None:
        for server in self._idle:
            server.communicate()  # the end of its input is its own

    def __call__(self, line: Sequence[str], log: Path, stopped: Event) -> int:
        """Run a command; see :class:`~bpn_lightning.bench.runner.Executor`."""
        if line[0] != BPN_FIT:
            return on_this_machine(line, log, stopped)
        with self._lock:
            server = self._idle.pop() if self._idle else _start_server()
        try:
            code = _ask(server, {"argv": line[1:], "log": str(log)}, stopped)
        except (OSError, ValueError):  # it was killed
            server.kill()
            server.communicate()
            return LOST
        with self._lock:
            self._idle.append(server)
        return code


def _start_server() -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-c", _SERVE],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environment(),
        text=True,
        bufsize=1,
    )


def _ask(server: "subprocess.Popen[str]", request: dict[str, object], stopped: Event) -> int:
    assert server.stdin is not None
    assert server.stdout is not None
    server.stdin.write(json.dumps(request) + "\n")
    process = int(server.stdout.readline())
    told = False
    while not select.select([server.stdout], [], [], _POLL)[0]:
        if stopped.is_set() and not told:
            os.kill(process, signal.SIGTERM)
            told = True
    return int(server.stdout.readline())


def serve() -> None:
    """In a process that waits for cells: import, then fork one for each line of standard input.

    The answers on standard output are two lines: the process's ID, and later its exit status.
    """
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what an import prints is no answer
    interrupt = signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the cells
    for name in IMPORTED:
        import_module(name)
    gc.freeze()  # else collections in the cells copy every page
    while text := sys.stdin.readline():
        request = json.loads(text)
        process = os.fork()
        if not process:
            answers.close()
            signal.signal(signal.SIGINT, interrupt)
            _become(request["argv"], request["log"])
            _end(_fit)
        print(process, file=answers)
        print(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), file=answers)


def _become(argv: Sequence[str], log: str) -> None:
    """Make this process one that began as the command."""
    for path, flags, descriptors in (
        (os.devnull, os.O_RDONLY, (0,)),
        (log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, (1, 2)),
    ):
        opened = os.open(path, flags, 0o666)
        for descriptor in descriptors:
            os.dup2(opened, descriptor)
        os.close(opened)
    program = bpn_fit()
    main = sys.modules["bpn_lightning.cli.main"]
    sys.argv = [program[0] if len(program) == 1 else str(main.__file__), *argv]
    sys.modules["__main__"] = ModuleType("__main__")  # Lightning starts further processes by it


def _fit() -> int:
    from bpn_lightning.cli.main import main

    return main()


def _end(command: Callable[[], int]) -> None:
    """Run a command and end, as the interpreter does but for freeing object by object what is shared."""
    try:
        code: object = command()
    except SystemExit as end:
        code = end.code
    except BaseException:  # noqa: BLE001 - the interpreter would print whatever it is
        traceback.print_exc()
        code = 1
    if code is not None and not isinstance(code, int):
        print(code, file=sys.stderr)
        code = 1
    threading._shutdown()  # type: ignore[attr-defined]  # waits for threads
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code or 0)
