"""From finished runs to cells.json, and from it to tables and pictures, without training."""

import csv
import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from scipy import stats

from bpn_lightning.analysis.collection import (
    Collection,
    NotRun,
    read_collection,
    write_collection,
)
from bpn_lightning.analysis.record import RunRecord
from bpn_lightning.analysis.statistics import Interval
from bpn_lightning.analysis.table import Table
from bpn_lightning.bench import sweeps
from bpn_lightning.bench.cli import main
from bpn_lightning.bench.collect import collect
from bpn_lightning.bench.grid import read_grid
from bpn_lightning.bench.report import make, write_report
from bpn_lightning.bench.runner import Runner
from bpn_lightning.bench.tables import accuracy, bytes_per_task, paired_tests
from bpn_lightning.errors import ResultsError
from bpn_lightning.paper import curves, many_tasks, mechanism, tables

Make = Callable[..., RunRecord]


def collection(records: Sequence[RunRecord], **more: Any) -> Collection:
    return replace(Collection("g", "G", "", (), ("accuracy",), (), (), tuple(records)), **more)


@pytest.fixture
def two(record: Make) -> list[RunRecord]:
    """EWC, which forgets task 1, and BD+EWC, which does not; two seeds."""
    return [
        record(method, seed, [[0.9], [first + 0.1 * seed, 0.8]])
        for method, first in (("ewc", 0.0), ("bd+ewc", 0.8))
        for seed in (0, 1)
    ]


def stored(run: RunRecord, measured: int) -> RunRecord:
    return replace(
        run, results={**run.results, "bytes_per_task": {"measured": measured, "paper": 0}}
    )


def test_accuracies_over_bytes_are_in_the_order_of_bytes_and_name_who_is_unbeaten(
    record: Make,
) -> None:
    runs = {"large": (800, 0.7), "none": (0, 0.5), "worse": (900, 0.6), "medium": (40, 0.6)}
    records = [
        stored(record(method, seed, [[0.9], [accuracy + 0.1 * seed, accuracy]]), size)
        for method, (size, accuracy) in runs.items()
        for seed in (0, 1)
    ]
    (artifact,) = bytes_per_task(collection(records))
    assert [row[:2] for row in artifact.table.rows] == [
        ["none", 0],
        ["medium", 40],
        ["large", 800],
        ["worse", 900],
    ]
    means = [row[2].mean for row in artifact.table.rows]  # type: ignore[union-attr]
    assert means == pytest.approx([0.525, 0.625, 0.725, 0.625])
    assert artifact.figure is not None
    (axes,) = artifact.figure.axes
    assert [text.get_text() for text in axes.texts] == ["none", "medium", "large"]
    low, high = axes.get_ylim()
    assert low < 0.525
    assert high > 0.725


def legend(figure: Figure | None) -> list[str]:
    assert figure is not None
    return [text.get_text() for text in figure.legends[0].get_texts()]


def test_a_run_is_kept_small_and_without_the_machines_name(
    tmp_path: Path, write_grid: Callable[..., str], stand_in: list[str]
) -> None:
    grid = read_grid(write_grid())
    Runner(tmp_path / "runs", command=stand_in).run(grid.cells[:3])
    found = collect(grid, tmp_path / "runs")
    assert found.missing == ("digits_inc, bd+ewc, seed 1",)
    assert found.records[0].triangle == [[0.9], [0.4, 0.8]]
    path = write_collection(found, tmp_path / "out")
    assert "secret" not in path.read_text()
    assert read_collection(tmp_path / "out") == found
    assert path.read_text().count("\n") < 20  # one run a line


@pytest.mark.slow
def test_a_report_needs_cells_json_only_and_is_the_same_again(
    tmp_path: Path, write_grid: Callable[..., str], stand_in: list[str]
) -> None:
    grid = read_grid(write_grid())
    Runner(tmp_path / "runs", command=stand_in).run(grid.cells)
    out = tmp_path / "results" / "two"
    assert main(["collect", write_grid(), "--runs", str(tmp_path / "runs"), "--out", str(out)]) == 0
    made = {path.name: path.read_bytes() for path in out.iterdir()}
    for name in ("accuracy_digits_inc", "paired_tests"):
        assert {f"{name}.{form}" for form in ("png", "svg", "csv", "md")} <= set(made)
    for path in out.iterdir():
        if path.name != "cells.json":
            path.unlink()
    assert main(["report", str(tmp_path / "results")]) == 0
    assert {path.name: path.read_bytes() for path in out.iterdir()} == made
    page = (tmp_path / "results.md").read_text()
    assert "## Two methods" in page
    assert "](results/two/accuracy_digits_inc.png)" in page


@pytest.mark.slow
def test_what_only_a_report_has_left_is_not_replaced(
    tmp_path: Path,
    write_grid: Callable[..., str],
    stand_in: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    grid = write_grid()
    Runner(tmp_path / "runs", command=stand_in).run(read_grid(grid).cells)
    out, line = tmp_path / "results" / "two", ["collect", grid, "--runs"]
    kept = ["--out", str(out)]
    assert main([*line, str(tmp_path / "runs"), *kept]) == 0
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    assert main([*line, str(tmp_path / "nowhere"), *kept]) == 2
    said = capsys.readouterr().err
    assert (
        f"Expected the runs of {out / 'cells.json'} to be among those collected now, but 4 of its 4 are "
        "not: digits_inc, ewc, seed 0; digits_inc, ewc, seed 1; digits_inc, bd+ewc, seed 0 and 1 more."
    ) in said
    other = tmp_path / "other.yaml"
    other.write_text(Path(grid).read_text())
    monkeypatch.setattr(Runner, "run", lambda *_: pytest.fail("nothing is trained before that"))
    for command in (["collect", str(other)], [str(other)]):
        assert main([*command, "--runs", str(tmp_path / "runs"), *kept]) == 2
        assert "to be of the grid other, but it is of two. Give another --out." in (
            capsys.readouterr().err
        )
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert main([*line, str(tmp_path / "runs"), *kept]) == 0


@pytest.mark.slow
def test_rows_are_added_to_those_whose_runs_are_gone(
    tmp_path: Path,
    write_grid: Callable[..., str],
    stand_in: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    grid, out = write_grid(), tmp_path / "out"
    cells, line = read_grid(grid).cells, ["collect", grid, "--out", str(out), "--runs"]

    def run(method: str) -> str:
        Runner(tmp_path / method, command=stand_in).run(
            [cell for cell in cells if cell.method == method]
        )
        return str(tmp_path / method)

    assert main([*line, run("bd+ewc")]) == 0
    assert read_collection(out).missing == ("digits_inc, ewc, seed 0", "digits_inc, ewc, seed 1")
    assert main([*line, run("ewc"), "--add"]) == 0
    found = read_collection(out)
    assert [one.name for one in found.records] == [cell.name for cell in cells]
    assert not found.missing
    capsys.readouterr()
    assert main([*line, str(tmp_path / "ewc"), "--add"]) == 2
    said = capsys.readouterr().err
    assert "Expected --add to get rows that" in said
    assert "it has digits_inc, ewc, seed 0" in said


@pytest.mark.slow
def test_added_rows_of_a_varied_key_are_known_by_it(
    tmp_path: Path, write_grid: Callable[..., str], stand_in: list[str]
) -> None:
    varied = "methods: [ewc, bd+ewc]\n    vary: {strategies.ewc.strength: [2, 1]}"
    plain = Path(write_grid()).read_text()
    grid, out = write_grid(plain.replace("methods: [ewc, bd+ewc]", varied)), tmp_path / "out"
    cells = read_grid(grid).cells
    for strength in (1, 2):
        runs = tmp_path / str(strength)
        own = [cell for cell in cells if dict(cell.variant)["strategies.ewc.strength"] == strength]
        Runner(runs, command=stand_in).run(own)
        line = ["collect", grid, "--out", str(out), "--runs", str(runs)]
        assert main([*line, *(["--add"] if strength == 2 else [])]) == 0
    found = read_collection(out)
    assert [(one.setup, one.seed) for one in found.records] == [
        (cell.row, cell.seed) for cell in cells
    ]
    assert not found.missing


def test_the_folder_that_one_is_in_has_a_name(
    tmp_path: Path, two: list[RunRecord], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "v1.2" / "one").mkdir(parents=True)
    write_collection(collection(two), tmp_path / "v1.2" / "one")
    monkeypatch.chdir(tmp_path / "v1.2")
    assert main(["report", "."]) == main(["report", str(tmp_path / "v1.2")]) == 0
    assert (tmp_path / "v1.2.md").is_file()


def test_runs_that_are_missing_and_not_run_are_said(tmp_path: Path, two: list[RunRecord]) -> None:
    one = NotRun("cifar10_inc", ("ewc",), "No images.")
    write_report(collection(two, missing=("a, b, seed 0",), not_run=(one,)), tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert "1 of 5 runs are missing: a, b, seed 0." in text
    assert "Not run: cifar10_inc. No images." in text


def test_a_full_disk_leaves_the_earlier_results(
    tmp_path: Path, two: list[RunRecord], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_collection(collection(two), tmp_path)
    before = path.read_bytes()

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(ResultsError, match="No space left"):
        write_collection(collection(two[:1]), tmp_path)
    with pytest.raises(ResultsError, match="No space left"):
        write_report(collection(two), tmp_path)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "to be what bpn-bench keeps of a grid"),
        ('{"schema_version": 7}', "schema_version of .* to be 2, but got 7"),
        ('{"schema_version": 2, "grid": {}}', "grid.name of .* to be there, but got nothing"),
    ],
)
def test_a_broken_cells_json_is_named(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "cells.json").write_text(text)
    with pytest.raises(ResultsError, match=message):
        read_collection(tmp_path)


def test_a_bad_run_leaves_the_others(
    tmp_path: Path, two: list[RunRecord], capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_collection(collection(two), tmp_path)
    found = json.loads(path.read_text())
    found["cells"][1]["results"]["accuracy"]["average"] = 1e300
    path.write_text(json.dumps(found))
    read = read_collection(path)
    kept = [(record.method, record.seed) for record in read.records]
    assert kept == [("ewc", 0), ("bd+ewc", 0), ("bd+ewc", 1)]
    (why,) = read.left_out
    assert why == (
        f"Run 2 of {path} is left out: it is damaged or made up. ValueError: accuracy.average is 1e+300."
    )
    write_report(read, tmp_path)
    assert why in (tmp_path / "report.md").read_text()
    assert why in capsys.readouterr().err


def test_a_bad_folder_leaves_the_others(
    tmp_path: Path, write_grid: Callable[..., str], stand_in: list[str]
) -> None:
    grid = read_grid(write_grid())
    Runner(tmp_path / "runs", command=stand_in).run(grid.cells)
    path = grid.cells[0].folder(tmp_path / "runs") / "results.json"
    path.write_text(path.read_text().replace('"average": 0.6', '"average": 6e200'))
    found = collect(grid, tmp_path / "runs")
    assert len(found.records) == 3
    (why,) = found.left_out
    assert why.startswith(f"{grid.cells[0].name} is left out. Expected {path} to hold")
    assert why.endswith("accuracy.average is 6e+200.")


def test_the_accuracy_table_has_means_over_seeds(two: list[RunRecord]) -> None:
    (artifact,) = accuracy(collection(two))
    ewc, bd = artifact.table.rows
    assert ewc[0] == "ewc"
    first, average = bd[1], bd[2]
    assert isinstance(first, Interval)
    assert isinstance(average, Interval)
    assert (first.mean, average.mean) == pytest.approx((0.85, 0.825))
    assert first.half == pytest.approx(stats.t.ppf(0.975, 1) * stats.sem([0.8, 0.9]))
    assert legend(artifact.figure) == ["ACC, task ID given", "ACC, task ID not given"]


@pytest.fixture
def recorded(record: Make) -> list[RunRecord]:
    """The same as runs of this release record it."""
    return [
        record(method, seed, [[0.9], [0.5 + 0.1 * seed, 0.8]], recorded={})
        for method in ("ewc", "bd+ewc")
        for seed in (0, 1)
    ]


def test_accuracies_stand_beside_test_samples_classes_and_scenarios(
    recorded: list[RunRecord],
) -> None:
    table, classes = accuracy(collection(recorded))
    rows = dict(zip(table.table.columns, table.table.rows[0], strict=True))
    assert rows["ACC, class-incremental, task ID not given"] == Interval(0.3, 0.0, 2)
    assert rows["balanced, task-incremental, task ID given"] == Interval(0.5, 0.0, 2)
    assert rows["test samples"] == 8
    assert (
        "With 8 test samples, the binomial 95 % interval of an ACC is up to ± 0.2" in table.caption
    )
    given = "ACC, task-incremental, task ID given"
    mean = Interval(0.0, 0.0, 2)
    assert classes.table.rows[0] == ["ewc", given, 4, "cat", mean, "ant", Interval(1.0, 0.0, 2)]
    assert classes.data is not None
    assert len(classes.data.rows) == 2 * 2 * 4


def test_every_table_says_what_it_lacks(
    tmp_path: Path, two: list[RunRecord], recorded: list[RunRecord]
) -> None:
    pair = {"compare": (("bd+ewc", "ewc"),), "report": ("accuracy", "paired_tests")}
    write_report(collection(recorded, **pair), tmp_path / "new")
    text = (tmp_path / "new" / "report.md").read_text()
    lacks = (
        "Not comparable: fewer than 5 seeds (2); no lower bound (finetune); no upper bound (joint or stl); no "
        "row without training (ncm or slda)."
    )
    assert text.count(lacks) == 2  # of accuracies and of tests
    assert text.count("Scenarios: task-incremental, task ID given; class-incremental") == 2
    assert "Small tests: with 8 test samples" in text
    write_report(collection(two, **pair), tmp_path / "old")
    text = (tmp_path / "old" / "report.md").read_text()
    assert text.count("not recorded: scenario, class order, tuning, updates, test samples") == 2


def test_what_was_recorded_is_kept(tmp_path: Path, recorded: list[RunRecord]) -> None:
    write_collection(collection(recorded), tmp_path)
    for one, read in zip(recorded, read_collection(tmp_path).records, strict=True):
        for key in ("conditions", "by_class", "validation"):
            assert read.at(key) == one.at(key) is not None


@pytest.mark.parametrize(
    "change",
    [
        {"conditions": {"order": "sead"}},
        {"conditions": {"updates": -1}},
        {"conditions": {"scenarios": {"accuracy": {"name": "x", "task_id_given": True}}}},
        {"by_class": {"accuracy": {"samples": [1]}}},
        {"by_class": {"accuracy": {"per_class": [1.5, 0.0, 0.0, 0.0]}}},
        {"by_class": {"accuracy": {"samples_per_task": [1]}}},
    ],
)
def test_conditions_that_no_run_has_leave_the_others(
    tmp_path: Path, recorded: list[RunRecord], change: dict[str, dict[str, Any]]
) -> None:
    path = write_collection(collection(recorded), tmp_path)
    found = json.loads(path.read_text())
    for key, parts in change.items():
        for name, values in parts.items():
            one = found["cells"][1]["results"][key]
            one[name] = one[name] | values if isinstance(values, dict) else values
    path.write_text(json.dumps(found))
    assert len(read_collection(path).records) == 3


def test_runs_of_earlier_releases_are_known_by_their_settings(
    tmp_path: Path, write_grid: Callable[..., str], stand_in: list[str]
) -> None:
    grid = read_grid(write_grid())
    Runner(tmp_path / "runs", command=stand_in).run(grid.cells)
    for cell in grid.cells:
        config = "model: {mask: shared}\ndata: {init_args: {class_order_seed: stream}}\n"
        (cell.folder(tmp_path / "runs") / "config.yaml").write_text(config)
    for one in collect(grid, tmp_path / "runs").records:
        assert one.at("conditions", "order") == "seed"
        assert one.at("conditions", "scenarios", "accuracy", "name") == "domain-incremental"
        assert one.at("conditions", "updates") is None


def test_the_share_of_the_order_is_printed_where_the_design_tells(record: Make) -> None:
    key = "data.init_args.class_order_seed"
    values = {
        None: (0.5, 0.6, 0.7),
        "stream": (0.4, 0.6, 0.8),
        0: (0.2, 0.5, 0.5),
        1: (0.6, 0.7, 0.8),
    }
    runs = [
        record("ewc", seed, [[value]], variant={key: order})
        for order, of_order in values.items()
        for seed, value in enumerate(of_order)
    ]
    (artifact,) = [one for one in make(collection(runs)) if one.name == "order_digits_inc"]
    drawn, crossed = (row for row in artifact.table.rows if row[1] == "ACC, task ID given")
    assert drawn[0] == "ewc"
    assert drawn[2] == pytest.approx(0.75)  # variances .01 and .04
    assert drawn[4] == "3 seeds of one order, 3 of drawn ones"
    assert crossed[4] == "3 seeds x 3 orders"
    assert [one.name for one in make(collection(runs[:3]))] == ["accuracy_digits_inc"]


def test_table_1_has_ours_beside_the_papers(record: Make) -> None:
    run = record("bd+ewc", 0, [[0.9], [0.85, 0.8]], experiment="cifar100_inc")
    reason = NotRun("cifar10_inc", ("bd+ewc",), "No images.")
    (artifact,) = tables.table_1(collection([run], not_run=(reason,)))
    rows = {(str(row[0]), str(row[1])): row for row in artifact.table.rows}
    ours = rows["cifar100_inc", "bd+ewc"]
    assert ours[2:4] == [Interval(0.85, None, 1), 0.845]
    assert ours[6:] == [552, 520, 4808]
    assert rows["cifar10_inc", "bd+ewc"][2:4] == ["No images.", 0.795]
    assert rows["cifar100_inc", "gem_10"][2:4] == ["not run", "about 0.69"]
    assert not [place for place, _ in rows if place == "mnist_inc"]


def test_table_2_without_runs_is_the_papers() -> None:
    (artifact,) = tables.table_2(collection([]))
    assert len(artifact.table.rows) == 10
    assert artifact.table.rows[-1] == ["bd+psp", "paper", *artifact.table.rows[-1][2:10], 58.87]


def test_paired_tests_are_scipys(record: Make) -> None:
    ours, theirs = [0.9, 0.8, 0.7], [0.6, 0.7, 0.3]
    runs = [record("bd", seed, [[value]]) for seed, value in enumerate(ours)]
    runs += [record("ewc", seed, [[value]]) for seed, value in enumerate(theirs)]
    (artifact,) = paired_tests(collection(runs, compare=(("bd", "ewc"),)))
    row = artifact.table.rows[0]
    expected = stats.ttest_rel(ours, theirs).pvalue
    assert row[1:3] == ["bd - ewc", "ACC, task ID given"]
    assert row[5:] == [f"{expected:.3f}", f"{2 * expected:.3f}"]  # two tests: ACC and task 1


def test_figure_6_follows_each_task_from_where_it_begins(record: Make) -> None:
    curve = [
        {"epoch": epoch, "task": task, "accuracy": values}
        for epoch, task, values in (
            (0, 0, [0.1, 0.2]),
            (1, 0, [0.5, None]),
            (2, 0, [0.9, None]),
            (3, 1, [0.7, 0.6]),
            (4, 1, [0.4, 0.8]),
        )
    ]
    run = record("ewc", 0, [[0.9], [0.4, 0.8]], curve=curve)
    assert curves.over_epochs(run, 0) == [(1, 0.5), (2, 0.9), (3, 0.7), (4, 0.4)]
    assert curves.over_epochs(run, 1) == [(3, 0.6), (4, 0.8)]
    plain = record("ewc", 0, [[0.9], [0.4, 0.8]])  # measured after tasks of two epochs only
    assert curves.over_epochs(plain, 0) == [(2, 0.9), (4, 0.4)]
    over_epochs, first_task = curves.figure_6(collection([run]))
    assert [axes.get_title() for axes in over_epochs.figure.axes] == ["task 1", "task 2"]  # type: ignore[union-attr]
    assert first_task.table.rows == [["ewc", Interval(0.9, None, 1), Interval(0.4, None, 1)]]


def test_figure_7_averages_groups_and_tests(record: Make) -> None:
    tasks = 20

    def matrix(shift: float) -> list[list[float]]:
        return [
            [shift + 0.01 * (j % 10) + 0.001 * (tasks - 1 - k) for j in range(k + 1)]
            for k in range(tasks)
        ]

    steep = [  # worse on the later tasks, and before the last task
        [value - 0.2 * (j >= 10) - 0.01 * (tasks - len(row)) for j, value in enumerate(row)]
        for row in matrix(0.5)
    ]
    runs = [record("bd+psp", 0, matrix(0.6)), record("psp", 0, steep)]
    pair = (("bd+psp", "psp"),)
    so_far, grouped, tests = many_tasks.figure_7(collection(runs, compare=pair))
    assert "+44.94 % relative, +20.00 points (the paper: 30.14 %" in so_far.caption
    assert [row[0] for row in grouped.table.rows] == ["bd+psp", "psp"]
    assert grouped.table.rows[0][1].mean == pytest.approx(0.645)  # type: ignore[union-attr]
    ours, theirs = (matrix(shift)[-1][:10] for shift in (0.6, 0.5))
    first = tests.table.rows[0]
    assert first[:2] == ["bd+psp - psp", "1-10"]
    assert first[2] == pytest.approx(0.1)
    p = stats.ttest_ind(ours, theirs).pvalue
    assert first[3] == ("< 0.001" if p < 0.001 else f"{p:.3f}")


def test_sweeps_and_gains_over_a_varied_key(record: Make) -> None:
    key = "model.optimizer.init_args.lr"
    runs = [
        record(method, seed, [[value + 0.01 * seed]], variant={key: lr}, recorded={})
        for method, values in (("bd+psp", (0.6, 0.8)), ("psp", (0.3, 0.75)))
        for lr, value in zip((0.001, 0.01), values, strict=True)
        for seed in (0, 1)
    ]
    (sweep,) = sweeps.sweeps(collection(runs))
    assert [row[:2] for row in sweep.table.rows] == [
        ["bd+psp", "0.001"], ["bd+psp", "0.01"], ["psp", "0.001"], ["psp", "0.01"],
    ]  # fmt: skip
    # Held-out samples choose the rate that the test set does not.
    for one in runs:
        slow = one.variant[key] == 0.001
        one.results["validation"]["average"] = 0.9 if slow == (one.method == "bd+psp") else 0.8
    (sweep,) = sweeps.sweeps(collection(runs))
    assert sweep.table.columns[-2:] == ("ACC, held-out samples", "chosen")
    assert [row[-1] for row in sweep.table.rows] == ["yes", None, None, "yes"]
    (gain,) = sweeps.gains(collection(runs, compare=(("bd+psp", "psp"),)))
    assert [row[0] for row in gain.table.rows] == ["0.001", "0.01", "each at its chosen value"]
    difference = gain.table.rows[0][3]
    assert isinstance(difference, Interval)
    assert difference.mean == pytest.approx(0.3)
    assert gain.table.rows[0][4] == pytest.approx(100 * (0.605 / 0.305 - 1))
    assert gain.table.rows[2][4] == pytest.approx(100 * (0.605 / 0.755 - 1))
    assert legend(gain.figure) == ["bd+psp", "psp", "psp, at its chosen value"]
    for one in runs[:2]:  # both seeds of one value
        del one.results["validation"]  # type: ignore[attr-defined]
    (gain,) = sweeps.gains(collection(runs, compare=(("bd+psp", "psp"),)))
    assert [row[0] for row in gain.table.rows] == ["0.001", "0.01"]
    assert "held nothing out" in gain.caption
    assert legend(gain.figure) == ["bd+psp", "psp"]


def test_words_in_place_of_numbers_are_rows(record: Make) -> None:
    key = "strategies.psp.keys"
    runs = [record("psp", 0, [[0.5]], variant={key: kind}) for kind in ("binary", "complex")]
    (sweep,) = sweeps.sweeps(collection(runs))
    assert [row[1] for row in sweep.table.rows] == ["binary", "complex"]


def test_parameters_are_those_of_a_real_network() -> None:
    (artifact,) = tables.parameters(collection([]))
    sizes = [784, *[300] * 5, 2]
    layers = [torch.nn.Linear(n, m) for n, m in itertools.pairwise(sizes)]
    count = sum(p.numel() for layer in layers for p in layer.parameters())
    assert artifact.table.rows[0][1:3] == [count, 1502]  # 5 x 300 + 2
    assert artifact.table.rows[0][3] == pytest.approx(100 * 1502 / count)


def test_drift_and_regions_are_drawn_from_what_probes_saw(record: Make) -> None:
    seen = [
        {
            "layer": {"with": 0.0, "without": 0.4},
            "outputs of task 1": {"with": 0.0, "without": 0.5},
        },
        {
            "layer": {"with": 0.1, "without": 0.8},
            "outputs of task 1": {"with": 0.5, "without": 0.5},
        },
    ]
    run = record("bd+ewc", 0, [[0.9], [0.8, 0.7]], probes={"drift": seen})
    (artifact,) = mechanism.drift(collection([run]))
    assert artifact.table.rows[0][0] == "layer 1"
    assert artifact.table.rows[0][3] == pytest.approx(87.5)
    assert artifact.table.rows[1][3] == pytest.approx(0.0)

    half = [[0.0, 1.0], [0.0, 1.0]]
    points = [[[0, 0, 0], [-1, 0, 1]], [[0, 0, 0], [1, 0, 1]]]
    sides = [-2.0, 2.0, -1.0, 1.0]
    regions = [
        {"sides": sides, "points": points, "maps": [half] * (moment + 1)} for moment in range(2)
    ]
    run = record("bd+ewc", 0, [[0.9], [0.8, 0.7]], probes={"regions": regions})
    (artifact,) = mechanism.figure_5(collection([run]))
    assert artifact.table.rows[0][0] == "BD + EWC"
    assert legend(artifact.figure) == ["black", "red", "light blue"]


def test_csv_has_numbers_and_half_widths() -> None:
    table = Table(("m", "a|b"), [["x", Interval(0.5, 0.25, 3)], ["y", None], ["z", "fails"]])
    rows = list(csv.reader(StringIO(table.csv())))
    assert rows == [["m", "a|b", "a|b, ±"], ["x", "0.5", "0.25"], ["y", "", ""], ["z", "fails", ""]]
    assert table.markdown().splitlines()[0] == r"| m | a\|b |"
    assert table.markdown().splitlines()[2] == "| x | 0.500 ± 0.250 |"


def test_pictures_can_be_read(tmp_path: Path, two: list[RunRecord]) -> None:
    (artifact,) = accuracy(collection(two))
    artifact.write(tmp_path)
    with Image.open(tmp_path / "accuracy_digits_inc.png") as picture:
        assert picture.size[0] > 900
    assert json.dumps(str(artifact.caption))
