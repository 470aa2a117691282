"""`benchmarks/speed.py` runs; what it measures is nobody's promise."""

import subprocess
import sys
from pathlib import Path

BENCHMARK = Path(__file__).parent.parent / "benchmarks" / "speed.py"


def test_everybody_takes_turns_and_the_table_has_a_ratio_for_each() -> None:
    command = [sys.executable, str(BENCHMARK), "--quick", "--only", "tiny"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    rows = [line.split(" | ") for line in done.stdout.splitlines() if line.startswith("| tiny")]
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
