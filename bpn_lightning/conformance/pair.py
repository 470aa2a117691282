"""Two processes for all strategies of a run, started before anything heavy is imported here.

They import what they need while this process does, and learn while it examines what one process shows.
"""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["TwoProcesses"]

#: Seconds that both processes have, and as many again for each strategy; and that one of them waits for
#: the other. Nothing is judged by it: it ends a deadlock.
PATIENCE = float(os.environ.get("BPN_TEST_PATIENCE", "300"))


class TwoProcesses:
    """Fits of several strategies, each by two processes together.

    A strategy that fails ends both processes; they are started again for those that remain.

    Args:
        folder: an empty one for what they write.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._names: list[str] = []
        self._arguments: dict[str, Any] = {}
        self._round: list[int] = []  # the numbers of the cases that they work on
        self._processes: list[subprocess.Popen[str]] = []
        self._start()

    def begin(self, names: Sequence[str], arguments: Mapping[str, Any]) -> None:
        """Let them fit these cases, in this order.

        Args:
            names: of the cases, as on the command line.
            arguments: of constructors, as on the command line.
        """
        self._names, self._arguments = list(names), dict(arguments)
        self._send()

    def result(self, name: str) -> tuple[dict[str, Any], dict[str, Any]]:
        """What each process has learned of one case, by path; waits for it.

        Raises:
            RuntimeError: a process failed; its traceback.
        """
        import torch

        index = self._names.index(name)
        while not self._known(index):
            self._wait()
            if not self._known(index):
                self._start()
                self._send()
        failures = [path.read_text() for path in self._files(index, "txt") if path.exists()]
        if failures:
            raise RuntimeError(min(failures, key=_is_an_echo))
        mine, theirs = (torch.load(path, weights_only=False) for path in self._files(index, "pt"))
        return mine, theirs

    def stop(self) -> None:
        """End the processes, whatever they do."""
        for process in self._processes:
            process.kill()
            process.communicate()
        self._processes = []

    def _files(self, index: int, kind: str) -> list[Path]:
        return [self.folder / f"{index}_{rank}.{kind}" for rank in range(2)]

    def _known(self, index: int) -> bool:
        learned = all(path.exists() for path in self._files(index, "pt"))
        return learned or any(path.exists() for path in self._files(index, "txt"))

    def _start(self) -> None:
        self.stop()
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        for rank in range(2):
            environment = {
                **os.environ,
                "LOCAL_RANK": str(rank),  # so that Lightning starts no processes itself
                "NODE_RANK": "0",
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
                "OMP_NUM_THREADS": "1",
                "CUDA_VISIBLE_DEVICES": "",
                "PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path)),
            }
            for name in ("RANK", "WORLD_SIZE", "GROUP_RANK", "TORCHELASTIC_RUN_ID"):
                environment.pop(name, None)
            with (self.folder / f"{rank}.log").open("wb") as log:
                process = subprocess.Popen(
                    [sys.executable, "-m", "bpn_lightning.conformance.ranks", str(rank)],
                    cwd=self.folder,
                    env=environment,
                    stdin=subprocess.PIPE,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    text=True,
                )
            self._processes.append(process)

    def _send(self) -> None:
        """Everything that is not known yet."""
        self._round = [index for index in range(len(self._names)) if not self._known(index)]
        task = {
            "cases": {index: self._names[index] for index in self._round},
            "arguments": self._arguments,
            "path": [os.path.abspath(place) for place in sys.path],
        }
        for process in self._processes:
            assert process.stdin is not None
            try:
                process.stdin.write(json.dumps(task))
                process.stdin.close()
            except BrokenPipeError:
                pass  # it has ended already; its log says why

    def _wait(self) -> None:
        """Until they have ended; what they left undone without a word is a failure."""
        patience, said = PATIENCE * (1 + len(self._round)), ""
        for process in self._processes:
            try:
                process.wait(patience)
            except subprocess.TimeoutExpired:
                said = f"No end after {patience:.0f} s; BPN_TEST_PATIENCE={2 * PATIENCE:.0f} allows more."
        self.stop()
        undone = [index for index in self._round if not self._known(index)]
        failed = [i for i in self._round if any(path.exists() for path in self._files(i, "txt"))]
        if undone and not failed:
            logs = [(self.folder / f"{rank}.log").read_text(errors="replace") for rank in range(2)]
            self._files(undone[0], "txt")[0].write_text("\n".join([*logs, said])[-3000:])


def _is_an_echo(failure: str) -> bool:
    """Whether a process only says that the other has gone."""
    return "gloo" in failure.splitlines()[-1]
