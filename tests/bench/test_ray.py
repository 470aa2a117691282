"""A grid on a Ray of this machine is the grid on this machine, whatever happens to a worker."""

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Event
from typing import Any

import pytest
from waiting import PATIENCE

from bpn_lightning.analysis.collection import write_collection
from bpn_lightning.bench import ray_executor
from bpn_lightning.bench.cli import main
from bpn_lightning.bench.collect import collect
from bpn_lightning.bench.grid import read_grid
from bpn_lightning.bench.ray_executor import LOST, OnRay, on_ray
from bpn_lightning.bench.runner import Runner, state
from bpn_lightning.errors import ConfigurationError

pytestmark = pytest.mark.slow

Write = Callable[..., str]

# Kills the process that started it, the worker, and says so if it lives on.
KILLER = """\
import os, signal, sys, time
from pathlib import Path
mark = Path(sys.argv[1])
if not mark.exists():
    mark.write_text("killed")
    os.kill(os.getppid(), signal.SIGKILL)
    time.sleep(2)
    mark.write_text("its process lived on")
os.execv(sys.executable, [sys.executable, *sys.argv[2:]])
"""


@pytest.fixture(scope="module")
def on_this_ray(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OnRay]:
    """One Ray of two workers for the whole file.

    Started elsewhere than here: Ray puts the current folder first on its workers' path, and a folder of
    our package's name in it would take the place of what is installed.
    """
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        with on_ray(folder / "new", "local") as executor:
            yield executor


@pytest.fixture
def everywhere(stand_in: list[str]) -> list[str]:
    """The stand-in, with its places on its line: a node has an environment of its own."""
    places = [f"{name}={os.environ[name]}" for name in ("CALLS", "RESULTS")]
    return ["/usr/bin/env", *places, *stand_in]


def figures(grid: str, runs: Path) -> dict[str, Any]:
    """cells.json without what may differ between equal runs."""
    path = write_collection(collect(read_grid(grid), runs), runs)
    found: dict[str, Any] = json.loads(path.read_text())
    for cell in found["cells"]:
        del cell["results"]["provenance"]
    return found


def test_a_grid_one_of_whose_workers_is_killed_has_the_figures_of_this_machine(
    tmp_path: Path, write_grid: Write, everywhere: list[str], on_this_ray: OnRay
) -> None:
    grid, mark = write_grid(), tmp_path / "mark"
    cells = read_grid(grid).cells
    here, there = tmp_path / "here", tmp_path / "there"
    assert Runner(here, jobs=2, command=everywhere).run(cells) == []
    (tmp_path / "killer.py").write_text(KILLER)
    *before, python, script = everywhere
    killer = [*before, python, str(tmp_path / "killer.py"), str(mark), script]
    assert Runner(there, jobs=2, command=killer, executor=on_this_ray).run(cells) == []
    assert mark.read_text() == "killed"
    logs = [cell.folder(there).joinpath("log.txt").read_text() for cell in cells]
    assert [log for log in logs if log] == ["bpn-bench: killed by signal 9, attempt 1 of 3\n"]
    assert figures(grid, there) == figures(grid, here)
    assert len(figures(grid, there)["cells"]) == 4

    calls = (tmp_path / "calls").read_text()
    assert Runner(there, jobs=2, command=killer, executor=on_this_ray).run(cells) == []
    assert (tmp_path / "calls").read_text() == calls


def test_what_is_always_killed_has_failed_in_the_end(
    tmp_path: Path, write_grid: Write, on_this_ray: OnRay
) -> None:
    cell = read_grid(write_grid()).cells[0]
    suicide = [sys.executable, "-c", "import os; os.kill(os.getppid(), 9)"]
    (failure,) = Runner(tmp_path, command=suicide, executor=on_this_ray).run([cell])
    assert failure.last.splitlines() == [
        f"bpn-bench: killed by signal 9, attempt {attempt} of 3" for attempt in (1, 2, 3)
    ]
    assert state(cell, tmp_path) == "failed"


def test_a_process_gets_one_thread_and_its_status_and_words_come_back(
    tmp_path: Path, on_this_ray: OnRay
) -> None:
    code = "import os, sys; print(os.environ['OMP_NUM_THREADS'], os.getcwd()); sys.exit(7)"
    log = tmp_path / "log"
    assert on_this_ray([sys.executable, "-c", code], log, Event()) == 7
    assert log.read_text() == f"1 {Path.cwd()}\n"


def test_what_cannot_be_started_says_why(tmp_path: Path, on_this_ray: OnRay) -> None:
    log = tmp_path / "log"
    assert on_this_ray([str(tmp_path / "nothing")], log, Event()) == 1
    assert "No such file or directory" in log.read_text()


def test_stopping_ends_the_process_on_its_node(tmp_path: Path, on_this_ray: OnRay) -> None:
    code = "import os, time; print(os.getpid(), flush=True); time.sleep(3600)"
    log = tmp_path / "log"

    class OnceItRuns(Event):
        def is_set(self) -> bool:
            return log.exists() and bool(log.read_text())

    assert on_this_ray([sys.executable, "-c", code], log, OnceItRuns()) == LOST
    process = int(log.read_text())
    end = time.monotonic() + PATIENCE
    while not _gone(process):  # it is once its parent has heard of its end
        assert time.monotonic() < end


def _gone(process: int) -> bool:
    time.sleep(0.1)
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return True
    return False


def test_a_node_that_does_not_see_the_folder_is_named_before_anything_runs(
    tmp_path: Path, on_this_ray: OnRay, monkeypatch: pytest.MonkeyPatch
) -> None:
    def blind(shared: Path, name: str, folder: Path) -> dict[str, str]:
        raise FileNotFoundError(f"No such file or directory: '{shared}'")

    monkeypatch.setattr(ray_executor, "_probe", blind)
    with pytest.raises(
        ConfigurationError, match=r"Expected every node to see .*/runs .*: .*No such"
    ):
        ray_executor._check_nodes(tmp_path / "runs", gpus=0)
    assert list((tmp_path / "runs").iterdir()) == []


def test_a_node_of_other_versions_and_missing_gpus_are_refused(
    tmp_path: Path, on_this_ray: OnRay, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigurationError, match="a core and --gpus 99 for each run"):
        ray_executor._check_nodes(tmp_path, gpus=99)
    mine = ray_executor._versions()
    monkeypatch.setattr(ray_executor, "_versions", lambda: mine | {"torch": "0.1"})
    with pytest.raises(ConfigurationError, match=r"Expected torch of every node to be 0\.1"):
        ray_executor._check_nodes(tmp_path, gpus=0)


def test_an_address_without_a_cluster_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, on_this_ray: OnRay
) -> None:
    def fails(*args: Any, **kwargs: Any) -> None:
        raise TimeoutError("timed out\nduring startup.")

    monkeypatch.setattr("ray.init", fails)
    said = r"^Expected a Ray cluster at --address 1\.2\.3\.4:5, but got: timed out during startup\. `auto`"
    with pytest.raises(ConfigurationError, match=said), on_ray(tmp_path, "1.2.3.4:5"):
        pass


def test_without_ray_one_line_says_how_to_get_it(
    tmp_path: Path,
    write_grid: Write,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    assert main([write_grid(), "--executor", "ray", "--runs", str(tmp_path / "runs")]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "pip install 'bpn_lightning[ray]'" in said
    assert not (tmp_path / "runs").exists()
