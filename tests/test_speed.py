"""`benchmarks/speed.py` runs; what it measures is nobody's promise."""

import runpy
import sys
from dataclasses import replace
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).parent.parent / "benchmarks" / "speed.py"


@pytest.mark.slow
def test_everybody_takes_turns_and_the_table_has_a_ratio_for_each(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path])  # the benchmark adds a folder of its own
    benchmark = runpy.run_path(str(BENCHMARK))
    networks = benchmark["NETWORKS"]
    networks["tiny"] = replace(networks["tiny"], samples=100)
    monkeypatch.setattr(sys, "argv", [str(BENCHMARK), "--quick", "--only", "tiny"])
    benchmark["main"]()
    monkeypatch.delitem(sys.modules, "work")
    printed = capsys.readouterr().out
    rows = [line.split(" | ") for line in printed.splitlines() if line.startswith("| tiny")]
    assert [row[1] for row in rows] == [
        "finetune",
        "ewc",
        "bd+psp",
        "evaluation of all tasks",
        "importance pass of ewc",
    ]
    assert all(float(row[3].split()[0]) > 0 for row in rows)
    assert float(rows[0][4].split()[0]) > 0  # Lightning alone
    assert {row[5] for row in rows} == {"- |"}  # Avalanche was not asked
