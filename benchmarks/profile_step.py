"""Profile of a training step: the functions of a run, by the time spent in them.

python benchmarks/profile_step.py
python benchmarks/profile_step.py --network tiny --method ewc --rows 40
"""

import argparse
import cProfile
import pstats
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "contestants"))
import torch
from framework import run
from speed import METHODS, NETWORKS


def main() -> None:
    """Print microseconds per step of the functions that took the most of them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--network", choices=NETWORKS, default="4 x 128")
    parser.add_argument("--method", choices=METHODS, default="finetune")
    parser.add_argument("--tasks", type=int, default=3)
    parser.add_argument("--rows", type=int, default=30)
    parser.add_argument("--sort", choices=["tottime", "cumulative"], default="tottime")
    options = parser.parse_args()
    torch.set_num_threads(1)
    work = replace(NETWORKS[options.network], method=options.method, tasks=options.tasks)
    run(work)
    profiler = cProfile.Profile()
    profiler.runcall(run, work)
    profiler.create_stats()
    stats = pstats.Stats(profiler).strip_dirs().stats  # type: ignore[attr-defined]
    steps = work.tasks * work.timed_steps * work.epochs // (work.epochs - 1)
    key = 2 if options.sort == "tottime" else 3
    print("| own us | with callees us | calls | function |\n|---|---|---|---|")
    for (file, line, name), row in sorted(stats.items(), key=lambda s: -s[1][key])[: options.rows]:
        own, whole, calls = row[2] / steps * 1e6, row[3] / steps * 1e6, row[1] / steps
        print(f"| {own:.1f} | {whole:.1f} | {calls:.2f} | {name} ({file}:{line}) |")


if __name__ == "__main__":
    main()
