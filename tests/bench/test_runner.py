"""Cells as processes: what is finished stays, what failed is kept and retried, nothing is lost."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import yaml
from waiting import PATIENCE

from bpn_lightning.bench.collect import collect
from bpn_lightning.bench.grid import read_grid
from bpn_lightning.bench.runner import Runner, on_this_machine, state
from bpn_lightning.errors import ResultsError
from bpn_lightning.files.lock import FolderLock

Write = Callable[..., str]


def calls(tmp_path: Path) -> list[str]:
    path = tmp_path / "calls"
    return sorted(path.read_text().splitlines()) if path.exists() else []


def test_every_cell_runs_once_and_is_not_repeated(
    tmp_path: Path, write_grid: Write, stand_in: list[str]
) -> None:
    cells = read_grid(write_grid()).cells
    runner = Runner(tmp_path / "runs", jobs=3, command=stand_in)
    assert runner.run(cells) == []
    assert calls(tmp_path) == ["bd+ewc 0", "bd+ewc 1", "ewc 0", "ewc 1"]
    assert {state(cell, runner.root) for cell in cells} == {"finished"}
    assert runner.run(cells) == []
    assert len(calls(tmp_path)) == 4


def test_a_failed_cell_is_reported_with_its_log_and_run_again_only_on_request(
    tmp_path: Path, write_grid: Write, stand_in: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    cells = read_grid(write_grid()).cells
    monkeypatch.setenv("FAILS", "ewc")
    runner = Runner(tmp_path / "runs", command=stand_in)
    first, second = runner.run(cells)
    assert (first.cell, second.cell) == (cells[0], cells[1])
    assert "no such data" in str(first)
    assert first.log.read_text() == "no such data\n"
    assert json.loads(first.log.with_name("failed.json").read_text())["status"] == 1
    assert [state(cell, runner.root) for cell in cells] == ["failed"] * 2 + ["finished"] * 2

    monkeypatch.delenv("FAILS")
    again = runner.run(cells)
    assert [failure.earlier for failure in again] == [True, True]
    assert "--retry" in str(again[0])
    assert len(calls(tmp_path)) == 4
    assert Runner(tmp_path / "runs", retry=True, command=stand_in).run(cells) == []
    assert len(calls(tmp_path)) == 6
    assert {state(cell, runner.root) for cell in cells} == {"finished"}


def test_two_calls_share_a_grid(
    tmp_path: Path, write_grid: Write, stand_in: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """While the first call runs a cell, a second one comes, and then a third for what it left."""
    cells = read_grid(write_grid()).cells
    root = tmp_path / "runs"

    def others_come(line: Sequence[str], log: Path, stopped: Event) -> int:
        log.write_text("the first call's\n")
        beside = Runner(root, command=stand_in)
        assert beside.run(cells) == []
        assert log.read_text() == "the first call's\n"
        return on_this_machine(line, log, stopped)

    first = Runner(root, command=stand_in, executor=others_come)
    assert first.run(cells) == []
    assert calls(tmp_path) == ["bd+ewc 0", "bd+ewc 1", "ewc 0", "ewc 1"]
    assert not list(root.rglob("failed.json"))
    assert f"left to process {os.getpid()} on " in capsys.readouterr().err


def test_a_cell_that_a_run_of_its_own_holds_has_not_failed(
    tmp_path: Path, write_grid: Write, stand_in: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    cells = read_grid(write_grid()).cells[:1]
    lock = FolderLock(cells[0].folder(tmp_path / "runs"))

    def refused(*_: object) -> int:
        assert lock.acquire() is None  # a bpn-fit, begun by hand just before
        return 2

    runner = Runner(tmp_path / "runs", command=stand_in, executor=refused)
    assert runner.run(cells) == []
    assert Runner(tmp_path / "runs", command=stand_in).run(cells) == []
    lock.release()
    assert calls(tmp_path) == []
    assert [state(cell, runner.root) for cell in cells] == ["open"]


def test_a_cell_whose_process_is_killed_begins_again_three_times_at_most(
    tmp_path: Path, write_grid: Write, stand_in: list[str]
) -> None:
    cells = read_grid(write_grid()).cells[:2]
    lived = []

    def dies_at_first(line: Sequence[str], log: Path, stopped: Event) -> int:
        lived.append(line)
        if cells[0].method in line and line.count("0") and len(lived) < 3:
            log.write_text("so far\n")
            return -signal.SIGKILL
        return on_this_machine(line, log, stopped)

    runner = Runner(tmp_path / "runs", command=stand_in, executor=dies_at_first)
    assert runner.run(cells) == []
    assert lived[0] == lived[1] == lived[2] != lived[3]
    assert "--ckpt_path" in lived[0]
    assert calls(tmp_path) == ["ewc 0", "ewc 1"]

    again = Runner(tmp_path / "lost", command=[*stand_in], executor=lambda *_: -signal.SIGTERM)
    (failure,) = again.run(cells[:1])
    assert json.loads(failure.log.with_name("failed.json").read_text())["status"] == -15
    assert failure.last.splitlines()[-1] == "bpn-bench: killed by signal 15, attempt 3 of 3"


def test_a_run_resumes_and_goes_where_its_variant_lies(tmp_path: Path, write_grid: Write) -> None:
    entry = "{config: digits_inc.yaml, methods: [bd], vary: {strategies.bd.rank: [3]}}"
    (cell,) = read_grid(write_grid(f"experiments: [{entry}]")).cells
    show = [sys.executable, "-c", "import sys; print(*sys.argv[1:])"]
    (failure,) = Runner(tmp_path, command=show, passed_on=["--data.x", "1"]).run([cell])
    words = failure.log.read_text().split()
    assert words[words.index("--runs") + 1] == str(tmp_path / "rank=3")
    assert words[words.index("--ckpt_path") + 1] == "last"
    assert "--strategies.bd.rank=3" in words
    assert words[words.index("--data.x") + 1] == "1"


def test_results_of_another_setting_are_not_taken_for_this_ones(
    tmp_path: Path, write_grid: Write, stand_in: list[str]
) -> None:
    entry = "{config: digits_inc.yaml, methods: [ewc], set: {strategies.ewc.strength: %s}}"
    (cell,) = read_grid(write_grid(f"experiments: [{entry % 5}]")).cells
    Runner(tmp_path, command=stand_in).run([cell])
    config = cell.folder(tmp_path) / "config.yaml"
    config.write_text("strategies: {ewc: {strength: 5.0}}")
    assert state(cell, tmp_path) == "finished"
    config.write_text("strategies: {ewc: {strength: 7}}")
    with pytest.raises(ResultsError, match=r"strategies\.ewc\.strength 5, but got one with 7"):
        state(cell, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("passed_on", "other"),
    [
        (["--data.init_args.num_tasks", "2"], None),
        (["--data.num_tasks=2"], None),
        (["--data.init_args.num_tasks", "5", "--trainer.accelerator", "cpu"], "finished"),
        (["--data.root", "elsewhere", "--model.optimizer", "Adam"], "finished"),
        (["--model.optimizer.lr", "1e-3", "--trainer.precision=16-mixed"], None),
        (["--model.optimizer.lr", "1e-3", "--model.evaluate_every", "epoch"], "finished"),
        (["--model.optimizer", "SGD"], None),
    ],
)
def test_results_of_other_flags_are_not_taken_for_this_calls(
    passed_on: list[str], other: str | None, tmp_path: Path, write_grid: Write, stand_in: list[str]
) -> None:
    cell = read_grid(write_grid()).cells[0]
    Runner(tmp_path, command=stand_in).run([cell])
    (cell.folder(tmp_path) / "config.yaml").write_text(
        "data: {class_path: SplitDigits, init_args: {num_tasks: 5, root: here}}\n"
        "model: {optimizer: {class_path: torch.optim.Adam, init_args: {lr: 0.001}}}\n"
        "trainer: {accelerator: auto, precision: null}\n"
    )
    if other:
        assert state(cell, tmp_path, passed_on) == other
    else:
        with pytest.raises(ResultsError, match="but got one with"):
            state(cell, tmp_path, passed_on)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("index", "config", "said"),
    [
        (
            1,
            {"strategies": {"ewc": {"strength": 7}}},
            "strategies.ewc.strength is 7 here and 5 there",
        ),
        (1, {"data": {"init_args": {"seed": 3, "root": "there"}}}, None),
        (1, {"fronts": {"random": {"seed": 3, "features": 5, "newer": None}}}, None),
        (1, {"fronts": {"random": {"features": 3}}}, "fronts.random.features is 3 here"),
        (2, {"data": {"init_args": {"num_tasks": 2}}}, "data.init_args.num_tasks is 2 here"),
    ],
)
def test_a_table_is_of_one_setting(
    index: int,
    config: dict[str, Any],
    said: str | None,
    tmp_path: Path,
    write_grid: Write,
    stand_in: list[str],
) -> None:
    grid = read_grid(write_grid())
    Runner(tmp_path / "runs", command=stand_in).run(grid.cells)
    base = {
        "strategies": {"ewc": {"strength": 5}},
        "fronts": {"random": {"seed": 0, "features": 5}},
        "data": {"init_args": {"num_tasks": 5}},
    }
    for cell in grid.cells:
        mine = config if cell == grid.cells[index] else {}
        whole = {key: {**value, **mine.get(key, {})} for key, value in base.items()}
        if "data" in mine:
            whole["data"] = {
                "init_args": {**base["data"]["init_args"], **mine["data"]["init_args"]}
            }
        (cell.folder(tmp_path / "runs") / "config.yaml").write_text(yaml.safe_dump(whole))
    if said:
        with pytest.raises(ResultsError, match=said):
            collect(grid, tmp_path / "runs")
    else:
        assert len(collect(grid, tmp_path / "runs").records) == 4


def test_half_a_stream_is_no_finished_cell(
    tmp_path: Path, write_grid: Write, stand_in: list[str]
) -> None:
    cell = read_grid(write_grid()).cells[0]
    cell.folder(tmp_path).mkdir(parents=True)
    path = cell.folder(tmp_path) / "results.json"
    for text in ('{"tasks_not_learned": [1]}', "{", "[]"):
        path.write_text(text)
        assert state(cell, tmp_path) == "open"


def test_ctrl_c_ends_the_processes_and_marks_nothing_as_failed(
    tmp_path: Path, write_grid: Write, stand_in: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HANGS", "ewc")
    code = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler);"
        "import sys; from bpn_lightning.bench.grid import read_grid;"
        "from bpn_lightning.bench.runner import Runner; from pathlib import Path;"
        "Runner(Path(sys.argv[2]), jobs=2, command=sys.argv[3:]).run(read_grid(sys.argv[1]).cells)"
    )
    runs = tmp_path / "runs"
    line = [sys.executable, "-c", code, write_grid(), str(runs), *stand_in]
    with subprocess.Popen(line, stderr=subprocess.PIPE, start_new_session=True) as process:
        deadline = time.monotonic() + PATIENCE
        while "ewc 0" not in calls(tmp_path) and time.monotonic() < deadline:
            assert process.poll() is None, process.communicate()
            time.sleep(0.05)
        os.kill(process.pid, signal.SIGINT)  # not to the group: they have to be told
        process.communicate(timeout=PATIENCE)
    assert process.returncode != 0
    assert not list(runs.rglob("failed.json"))
    assert "ewc 1" not in calls(tmp_path) or len(calls(tmp_path)) < 4
