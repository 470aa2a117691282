"""Commands in processes of their own, forked from one that has imported torch and Lightning already.

A script finds what a process of its own would: its folder first on ``sys.path``, its environment, its
current folder, a fresh import of this package. It ends as a process ends, with its own exit status, but
does not take the interpreter down object by object, which takes a process with torch in it a second or two.
"""

import atexit
import gc
import json
import os
import runpy
import subprocess
import sys
import threading
import traceback
from collections.abc import Mapping, Sequence
from functools import cache
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

__all__ = ["Done", "run_script"]

#: Packages whose import does not depend on the environment, and starts no thread.
IMPORTED = ["torch", "torchvision", "torchmetrics", "lightning.pytorch", "jsonargparse"]


class Done(NamedTuple):
    """As ``subprocess.run`` answers."""

    returncode: int
    stdout: str
    stderr: str


def run_script(
    line: Sequence[str], *, env: Mapping[str, str] | None = None, cwd: Path | None = None
) -> Done:
    """Run a Python script, or a module.

    Args:
        line: the path of the script, or ``-m`` and the name of a module; then the arguments.
        env: the environment; by default this process's.
        cwd: the folder to run in; by default this process's.
    """
    server = _server()
    assert server.stdin is not None
    assert server.stdout is not None
    with TemporaryDirectory() as folder:
        out, err = Path(folder, "out"), Path(folder, "err")
        request = {
            "line": list(line),
            "environment": dict(os.environ if env is None else env),
            "folder": str(cwd or Path.cwd()),
            "outputs": [str(out), str(err)],
        }
        server.stdin.write(json.dumps(request) + "\n")
        server.stdin.flush()
        status = int(server.stdout.readline())
        return Done(status, out.read_text(encoding="utf-8"), err.read_text(encoding="utf-8"))


@cache
def _server() -> "subprocess.Popen[str]":
    """It ends with this process, when its standard input does."""
    apart = {"PYTHONPATH", "PYTHONSAFEPATH"}  # each request has its own
    return subprocess.Popen(
        [sys.executable, __file__],
        env={name: value for name, value in os.environ.items() if name not in apart},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def _wait_for_a_request() -> dict[str, Any]:
    """In the server, forever; it returns in a process that was forked for a request."""
    for name in IMPORTED:
        import_module(name)
    gc.freeze()  # else collections in the forked processes copy every page
    while text := sys.stdin.readline():
        sys.stdout.flush()
        process = os.fork()
        if not process:
            return dict(json.loads(text))
        print(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), flush=True)
    sys.exit()


def _become(
    line: Sequence[str], environment: Mapping[str, str], folder: str, outputs: Sequence[str]
) -> None:
    """Make this process the one that was asked for, up to its first line."""
    for descriptor, path in enumerate([os.devnull, *outputs]):
        opened = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        os.dup2(opened, descriptor)
        os.close(opened)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    first = [folder if line[0] == "-m" else str(Path(line[0]).parent)]
    first = [] if environment.get("PYTHONSAFEPATH") else first
    listed = [path for path in environment.get("PYTHONPATH", "").split(os.pathsep) if path]
    sys.path[:] = [*first, *listed, *sys.path[1:]]  # in place of this file's folder
    sys.argv = list(line[1:] if line[0] == "-m" else line)


def _run(script: str) -> int:
    """The exit status, as the interpreter makes it of what the script raises."""
    del sys.modules["__main__"]
    try:
        if script == "-m":
            runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(script, run_name="__main__")
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return end.code or 0
        print(end.code, file=sys.stderr)
        return 1
    except BaseException:  # noqa: BLE001 - whatever it is, the interpreter would print it
        traceback.print_exc()
        return 1
    return 0


if __name__ == "__main__":
    asked = _wait_for_a_request()
    _become(**asked)
    status = _run(asked["line"][0])
    threading._shutdown()  # type: ignore[attr-defined]  # waits for threads, as the interpreter does
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
