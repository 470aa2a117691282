"""Processes of one process group, shared by all tests of a session.

A test hands over a function of its own file, which every rank runs::

    def learn(name): ...

    def test_two_processes_equal_one(ranks):
        first, second = ranks(learn, "ewc")
        assert_close(first, learn("ewc"))

Each process is forked from one that has imported torch and Lightning, and runs one function after another. Lightning finds a
process group that is initialized already, and starts no process and makes no group of its own.
"""

import importlib.util
import io
import multiprocessing
import os
import random
import sys
import traceback
from collections.abc import Callable
from functools import cache
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from commands import IMPORTED
from waiting import PATIENCE

__all__ = ["Ranks"]


class Ranks:
    """A pool of processes, started when they are first asked for.

    Args:
        folder: an empty one, for the files in which the processes of a group find each other.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._calls = 0
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(IMPORTED)
        self._processes: list[Any] = []
        self._ends: list[Connection] = []

    def __call__(self, function: Callable[..., Any], *args: Any, number: int = 2) -> list[Any]:
        """What a function returns in each rank, by rank.

        Args:
            function: on the top level of a test file. It returns tensors, numbers, strings, and
                collections of them.
            args: the function's, of the same kind.
            number: of ranks.

        Raises:
            RuntimeError: it failed in a rank; the rank's traceback. All processes are ended.
        """
        self._start(number)
        self._calls += 1
        group = {"init_method": f"file://{self.folder / str(self._calls)}", "world_size": number}
        place = function.__code__.co_filename, function.__module__, function.__qualname__
        results: dict[Connection, Any] = {}
        try:
            for end in self._ends[:number]:
                end.send((group, place, args))
            while waited_for := [end for end in self._ends[:number] if end not in results]:
                ready = wait(waited_for, PATIENCE)
                if not ready:
                    raise RuntimeError(f"No rank returned within {PATIENCE:.0f} s.")
                for end in ready:
                    results[end] = self._receive(end)
        except BaseException:
            self.stop()
            raise
        return [results[end] for end in self._ends[:number]]

    def stop(self) -> None:
        """End the processes, whatever they do."""
        for process in self._processes:
            process.kill()
            process.join()
        for end in self._ends:
            end.close()
        self._processes, self._ends = [], []

    def _start(self, number: int) -> None:
        for rank in range(len(self._processes), number):
            mine, theirs = self._context.Pipe()
            process = self._context.Process(target=_serve, args=(rank, theirs), daemon=True)
            process.start()
            theirs.close()
            self._processes.append(process)
            self._ends.append(mine)

    def _receive(self, end: Any) -> Any:
        import torch

        rank = self._ends.index(end)
        try:
            failure, result = end.recv(), end.recv_bytes()
        except EOFError:
            self._processes[rank].join()
            code = self._processes[rank].exitcode
            raise RuntimeError(f"Rank {rank} ended with exit code {code}.") from None
        if failure:
            raise RuntimeError(f"In rank {rank}:\n{failure}")
        return torch.load(io.BytesIO(result), weights_only=False)


def _serve(rank: int, end: Any) -> None:
    """Run one function after another, until nobody asks any more."""
    os.environ |= {"LOCAL_RANK": str(rank), "NODE_RANK": "0", "CUDA_VISIBLE_DEVICES": ""}
    import torch
    from lightning.fabric.utilities import registry
    from lightning.pytorch.utilities import rank_zero_only

    rank_zero_only.rank = rank  # Lightning looks at the environment when it is imported
    registry.entry_points = cache(registry.entry_points)  # as in conftest.py

    while True:
        try:
            group, place, args = end.recv()
        except EOFError:
            return
        os.environ.pop("PL_GLOBAL_SEED", None)
        random.seed(0)
        torch.manual_seed(0)
        failure, result = "", io.BytesIO()
        try:
            # Before there is a group: torch binds some defaults to the group of the first import.
            function = _find(*place)
            torch.distributed.init_process_group("gloo", rank=rank, **group)
            torch.save(function(*args), result)
            torch.distributed.barrier()  # no rank leaves while another one still talks to it
        except BaseException:  # noqa: BLE001 (the caller raises it)
            failure = traceback.format_exc()
        end.send(failure)
        end.send_bytes(result.getvalue())
        if not failure:
            torch.distributed.destroy_process_group()


def _find(path: str, module: str, name: str) -> Any:
    """A function of a test file, which no import finds by its name."""
    if module not in sys.modules:
        spec = importlib.util.spec_from_file_location(module, path)
        assert spec is not None
        assert spec.loader is not None
        sys.modules[module] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[module])
    return getattr(sys.modules[module], name)
