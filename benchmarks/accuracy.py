"""The accuracy table of an experiment: every method, several seeds, one `bpn-fit` run each.

    python benchmarks/accuracy.py cifar100_inc.yaml --data.init_args.root DIR

Runs that are finished are not repeated, so a second call prints the table at once; arguments that this
script does not know go to every `bpn-fit`.
"""

import argparse
import os
import shutil
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from scipy import stats

from bpn_lightning.results import read_results

METHODS = (
    "finetune",
    "ewc",
    "ewc_task_mask",
    "frozen+ewc",
    "gd+ewc",
    "gd+ewc_tuned",
    "bd+ewc",
)
COLUMNS = (
    ("task 1 at the end", ("accuracy", "first_task")),
    ("ACC", ("accuracy", "average")),
    ("right after learning", ("accuracy_after_learning", "average")),
    ("ACC without the oracle", ("accuracy_without_oracle", "average")),
)


def main() -> None:
    """Run what is missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config")
    parser.add_argument("--methods", nargs="+", default=METHODS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--runs", default="runs/accuracy")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
    options, passed_on = parser.parse_known_args()

    experiment = Path(options.config).stem
    cells = [(method, seed) for method in options.methods for seed in options.seeds]

    def train(cell: tuple[str, int]) -> Path:
        method, seed = cell
        folder = Path(options.runs) / experiment / method / f"seed_{seed}"
        if not (folder / "results.json").is_file():
            command = [
                *(_bpn_fit(), "--config", options.config, "--method", method),
                *("--seed_everything", str(seed), "--runs", options.runs),
                *("--ckpt_path", "last", "--trainer.enable_progress_bar", "false", *passed_on),
            ]
            run = subprocess.run(
                command,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                capture_output=True,
                text=True,
                check=False,
            )
            if run.returncode:
                sys.exit(f"{' '.join(command)}\n{run.stderr}")
            print(f"{method}, seed {seed}: done", file=sys.stderr, flush=True)
        return folder

    with ThreadPoolExecutor(options.jobs) as pool:
        folders = list(pool.map(train, cells))
    results = {cell: read_results(folder) for cell, folder in zip(cells, folders, strict=True)}

    names = [name for name, _ in COLUMNS]
    print(f"{experiment}, seeds {', '.join(map(str, options.seeds))}: mean and 95 % interval\n")
    print(f"| method | {' | '.join(names)} | bytes per task |")
    print(f"|---|{'---|' * (len(names) + 1)}")
    for method in options.methods:
        of_method = [results[method, seed] for seed in options.seeds]
        row = [interval([_at(result, keys) for result in of_method]) for _, keys in COLUMNS]
        stored = of_method[0]["bytes_per_task"]["measured"]
        print(f"| {method} | {' | '.join(row)} | {stored:,} |")


def interval(values: list[float | None]) -> str:
    """Mean and half width of the 95 % interval of Student's t, or a dash where nothing is measured."""
    numbers = [value for value in values if value is not None]
    if not numbers:
        return "-"
    mean = statistics.fmean(numbers)
    if len(numbers) == 1:
        return f"{mean:.3f}"
    half = stats.t.ppf(0.975, len(numbers) - 1) * statistics.stdev(numbers) / len(numbers) ** 0.5
    return f"{mean:.3f} ± {half:.3f}"


def _at(result: Any, keys: tuple[str, ...]) -> float | None:
    for key in keys:
        result = None if result is None else result[key]
    return result


def _bpn_fit() -> str:
    """The command of the environment that this script runs in."""
    beside = Path(sys.executable).with_name("bpn-fit")
    return str(beside) if beside.exists() else shutil.which("bpn-fit") or "bpn-fit"


if __name__ == "__main__":
    main()
