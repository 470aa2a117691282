"""What the page says of gates, against numbers written by hand."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from scipy import stats

from bpn_lightning.analysis.comparison import compare, method_rows
from bpn_lightning.analysis.gates import GateRow, gate_rows
from bpn_lightning.report.page import render
from bpn_lightning.report.pictures import calibration_picture, gates_picture
from bpn_lightning.report.reading import find_runs
from bpn_lightning.report.summary import summarize
from bpn_lightning.report.tables import Number, gates_table

Make = Callable[..., Path]
Gate = Callable[..., dict[str, Any]]

FRONT = {"name": "patches", "bytes": 100}


@pytest.fixture
def two_seeds(make_run: Make, make_gate: Gate, tmp_path: Path) -> Path:
    """A method with two gates, of which one knows no classes."""
    for seed, (own, mixture) in enumerate([(0.75, 0.625), (0.8125, 0.4375)]):
        gates = {"slda": make_gate(own, mixture), "energy": make_gate(None, rejection=None)}
        make_run("psp", seed, gates=gates, front=FRONT)
    return tmp_path / "runs"


def rows(folder: Path) -> list[GateRow]:
    return gate_rows(method_rows(find_runs(folder).runs))


def test_the_table_has_every_number_of_a_gate_over_seeds(two_seeds: Path) -> None:
    table = gates_table("digits_inc", rows(two_seeds))
    slda, energy = (dict(zip(table.columns, row, strict=True)) for row in table.rows)
    assert slda["modes, gate"] == "psp, slda on patches"
    assert slda["gate's own class"] == Number(0.78125, "0.781", "± 0.397")
    gain = slda["gate and modes less own class"]
    assert isinstance(gain, Number)
    assert gain.value == pytest.approx(-0.25)
    half = stats.t.ppf(0.975, 1) * stats.sem([-0.125, -0.375])
    assert gain.spread == f"± {half:.3f}"
    expected = {
        "task accuracy": 0.875,
        "mode of the likeliest task": 0.5,
        "own class, task ID given": 0.9375,
        "calibration error": 0.125,
        "rejection, AUROC": 0.96875,  # only at the moment that has a task still to come
        "bytes per task": 10,
        "bytes shared": 7 + 100,
    }
    for column, value in expected.items():
        cell = slda[column]
        assert isinstance(cell, Number)
        assert cell.value == value, column
    assert energy["gate's own class"] is energy["gate and modes less own class"] is None
    assert table.sortable


def test_pictures_carry_their_values(two_seeds: Path) -> None:
    found = rows(two_seeds)
    over_tasks, calibration = gates_picture("p", found), calibration_picture("p", found)
    assert over_tasks is not None
    assert calibration is not None
    texts = re.findall(r'data-value="([^"]*)"', over_tasks.svg)
    assert texts[1] == (
        "task accuracy after 2 tasks: psp, slda on patches 0.875 ± 0.000; "
        "psp, energy on patches 0.875 ± 0.000"
    )
    assert texts[3] == "gate's own class after 2 tasks: psp, slda on patches 0.781 ± 0.397"
    assert len(texts) == 2 * 3
    assert re.findall(r'data-value="([^"]*)"', calibration.svg)[:2] == [
        "psp, slda on patches: mean probability 0.625, fraction right 0.500, 8 of 32 samples",
        "psp, slda on patches: mean probability 1.000, fraction right 1.000, 24 of 32 samples",
    ]


def test_bins_of_all_seeds_are_counted_together(
    make_run: Make, make_gate: Gate, tmp_path: Path
) -> None:
    for seed, (count, right) in enumerate([(1, 0.0), (3, 1.0)]):
        bins = {
            "error": 0.5 * seed,
            "counts": [count, *[0] * 14],
            "confidence": [0.25 * seed, *[None] * 14],
            "accuracy": [right, *[None] * 14],
        }
        make_run("psp", seed, gates={"slda": make_gate(calibration=bins)})
    (row,) = rows(tmp_path / "runs")
    assert row.calibration() == {
        "error": 0.25,
        "counts": [4, *[0] * 14],
        "confidence": [0.1875, *[None] * 14],
        "accuracy": [0.75, *[None] * 14],
    }


def test_the_words_name_the_best_gate_and_whether_modes_add_something(
    two_seeds: Path, make_run: Make, make_gate: Gate
) -> None:
    for seed, own in enumerate([0.25, 0.26]):
        make_run("psp", seed, parts=",gate=ncm", gates={"ncm": make_gate(own, own + 0.5)})
    found = find_runs(two_seeds)
    words = " ".join(summarize(found, compare(found.runs)).shown)
    assert "gate and modes are right for 0.755 ± 0.064 (psp, ncm)" in words
    assert "own class, without any network, for 0.781 ± 0.397 (psp, slda on patches)" in words
    assert "the interval of the difference included, for 1 of 2 gates: psp, ncm." in words


def test_runs_without_gates_have_no_section(make_run: Make, two_seeds: Path) -> None:
    def page(folder: Path) -> str:
        found = find_runs(folder)
        return render(found, compare(found.runs), "1.0").decode()

    plain = make_run("ewc", root="plain")
    assert 'id="gates"' not in page(plain)
    assert page(two_seeds).count('id="gates"') == 1


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"bytes_held": -1}, "the bytes of gate"),
        ({"task_accuracy": {"average": 2.0, "per_task": []}}, "an accuracy is 2.0"),
        ({"calibration": {"error": 0.0, "counts": [1], "confidence": [1.0], "accuracy": [1.0]}}, "are not 15"),
        ({"calibration": {"error": 0.0, "counts": [0] * 15, "confidence": [1.0] * 15, "accuracy": [1.0] * 15}}, "are not 15"),
        ({"calibration": {"error": 0.0, "counts": [-1] * 15, "confidence": [1.0] * 15, "accuracy": [1.0] * 15}}, "a bin of gate"),
    ],
)  # fmt: skip
def test_a_gate_that_no_run_can_give_is_left_out(
    make_run: Make, make_gate: Gate, changed: dict[str, Any], why: str
) -> None:
    found = find_runs(make_run("psp", gates={"slda": make_gate(**changed)}))
    assert not found.runs
    assert why in found.problems[0].why


def test_a_moment_after_no_task_of_the_stream(make_run: Make, make_gate: Gate) -> None:
    folder = make_run("psp", gates={"slda": make_gate()})
    results = json.loads((folder / "results.json").read_text())
    results["gates"]["slda"]["over_stream"][0]["after"] = 3
    (folder / "results.json").write_text(json.dumps(results))
    assert "is after no task" in find_runs(folder).problems[0].why


def test_names_that_are_cut_alike_stay_apart(make_run: Make, make_gate: Gate) -> None:
    long = "x" * 40
    folder = make_run("psp", gates={f"{long}{n}": make_gate() for n in "ab"})
    drawn = calibration_picture("p", rows(folder))
    assert drawn is not None
    assert drawn.svg.count("data-value") == 4
