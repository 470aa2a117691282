"""Cells of a grid as separate `bpn-fit` runs, several at a time; finished ones are not repeated."""

import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from scipy import stats

from bpn_lightning.results import read_results

__all__ = ["Cell", "interval", "run_all"]


class Cell(NamedTuple):
    """One run: where it stands in the grid, and the flags that make it what it is."""

    experiment: str
    method: str
    seed: int
    flags: tuple[str, ...]


def run_all(cells: Sequence[Cell], runs: str, jobs: int) -> Mapping[Cell, dict[str, Any]]:
    """Run what is missing, one thread each, and read the results of all.

    Raises:
        SystemExit: a run failed; the others are finished first, and kept.
    """
    with ThreadPoolExecutor(jobs) as pool:
        errors = list(pool.map(lambda cell: _run(cell, runs), cells))
    failed = [error for error in errors if error]
    if failed:
        sys.exit("\n\n".join(failed))
    return {cell: read_results(_folder(cell, runs)) for cell in cells}


def interval(values: Sequence[float | None], scale: float = 1.0, digits: int = 3) -> str:
    """Mean and half width of the 95 % interval of Student's t, or a dash where nothing is measured."""
    numbers = [scale * value for value in values if value is not None]
    if not numbers:
        return "-"
    mean = statistics.fmean(numbers)
    if len(numbers) == 1:
        return f"{mean:.{digits}f}"
    half = stats.t.ppf(0.975, len(numbers) - 1) * statistics.stdev(numbers) / len(numbers) ** 0.5
    return f"{mean:.{digits}f} ± {half:.{digits}f}"


def _folder(cell: Cell, runs: str) -> Path:
    return Path(runs) / cell.experiment / cell.method / f"seed_{cell.seed}"


def _run(cell: Cell, runs: str) -> str:
    """Train a cell; the empty string, or what went wrong."""
    if (_folder(cell, runs) / "results.json").is_file():
        return ""
    command = [
        *(_bpn_fit(), "--experiment", cell.experiment, "--method", cell.method),
        *("--seed_everything", str(cell.seed), "--runs", runs, "--ckpt_path", "last"),
        *("--trainer.enable_progress_bar", "false", *cell.flags),
    ]
    run = subprocess.run(
        command,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    outcome = "failed" if run.returncode else "done"
    name = f"{cell.experiment}, {cell.method}, seed {cell.seed}"
    print(f"{name}: {outcome}", file=sys.stderr, flush=True)
    return f"{' '.join(command)}\n{run.stderr}" if run.returncode else ""


def _bpn_fit() -> str:
    """The command of the environment that this script runs in."""
    beside = Path(sys.executable).with_name("bpn-fit")
    return str(beside) if beside.exists() else shutil.which("bpn-fit") or "bpn-fit"
