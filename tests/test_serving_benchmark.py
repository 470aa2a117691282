"""`benchmarks/serving.py` runs; what it measures is nobody's promise, but for bytes."""

import runpy
import sys
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).parent.parent / "benchmarks" / "serving.py"


@pytest.mark.slow
def test_the_table_has_a_row_for_each_and_bytes_are_those_of_the_formula(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    main = runpy.run_path(str(BENCHMARK))["main"]
    monkeypatch.setitem(sys.modules, "peft", None)
    main(["--quick", "--rows", "mixed", "folded", "memory", "disk", "peft"])
    printed = capsys.readouterr().out
    assert "quick: no measurement" in printed
    rows = [line.strip("| ").split(" | ") for line in printed.splitlines() if line[:2] == "| "][1:]
    found = {row[0]: row[2] for row in rows if len(row) > 2}
    assert float(found["mixed batch of 100 tasks, over the plain network"]) > 0
    weights, biases = 784 * 300 + 4 * 300 * 300 + 300 * 10 + 1510, 1510
    for tasks in (1, 10, 100):
        many = "tasks" if tasks > 1 else "task"
        held = float(found[f"weights in memory, {tasks} {many}, MB"])
        assert held == pytest.approx(4e-6 * (weights + tasks * biases), rel=0.05)
    assert "not run: needs peft" in printed
