import io
import re
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Callback
from PIL import Image
from rich.console import Console
from rich.text import Text

from bpn_lightning import AccuracyMatrix
from bpn_lightning.cli.main import main
from bpn_lightning.costs import Bytes
from bpn_lightning.run import console
from bpn_lightning.run.console import StreamProgress, final_table, format_task_line
from bpn_lightning.run.scenarios import scenarios
from bpn_lightning.tasks import Task

TASKS = [
    Task(0, (0, 2), ("apple", "aquarium_fish"), 5),
    Task(1, (2, 4), ("[bold]caterpillar", "cattle" * 8), 5),
]


@pytest.fixture
def matrix() -> AccuracyMatrix:
    made = AccuracyMatrix(2)
    made.update(0, [0.5, 0.5])
    made.update(1, [0.9, 0.4])
    made.update(2, [0.6, 0.8])
    return made


def table(matrix: AccuracyMatrix, width: int, **kwargs: object) -> str:
    out = io.StringIO()
    console = Console(file=out, width=width)
    stored = {"measured": 6040, "paper": None, **kwargs}
    final_table(console, "t", TASKS, matrix.summary(), stored, Bytes(1200, 7), Path("runs/t"))  # type: ignore[arg-type]
    return out.getvalue()


def test_the_legend_names_the_scenarios(matrix: AccuracyMatrix) -> None:
    out = io.StringIO()
    final_table(
        Console(file=out, width=200),
        *("t", TASKS, matrix.summary(), {"measured": 6040, "paper": None}),
        Bytes(1200, 7),
        Path("runs/t"),
        scenarios=scenarios("all", task_id_at_inference=True, agnostic=True),
    )
    assert "after the last task, task-incremental, task ID given;" in out.getvalue()
    assert "no task ID: class-incremental, the network has to infer the task" in out.getvalue()


def test_a_learned_task_takes_one_line() -> None:
    assert (
        format_task_line(TASKS, 0, [0.9, 0.4]) == "task 1/2 (apple, aquarium_fish) learned: 0.900"
    )
    assert format_task_line(TASKS, 1, [0.6, 0.8]).endswith(
        "learned: 0.800; first task now 0.600, mean of 2 tasks 0.700"
    )
    assert format_task_line(TASKS, 1, [float("nan"), 0.8]).endswith("learned: 0.800")


def test_the_table_has_the_three_accuracies_side_by_side(matrix: AccuracyMatrix) -> None:
    matrix.update_task_agnostic([0.25, 0.75])
    shown = table(matrix, 80)
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in shown.splitlines()]
    rows = [row for row in cells if len(row) == 5]
    assert rows[0] == ["1", "apple, aquarium_fish", "0.600", "0.900", "0.250"]
    assert rows[1][0] == "2"
    assert rows[1][2:] == ["0.800", "0.800", "0.750"]
    assert rows[2] == ["mean", "", "0.700", "0.850", "0.500"]
    assert "ACC 0.700  BWT -0.300  FWT -0.100  forgetting 0.300  first task 0.600" in shown
    assert "bytes per task: 6,040 measured, - by the paper's accounting" in shown
    assert "bytes held: 1,200 to continue training, 7 of them for inference" in shown
    assert "results: runs/t/results.json" in shown
    assert "pictures: runs/t/figures" in shown


@pytest.mark.parametrize("width", [40, 80, 200])
def test_names_are_shortened_and_never_read_as_markup(matrix: AccuracyMatrix, width: int) -> None:
    shown = table(matrix, width)
    assert "[bold" in shown
    assert max(len(line) for line in shown.splitlines() if "│" in line) <= width


def test_what_was_not_measured_is_a_dash() -> None:
    empty = AccuracyMatrix(2)
    assert "ACC -  BWT -" in table(empty, 80)


@pytest.mark.parametrize("width", [60, 120])
def test_a_terminal_gets_bars_and_leaves_lasting_lines(
    fit: Any, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a clock that goes on by ten seconds in every batch; a task has two epochs of five batches."""
    now = 1000.0
    monkeypatch.setattr(console.time, "monotonic", lambda: now)
    out = io.StringIO()
    progress = StreamProgress(Console(file=out, force_terminal=True, width=width))

    class Clock(Callback):
        def on_train_batch_start(self, *args: Any) -> None:
            nonlocal now
            now += 10
            if progress._bar is not None:
                progress._bar.refresh()  # what the batch before has set

    flags = {"callbacks": [Clock(), progress], "enable_progress_bar": True, "log_every_n_steps": 1}
    fit(trainer=flags)
    shown = [Text.from_ansi(line).plain.strip() for line in re.split(r"[\r\n]+", out.getvalue())]
    assert max(map(len, shown)) <= width
    assert "task 2/2 (2, 3) learned: " in " ".join(shown)
    train = "training accuracy" if width == 120 else "train"
    (task,) = {line for line in shown if re.match("task 2/2, epoch 1/2 .* batch 3/5", line)}
    assert re.search(rf"batch 3/5, {train} [01]\.\d\d$", task)
    # 13 of 20 batches, 10 seconds each.
    (stream,) = {line for line in shown if "2:10 elapsed" in line}
    assert re.match("stream, epoch 3/4 .* 2:10 elapsed, 1:10 left", stream)
    assert ("ACC 0" in stream or "ACC 1" in stream) == (width == 120)


def test_what_is_no_terminal_gets_whole_lines(matrix: AccuracyMatrix) -> None:
    assert any(len(line) > 60 for line in table(matrix, 60).splitlines())


@pytest.mark.slow
def test_a_file_gets_the_lines_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = (
        f"--config digits_inc --trainer.accelerator cpu --data.epochs_per_task 1 --runs {tmp_path}"
    )
    assert main(line.split()) == 0
    shown = capsys.readouterr()
    lines = shown.out.splitlines()
    assert [line.partition(" learned")[0] for line in lines[:5]] == [
        f"task {k + 1}/5 ({2 * k}, {2 * k + 1})" for k in range(5)
    ]
    assert "\x1b" not in shown.out
    assert shown.err == ""
    pictures = tmp_path / "digits_inc" / "bd+ewc" / "seed_0" / "figures"
    with Image.open(pictures / "accuracy_matrix.png") as picture:
        assert min(picture.size) > 100
