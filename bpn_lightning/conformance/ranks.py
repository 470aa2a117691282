"""Two processes that learn the same small streams together: started once for all strategies.

They begin when the suite begins, and work while it examines what one process can show.
"""

import json
import os
import socket
import subprocess
import sys
import traceback
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.strategies import DDPStrategy

from bpn_lightning.conformance.runs import PLAIN, Setting, fit
from bpn_lightning.conformance.subjects import Subject, read_subjects

__all__ = ["TwoProcesses", "setting"]

#: How long one process waits for the other, and the suite for both, per strategy.
PATIENCE = timedelta(seconds=60)


def setting(**trainer: Any) -> Setting:
    """287 samples in batches of 33: shares of 17 and 16, and a last batch of 23."""
    stream = {"num_tasks": 2, "batch_size": 33, "eval_batch_size": 101, "augment": True}
    return Setting(PLAIN.backbone, PLAIN.optimizer, stream, trainer=trainer)


class TwoProcesses:
    """Fits of several strategies, each by two processes together.

    A strategy that fails ends both processes; they are started again for those that remain.

    Args:
        subjects: what they fit, in this order.
        arguments: of constructors, as on the command line.
        folder: an empty one for what they write.
    """

    def __init__(
        self, subjects: Sequence[Subject], arguments: Mapping[str, Any], folder: Path
    ) -> None:
        self.names = [subject.name for subject in subjects]
        self.arguments = dict(arguments)
        self.folder = folder
        self._processes: list[subprocess.Popen[bytes]] = []
        self._round: list[int] = []  # the numbers of the subjects that they work on
        self._start()

    def result(self, name: str) -> tuple[dict[str, Any], dict[str, Any]]:
        """What each process has learned of one subject, by path; waits for it.

        Raises:
            RuntimeError: a process failed; its traceback.
        """
        index = self.names.index(name)
        while not self._known(index):
            self._wait()
            if not self._known(index):
                self._start()
        failures = [path.read_text() for path in self._files(index, "txt") if path.exists()]
        if failures:
            raise RuntimeError(min(failures, key=_is_an_echo))
        mine, theirs = (torch.load(path, weights_only=False) for path in self._files(index, "pt"))
        return mine, theirs

    def stop(self) -> None:
        """End the processes, whatever they do."""
        for process in self._processes:
            process.kill()
            process.wait()
        self._processes = []

    def _files(self, index: int, kind: str) -> list[Path]:
        return [self.folder / f"{index}_{rank}.{kind}" for rank in range(2)]

    def _known(self, index: int) -> bool:
        learned = all(path.exists() for path in self._files(index, "pt"))
        return learned or any(path.exists() for path in self._files(index, "txt"))

    def _start(self) -> None:
        """With everything that is not known yet."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        self._round = [index for index in range(len(self.names)) if not self._known(index)]
        todo = {index: self.names[index] for index in self._round}
        task = json.dumps({"subjects": todo, "arguments": self.arguments})
        for rank in range(2):
            environment = {
                **os.environ,
                "LOCAL_RANK": str(rank),  # so that Lightning starts no processes itself
                "NODE_RANK": "0",
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
                "OMP_NUM_THREADS": "1",
                "CUDA_VISIBLE_DEVICES": "",
                "PYTHONPATH": os.pathsep.join(os.path.abspath(place) for place in sys.path),
            }
            for name in ("RANK", "WORLD_SIZE", "GROUP_RANK", "TORCHELASTIC_RUN_ID"):
                environment.pop(name, None)
            command = [sys.executable, "-m", __name__, str(rank), task]
            with (self.folder / f"{rank}.log").open("wb") as log:
                self._processes.append(
                    subprocess.Popen(
                        command,
                        cwd=self.folder,
                        env=environment,
                        stdin=subprocess.DEVNULL,
                        stdout=log,
                        stderr=subprocess.STDOUT,
                    )
                )

    def _wait(self) -> None:
        """Until they have ended; what they left undone without a word is a failure."""
        patience = PATIENCE.total_seconds() * (1 + len(self.names))
        said = ""
        for process in self._processes:
            try:
                process.wait(patience)
            except subprocess.TimeoutExpired:
                said = f"no end after {patience:.0f} s"
        self.stop()
        undone = [index for index in self._round if not self._known(index)]
        failed = [i for i in self._round if any(path.exists() for path in self._files(i, "txt"))]
        if undone and not failed:
            logs = [(self.folder / f"{rank}.log").read_text(errors="replace") for rank in range(2)]
            self._files(undone[0], "txt")[0].write_text("\n".join([said, *logs])[-3000:])


def _is_an_echo(failure: str) -> bool:
    """Whether a process only says that the other has gone."""
    return "gloo" in failure.splitlines()[-1]


def work(rank: int, folder: Path, task: Mapping[str, Any]) -> None:
    """Fit every subject beside the other process, and write what was learned.

    Args:
        rank: of this process.
        folder: to write to: ``<number>_<rank>.pt``, or ``.txt`` with a traceback.
        task: the names of ``subjects`` by their number, and the ``arguments`` of strategies.
    """
    for index, name in task["subjects"].items():
        try:
            names = name.split("+")
            arguments = {part: task["arguments"].get(part, {}) for part in names}
            (subject,) = read_subjects([name], arguments)
            together = DDPStrategy(process_group_backend="gloo", timeout=PATIENCE)
            run = fit(subject.make(), setting(devices=2, strategy=together))
            torch.save(run.learned(), folder / f"{index}_{rank}.part")
            (folder / f"{index}_{rank}.part").rename(folder / f"{index}_{rank}.pt")
        except BaseException:
            (folder / f"{index}_{rank}.txt").write_text(traceback.format_exc())
            raise


if __name__ == "__main__":
    work(int(sys.argv[1]), Path.cwd(), json.loads(sys.argv[2]))
