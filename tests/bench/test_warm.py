"""Cells that are forked from a process that has imported everything are what they are without it."""

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event

import pytest
from waiting import PATIENCE

from bpn_lightning.bench.runner import BPN_FIT, LOST, on_this_machine
from bpn_lightning.bench.warm import WarmProcesses

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="cells are forked on Linux only"),
]

SHORT = [BPN_FIT, "--config", "digits_inc.yaml", "--data.init_args.epochs_per_task", "1"]
RUN = Path("digits_inc", "bd+ewc", "seed_0")

# A stream of one's own that does what the test asks for.
MINE = '''
import atexit, os, sys
from bpn_lightning.datamodules import SplitDigits

class Mine(SplitDigits):
    """Digits."""

    def __init__(self, what: str = ""):
        super().__init__(epochs_per_task=1)
        print(os.getppid(), sys.argv[0], sys.modules["__main__"].__spec__, file=sys.stderr)
        atexit.register(print, "the end")
        if what == "dies":
            os.kill(os.getpid(), 9)
        if what == "leaves":
            sys.exit("no more")
'''


@pytest.fixture(scope="module")
def warm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WarmProcesses]:
    """All tests stand in one folder, where the process that they share does."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("warm"))
        Path("mine.py").write_text(MINE)
        with WarmProcesses() as found:
            yield found


def mine(what: str, *more: str) -> list[str]:
    line = [BPN_FIT, "--config", "digits_inc.yaml", "--method", "finetune", "--trust"]
    return [
        *line,
        "--data",
        "mine.Mine",
        "--data.init_args.what",
        what,
        "--experiment",
        what,
        *more,
    ]


def written(root: str) -> dict[str, str]:
    """What a run wrote, but for what differs between any two runs."""
    found = {}
    for path in sorted(Path(root, RUN).rglob("*")):
        if path.suffix in (".csv", ".json", ".yaml", ".svg"):
            text = path.read_text()
            if path.name == "results.json":
                results = json.loads(text)
                for key in ("seconds", "date"):
                    results["provenance"].pop(key)
                text = json.dumps(results)
            found[str(path.relative_to(root))] = text.replace(root, "ROOT")
    return found


def test_a_cell_writes_what_it_writes_as_a_command(warm: WarmProcesses) -> None:
    log = Path("log.txt")
    for number in range(2):  # the second one finds what the first left in the process
        assert warm([*SHORT, "--runs", f"warm{number}"], log, Event()) == 0
    assert on_this_machine([*SHORT, "--runs", "cold"], Path("cold.txt"), Event()) == 0
    assert written("warm0") == written("warm1") == written("cold")
    assert len(written("cold")) >= 5
    assert log.read_text().replace("warm0", "cold").startswith(Path("cold.txt").read_text())


def test_cells_have_their_own_ends_and_share_the_imports(warm: WarmProcesses) -> None:
    def run(what: str) -> tuple[int, str]:
        return warm(mine(what), Path(f"{what}.txt"), Event()), Path(f"{what}.txt").read_text()

    (died, first), (left, second), (done, third) = run("dies"), run("leaves"), run("goes_on")
    assert (died, left, done) == (-signal.SIGKILL, 1, 0)
    assert second.endswith("no more\nthe end\n")
    assert third.endswith("the end\n")
    said = {text.splitlines()[1] for text in (first, second, third)}
    assert len(said) == 1
    parent, program, spec = said.pop().split()
    assert parent != str(os.getpid())
    assert Path(program).name in ("bpn-fit", "main.py")
    assert spec == "None"  # else Lightning starts its other processes by it
    assert (
        os.environ.get("OMP_NUM_THREADS", "1")
        == json.loads(Path("runs/goes_on/finetune/seed_0/results.json").read_text())["provenance"][
            "host"
        ]["threads"].__str__()
    )


@pytest.mark.matrix
def test_two_processes_of_a_cell(warm: WarmProcesses) -> None:
    flags = ["--trainer.devices", "2", "--trainer.strategy", "ddp", "--runs", "two"]
    log = Path("two.txt")
    assert warm([*SHORT, *flags], log, Event()) == 0, log.read_text()
    assert json.loads(Path("two", RUN, "results.json").read_text())["accuracy"]["average"] > 0.5


def wait_for(there: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not there() and time.monotonic() < deadline:
        time.sleep(0.05)


def test_a_cell_that_is_to_stop_can_be_resumed(warm: WarmProcesses) -> None:
    stopped, log = Event(), Path("stopped.txt")
    line = [*SHORT[:-1], "500", "--runs", "stopped"]
    with ThreadPoolExecutor(1) as pool:
        found = pool.submit(warm, line, log, stopped)
        wait_for(Path("stopped", RUN, "checkpoints", "last.ckpt").is_file)
        stopped.set()
        assert found.result() == 128 + signal.SIGTERM, log.read_text()
    assert "--ckpt_path last" in log.read_text()


def test_a_server_that_is_killed_is_replaced_and_none_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    line = [BPN_FIT, "--version"]
    with WarmProcesses() as own:
        assert own(line, Path("log.txt"), Event()) == 0
        (server,) = own._idle
        server.kill()
        server.wait()
        assert own(line, Path("log.txt"), Event()) == LOST
        assert own(line, Path("log.txt"), Event()) == 0
        (server,) = own._idle
        assert server.poll() is None
    assert server.returncode == 0
    assert Path("log.txt").read_text().startswith("bpn-fit ")
