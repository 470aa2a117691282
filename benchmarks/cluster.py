"""Compare a grid run locally with one run on a Ray cluster of two workers, one of which is killed.

    python benchmarks/cluster.py
    python benchmarks/cluster.py --grid digits.yaml --only ewc bd+ewc seed_0

Runs the same cells twice with `bpn-bench`, into two folders. During the second grid, a worker that has
written a checkpoint is killed, and its cell resumes from there. Compares both cells.json except for
provenance, and prints the killed worker and the comparison.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any


def bpn_bench(grid: str, only: list[str], runs: Path, *flags: str) -> "subprocess.Popen[bytes]":
    """Start it, two cells at a time."""
    line = [sys.executable, "-m", "bpn_lightning.bench.cli", grid, "--only", *only]
    line += ["--runs", str(runs), "--jobs", "2", *flags]
    return subprocess.Popen(line, stdout=subprocess.DEVNULL)


def kill_a_worker(runs: Path, bench: "subprocess.Popen[bytes]") -> str:
    """Kill the Ray worker of the first cell that has a checkpoint, and return its description."""
    while bench.poll() is None:
        for checkpoint in runs.rglob("last.ckpt"):
            folder = checkpoint.parents[1]
            for process in Path("/proc").glob("[0-9]*"):
                if (parent := parent_of(process, folder)) is not None:
                    os.kill(parent, signal.SIGKILL)
                    return str(folder.relative_to(runs))
        time.sleep(0.1)
    sys.exit("Expected to kill a worker, but the grid ended before there was a checkpoint.")


def parent_of(process: Path, folder: Path) -> int | None:
    """The parent of a `bpn-fit` process that writes to a folder; None for any other process."""
    try:
        words = (process / "cmdline").read_bytes().decode().split("\0")
        values = dict(pairwise(words))
        own = Path(values["--method"], f"seed_{values['--seed_everything']}")
        if not folder.is_relative_to(values["--runs"]) or folder.parts[-2:] != own.parts:
            return None
        return int((process / "stat").read_text().rpartition(")")[2].split()[1])
    except (OSError, ValueError, KeyError):
        return None


def figures(runs: Path) -> dict[str, Any]:
    """cells.json without the values that may differ between equal runs."""
    found: dict[str, Any] = json.loads((runs / "report" / "cells.json").read_text())
    for cell in found["cells"]:
        del cell["results"]["provenance"]
    return found


def main() -> None:
    """Run both and compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--grid", default="digits.yaml")
    parser.add_argument("--only", nargs="+", default=["ewc", "bd+ewc", "seed_0", "seed_1"])
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as made:
        here, there = Path(made, "local"), Path(made, "ray")
        if bpn_bench(options.grid, options.only, here).wait():
            sys.exit("Expected the grid to complete on this machine, but it did not.")
        bench = bpn_bench(options.grid, options.only, there, "--executor", "ray")
        killed = kill_a_worker(there, bench)
        if bench.wait():
            sys.exit("Expected the grid to complete on Ray, but it did not.")
        expected, found = figures(here), figures(there)
        log = (there / killed / "log.txt").read_text()
        said = [line for line in log.splitlines() if line.startswith("bpn-bench:")]
    print("| cell | ACC, local | ACC, ray | task 1, local | task 1, ray |\n|---|---|---|---|---|")
    for a, b in zip(expected["cells"], found["cells"], strict=True):
        cells = [
            repr(one["results"]["accuracy"][key])
            for key in ("average", "first_task")
            for one in (a, b)
        ]
        print(f"| {a['experiment']}, {a['method']}, seed {a['seed']} | {' | '.join(cells)} |")
    print(f"\nkilled: the worker of {killed}; its log: {'; '.join(said)}")
    print(f"started without a checkpoint: {log.count('this run starts from scratch')} time(s)")
    print(f"cells.json except for provenance: {'equal' if expected == found else 'NOT equal'}")
    sys.exit(expected != found)


if __name__ == "__main__":
    main()
