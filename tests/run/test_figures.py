"""The pictures: what they show, not how they look, and that equal ones are equal files."""

import inspect
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import matplotlib
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from PIL import Image
from torch import Tensor

from bpn_lightning.run.drawing import render, save_figure
from bpn_lightning.run.figures import accuracy_curves, accuracy_heatmap

NAN = float("nan")


def random_matrix(tasks: int) -> Tensor:
    generator = torch.Generator().manual_seed(tasks)
    return torch.rand(tasks + 1, tasks, generator=generator, dtype=torch.float64)


def task_lines(figure: Figure) -> list[Line2D]:
    return [line for line in figure.axes[0].lines if str(line.get_label()).startswith("task ")]


def starts(axes: Axes) -> list[float]:
    """Where the dashed vertical lines stand."""
    vertical = [line for line in axes.lines if len(set(line.get_xdata())) == 1]
    return [line.get_xdata()[0] for line in vertical if len(line.get_xdata()) == 2]


@pytest.mark.parametrize("tasks", [1, 2, 5, 10, 11, 100])
def test_one_line_per_task_from_where_it_starts(tasks: int) -> None:
    matrix = random_matrix(tasks)
    figure = accuracy_curves(matrix, title="a run")
    lines = task_lines(figure)
    assert [line.get_label() for line in lines] == [f"task {k}" for k in range(1, tasks + 1)]
    for task, line in enumerate(lines):
        assert list(line.get_xdata()) == list(range(task, tasks + 1))
        assert list(line.get_ydata()) == matrix[task:, task].tolist()
    axes = figure.axes[0]
    assert axes.get_xlabel() == "tasks learned"
    assert axes.get_xlim() == (0, tasks)
    assert axes.get_ylim() == pytest.approx((-0.03, 1.03))
    assert figure.get_suptitle() == "a run"


@pytest.mark.parametrize(("tasks", "marked"), [(5, range(5)), (100, range(0, 100, 10))])
def test_dashed_lines_say_where_tasks_start(tasks: int, marked: range) -> None:
    axes = accuracy_curves(random_matrix(tasks), epochs_per_task=[2] * tasks).figure.axes[0]
    assert axes.get_xlabel() == "epochs"
    assert starts(axes) == [2 * task for task in marked]
    (top,) = axes.child_axes
    assert [label.get_text() for label in top.get_xticklabels()] == [str(k + 1) for k in marked]


def test_numbers_of_very_short_tasks_do_not_lie_on_each_other() -> None:
    axes = accuracy_curves(random_matrix(3), epochs_per_task=[1, 1, 500]).figure.axes[0]
    assert starts(axes) == [0, 1, 2]
    (top,) = axes.child_axes
    assert [label.get_text() for label in top.get_xticklabels()] == ["1"]


def test_curve_of_every_epoch() -> None:
    matrix = torch.tensor([[0.1, 0.2], [0.6, 0.3], [0.5, 0.8]], dtype=torch.float64)
    curve = [
        {"epoch": 1, "task": 0, "accuracy": [0.4, None]},
        {"epoch": 2, "task": 0, "accuracy": [0.6, 0.3]},
        {"epoch": 3, "task": 1, "accuracy": [0.55, 0.7]},
        {"epoch": 4, "task": 1, "accuracy": [0.5, 0.8]},
    ]
    figure = accuracy_curves(matrix, curve=curve, epochs_per_task=[9, 9])
    first, second = task_lines(figure)
    # The matrix gives the moment before training, which the curve lacks.
    assert list(zip(first.get_xdata(), first.get_ydata(), strict=True)) == [
        (0, 0.1), (1, 0.4), (2, 0.6), (3, 0.55), (4, 0.5),
    ]  # fmt: skip
    assert list(zip(second.get_xdata(), second.get_ydata(), strict=True)) == [
        (2, 0.3), (3, 0.7), (4, 0.8),
    ]  # fmt: skip
    assert starts(figure.axes[0]) == [0, 2]
    assert figure.axes[0].get_xlim() == (0, 4)


def test_many_tasks_come_with_their_mean() -> None:
    matrix = random_matrix(30)
    (mean,) = [line for line in accuracy_curves(matrix).axes[0].lines if line.get_label() == "mean"]
    assert list(mean.get_xdata()) == list(range(1, 31))
    # after task k over tasks 1 to k, as in Fig. 7 of the paper
    expected = [sum(matrix[k, :k].tolist()) / k for k in range(1, 31)]
    assert list(mean.get_ydata()) == pytest.approx(expected)


def test_few_lines_can_be_told_apart_without_color() -> None:
    lines = task_lines(accuracy_curves(random_matrix(10)))
    assert len({(line.get_linestyle(), line.get_marker()) for line in lines}) == 10
    assert len({line.get_marker() for line in lines}) == 10


def test_many_lines_keep_their_order_in_grey() -> None:
    def lightness(line: Line2D) -> float:
        red, green, blue, *_ = matplotlib.colors.to_rgb(line.get_color())
        return 0.299 * red + 0.587 * green + 0.114 * blue

    shades = [lightness(line) for line in task_lines(accuracy_curves(random_matrix(50)))]
    assert shades == sorted(shades)
    assert shades[-1] < 0.8  # still seen on white


@pytest.mark.parametrize("learned", [0, 1, 3])
def test_stream_that_ended_early(learned: int) -> None:
    matrix = random_matrix(5)
    matrix[learned + 1 :] = NAN
    figure = accuracy_curves(matrix, epochs_per_task=[2] * 5)
    assert len(task_lines(figure)) == learned
    assert figure.axes[0].get_xlim() == (0, max(1, 2 * learned))
    render(figure, "png")


def test_unmeasured_moments_leave_gaps_not_zeros() -> None:
    matrix = random_matrix(3)
    matrix[2, 0] = NAN
    matrix[torch.ones(4, 3, dtype=torch.bool).triu()] = NAN
    first, second, _ = task_lines(accuracy_curves(matrix))
    assert list(first.get_xdata()) == [1, 3]
    assert list(second.get_xdata()) == [2, 3]


@pytest.mark.parametrize("tasks", [1, 5, 20])
def test_cells_hold_their_numbers(tasks: int) -> None:
    matrix = random_matrix(tasks)
    axes = accuracy_heatmap(matrix, title="a run").axes[0]
    texts = {text.get_position(): text.get_text() for text in axes.texts}
    assert texts == {
        (task, row): f"{matrix[row, task]:.2f}" for row in range(tasks + 1) for task in range(tasks)
    }
    assert [tick.get_text() for tick in axes.get_yticklabels()] == [
        "before", *(str(k) for k in range(1, tasks + 1)),
    ]  # fmt: skip


def test_large_matrix_has_no_numbers_and_few_ticks() -> None:
    axes = accuracy_heatmap(random_matrix(100)).axes[0]
    assert not axes.texts
    assert [t.get_text() for t in axes.get_xticklabels()] == [str(k) for k in range(10, 101, 10)]
    assert [t.get_text() for t in axes.get_yticklabels()][:2] == ["before", "10"]


def test_heat_map_shows_the_matrix_and_hides_what_was_not_measured() -> None:
    matrix = random_matrix(3)
    matrix[2:] = NAN
    axes = accuracy_heatmap(matrix).axes[0]
    (image,) = axes.images
    shown = image.get_array()
    assert shown.shape == (4, 3)
    assert shown.mask.tolist() == matrix.isnan().tolist()
    assert shown[:2].tolist() == matrix[:2].tolist()
    assert image.get_clim() == (0, 1)
    assert len(axes.texts) == 6
    assert axes.patch.get_hatch()


def test_colors_grow_lighter_with_accuracy_and_text_stands_out() -> None:
    axes = accuracy_heatmap(torch.tensor([[0.0], [1.0]])).axes[0]
    assert [text.get_color() for text in axes.texts] == ["white", "black"]


def test_bfloat16_on_whatever_device_is_drawn() -> None:
    assert task_lines(accuracy_curves(random_matrix(2).bfloat16()))


def draw(folder: Path) -> None:
    matrix = torch.arange(20.0).reshape(5, 4) / 20
    matrix[4] = NAN
    save_figure(accuracy_curves(matrix, title="a_$b$"), folder / "curves")
    save_figure(accuracy_heatmap(matrix, title="a_$b$"), folder / "matrix.of.v1")


DRAW = f"""
import sys
from pathlib import Path
import matplotlib
before = dict.__getitem__(matplotlib.rcParams, "backend")
import torch
from bpn_lightning.run.drawing import save_figure
from bpn_lightning.run.figures import accuracy_curves, accuracy_heatmap
NAN = torch.nan
{inspect.getsource(draw)}
draw(Path(sys.argv[1]))
"""

NO_TRACE = """
assert matplotlib.rcParams["font.size"] == 20, "the user's style"
assert dict.__getitem__(matplotlib.rcParams, "backend") is before, "not asked for yet"
from matplotlib import pyplot
assert pyplot.get_fignums() == []
"""


@pytest.mark.slow
def test_equal_pictures_are_equal_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In another process, on another day, under another style and on a machine with a screen."""
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    there.mkdir()
    draw(here)
    (tmp_path / "matplotlibrc").write_text(
        "font.size: 20\nsvg.hashsalt: salt\nsavefig.transparent: true\n"
    )
    monkeypatch.setenv("MATPLOTLIBRC", str(tmp_path))
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "100000000")
    monkeypatch.setenv("PYTHONHASHSEED", "1")
    monkeypatch.delenv("MPLBACKEND", raising=False)
    subprocess.run([sys.executable, "-c", DRAW + NO_TRACE, str(there)], check=True)
    names = ["curves.png", "curves.svg", "matrix.of.v1.png", "matrix.of.v1.svg"]
    assert sorted(path.name for path in here.iterdir()) == names
    for name in names:
        assert (here / name).read_bytes() == (there / name).read_bytes(), name


@pytest.mark.parametrize("make", [accuracy_curves, accuracy_heatmap])
def test_files_say_nothing_of_their_making(make: Callable[..., Figure], tmp_path: Path) -> None:
    save_figure(make(random_matrix(3)), tmp_path / "a")
    with Image.open(tmp_path / "a.png") as image:
        assert image.text == {"Software": "bpn_lightning"}  # type: ignore[attr-defined]
    svg = (tmp_path / "a.svg").read_text()
    assert matplotlib.__version__ not in svg
    assert "<dc:date>" not in svg


def test_curve_that_lacks_later_tasks() -> None:
    """A matrix may hold more than the curve; nothing is drawn where no one knows the epoch."""
    curve = [{"epoch": k + 1, "task": k, "accuracy": [0.5] * 20} for k in range(12)]
    axes = accuracy_curves(random_matrix(20), curve=curve).axes[0]
    (mean,) = [line for line in axes.lines if line.get_label() == "mean"]
    assert list(mean.get_xdata()) == list(range(1, 13))
