"""The command from outside: what it prints, what it refuses, and how it ends."""

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest

from bpn_lightning.bench import cli, runner
from bpn_lightning.bench.cli import main
from bpn_lightning.bench.grid import packaged_grids
from bpn_lightning.bench.tuning import packaged_tunings

Write = Callable[..., str]


def test_help_and_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    assert capsys.readouterr().out.startswith("usage: bpn-bench GRID")
    assert main(["--list"]) == 0
    assert capsys.readouterr().out.split() == [*packaged_grids(), *packaged_tunings()]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (["digits", "--job", "3"], "but got 'job'. Did you mean '--jobs'?"),
        (["digits", "--modle.mask", "task"], "but got 'modle.mask'. Did you mean 'model.'?"),
        (["digits", "--jobs", "0"], "Expected --jobs to be at least 1, but got 0."),
        (["digits", "--executor", "slurm"], "invalid choice: 'slurm' (choose from"),
        (["digits", "--address", "auto"], "Expected --address and --gpus to be given with"),
        (["digits", "--executor", "ray", "--gpus", "-1"], "Expected --gpus to be at least 0"),
        (["digits", "--jobs", "two"], "invalid int value: 'two'"),
        (["digits", "ewc"], "but got 'ewc'"),
        (["digits", "--only", "seed_9"], "but got 'seed_9'. Did you mean 'seed_"),
        (["digits", "--strategies.bd.rank", "3"], "Expected --strategies.bd.rank to be about"),
        (["report"], "Expected report to be followed by one folder, but got nothing."),
        (["report", "nowhere"], "Expected nowhere to hold cells.json"),
        (["collect", "digits", "--model.mask", "task"], "but got '--model.mask'"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_runs(
    line: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(line) == 2
    said = capsys.readouterr().err
    assert said.startswith("bpn-bench: error: ")
    assert message in said
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_grid_is_run_and_its_tables_are_printed(
    tmp_path: Path,
    write_grid: Write,
    stand_in: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(runner, "bpn_fit", lambda: stand_in)
    monkeypatch.setattr(cli, "_executor", lambda *_: nullcontext(runner.on_this_machine))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FAILS", "ewc")
    assert main([write_grid()]) == 1
    shown = capsys.readouterr()
    assert "| bd+ewc | 0.400 ± 0.000 |" in shown.out
    assert shown.err.count("no such data") == 2
    monkeypatch.delenv("FAILS")
    assert main([write_grid(), "--retry", "--out", "out"]) == 0
    assert "| ewc | 0.400 ± 0.000 |" in capsys.readouterr().out
    assert Path("runs/bench/two/report/cells.json").is_file()
    assert Path("out/accuracy_digits_inc.svg").is_file()
