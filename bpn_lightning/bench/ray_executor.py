"""Runs the cells of a grid on a Ray cluster; Ray is imported where it is used.

A cell is the process that it is on one machine: same program, same flags, same folder of runs, which
every node therefore has to see under the same path.
"""

import ctypes
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from threading import Event
from typing import Any

from bpn_lightning.bench.runner import LOST, start
from bpn_lightning.errors import ConfigurationError

__all__ = ["OnRay", "on_ray"]

_POLL = 0.2  # seconds
_PATIENCE = 30.0  # seconds that a process gets to end by itself
_OBJECT_STORE = 100 * 2**20  # bytes; a cell sends a number
_PACKAGES = ("bpn_lightning", "torch", "lightning")
_PR_SET_PDEATHSIG = 1


@contextmanager
def on_ray(root: Path, address: str | None = None, gpus: float = 0) -> Iterator["OnRay"]:
    """Connect to a cluster and check that its nodes can do what this machine does.

    Args:
        root: folder of the grid's runs; made where it is missing.
        address: as ``ray.init`` takes it; by default $RAY_ADDRESS, else a Ray of its own is started on
            this machine, and ended afterwards.
        gpus: of each cell.

    Raises:
        ConfigurationError: Ray is not installed, there is no cluster at the address, none of its nodes
            has the GPUs, or one does not see the folder or has other versions of what decides the
            figures.
    """
    try:
        import ray
    except ImportError as error:
        raise ConfigurationError(
            "Expected the package ray for --executor ray, but it is not installed. "
            "Run `pip install 'bpn_lightning[ray]'`, here and on the nodes."
        ) from error
    address = address or os.environ.get("RAY_ADDRESS") or "local"
    own: dict[str, Any] = {}
    if address == "local":
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        own = {"include_dashboard": False, "object_store_memory": _OBJECT_STORE}
    try:
        ray.init(address, log_to_driver=False, logging_level="ERROR", **own)
    except Exception as error:  # Ray raises a plain one where it does not start in time
        raise ConfigurationError(
            f"Expected a Ray cluster at --address {address}, but got: {' '.join(str(error).split())} "
            "`auto` is the one that runs on this machine; without --address one is started here."
        ) from error
    try:
        _check_nodes(root, gpus)
        yield OnRay(gpus)
    finally:
        ray.shutdown()


class OnRay:
    """The :class:`~bpn_lightning.bench.runner.Executor` that asks a Ray cluster for a core per cell.

    Args:
        gpus: of each cell.
    """

    def __init__(self, gpus: float = 0) -> None:
        self.gpus = gpus

    def __call__(self, line: Sequence[str], log: Path, stopped: Event) -> int:
        """Run a command on some node; see :class:`~bpn_lightning.bench.runner.Executor`."""
        import ray
        from ray.exceptions import RayError, RayTaskError

        # Who runs it again is the runner: it knows how often, and that it is said.
        remote = ray.remote(num_cpus=1, num_gpus=self.gpus, max_retries=0)(_work)
        task = remote.remote(list(line), log.absolute(), Path.cwd(), _passed_on())
        while not ray.wait([task], timeout=_POLL)[0]:
            if stopped.is_set():
                ray.cancel(task, force=False)
                if not ray.wait([task], timeout=_PATIENCE)[0]:
                    ray.cancel(task, force=True)
                return LOST
        try:
            return int(ray.get(task))
        except RayTaskError as error:
            with log.open("a", encoding="utf-8") as file:
                file.write(f"{error}\n")
            return 1
        except RayError:
            return LOST


def _passed_on() -> dict[str, str]:
    """What of this machine's environment holds on the nodes too; the rest is their own."""
    known = ("BPN_DATA", "OMP_NUM_THREADS")
    return {"OMP_NUM_THREADS": "1"} | {k: os.environ[k] for k in known if k in os.environ}


def _work(line: list[str], log: Path, folder: Path, passed_on: Mapping[str, str]) -> int:
    """On a node: what :func:`~bpn_lightning.bench.runner.on_this_machine` does here."""
    environment = {**os.environ, **passed_on}
    process = start(line, log, cwd=folder, env=environment, preexec_fn=_die_with_parent())
    try:
        while True:
            try:
                return process.wait(timeout=_POLL)
            except subprocess.TimeoutExpired:
                pass  # Ray's canceling reaches Python code, and no system call
    except BaseException:
        process.terminate()
        process.wait()
        raise


def _die_with_parent() -> Callable[[], object]:
    """Runs in a new process of Linux, so that it does not outlive a worker that is killed.

    It would go on writing where the next attempt does.
    """
    prctl = ctypes.CDLL(None).prctl
    return lambda: prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _check_nodes(root: Path, gpus: float) -> None:
    """Ask every node that can get a cell, before any does."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    nodes = [
        node
        for node in ray.nodes()
        if node["Alive"]
        and node["Resources"].get("CPU", 0) >= 1
        and node["Resources"].get("GPU", 0) >= gpus
    ]
    if not nodes:
        raise ConfigurationError(
            f"Expected a node with a core and --gpus {gpus:g} for each run, but the cluster has none. "
            "Lower --gpus, or add a node."
        )
    root.mkdir(parents=True, exist_ok=True)
    shared = Path(tempfile.mkdtemp(dir=root.absolute(), prefix=".probe-"))
    try:
        (shared / "here").write_text(shared.name)
        answers = {}
        for node in nodes:
            where = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            probe = ray.remote(num_cpus=0, max_retries=0, scheduling_strategy=where)(_probe)
            answers[node["NodeID"]] = probe.remote(shared, node["NodeID"], Path.cwd())
        for node in nodes:
            _check_answer(node["NodeManagerHostname"], shared / node["NodeID"], answers)
    finally:
        shutil.rmtree(shared, ignore_errors=True)


def _probe(shared: Path, name: str, folder: Path) -> dict[str, str]:
    """On a node: read what the other machine wrote, and write something for it."""
    os.chdir(folder)
    (shared / name).write_text((shared / "here").read_text())
    return _versions()


def _versions() -> dict[str, str]:
    return {"system": sys.platform, **{name: metadata.version(name) for name in _PACKAGES}}


def _check_answer(host: str, file: Path, answers: Mapping[str, Any]) -> None:
    import ray
    from ray.exceptions import RayError

    try:
        theirs = ray.get(answers[file.name])
        seen = file.read_text() == file.parent.name
    except (OSError, RayError) as error:
        theirs, seen = {}, False
        said = str(getattr(error, "cause", None) or error).strip().splitlines()[-1]
    else:
        said = "what it wrote there cannot be read here"
    if not seen:
        raise ConfigurationError(
            f"Expected every node to see {file.parents[1]} and the current folder under the same paths "
            f"as this machine, and to have bpn_lightning installed, but {host} does not: {said}. "
            "Put --runs on a file system that all share, and call bpn-bench from a folder of it."
        )
    mine = _versions() | {"system": "linux"}
    if theirs != mine:
        name = next(name for name in mine if theirs[name] != mine[name])
        raise ConfigurationError(
            f"Expected {name} of every node to be {mine[name]}, so that all cells are comparable, but "
            f"{host} has {theirs[name]}. Install the same environment there."
        )
