"""The accuracy table of an experiment: every method, several seeds, one `bpn-fit` run each.

    python benchmarks/accuracy.py digits_inc.yaml
    python benchmarks/accuracy.py cifar100_inc.yaml --data.init_args.root DIR

By default every method that has tuned values for the experiment. Runs that are finished are not
repeated, so a second call prints the table at once; arguments that this script does not know go to
every `bpn-fit`.
"""

import argparse
import statistics
from pathlib import Path
from typing import Any

from grid import Cell, interval, run_all

from bpn_lightning.command import methods_of

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
    parser.add_argument("--methods", nargs="+", help="by default all that are tuned for it")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--runs", default="runs/accuracy")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
    options, passed_on = parser.parse_known_args()

    experiment = Path(options.config).stem
    methods = options.methods or methods_of(experiment)
    flags = ("--config", options.config, *passed_on)
    cells = [Cell(experiment, method, seed, flags) for method in methods for seed in options.seeds]
    results = run_all(cells, options.runs, options.jobs)

    names = [name for name, _ in COLUMNS]
    print(f"{experiment}, seeds {', '.join(map(str, options.seeds))}: mean and 95 % interval\n")
    print(f"| method | {' | '.join(names)} | bytes per task | seconds |")
    print(f"|---|{'---|' * (len(names) + 2)}")
    for method in methods:
        of_method = [results[cell] for cell in cells if cell.method == method]
        row = [interval([_at(result, keys) for result in of_method]) for _, keys in COLUMNS]
        stored = of_method[0]["bytes_per_task"]["measured"]
        seconds = statistics.fmean(result["provenance"]["seconds"] for result in of_method)
        print(f"| {method} | {' | '.join(row)} | {stored:,} | {seconds:.0f} |")


def _at(result: Any, keys: tuple[str, ...]) -> float | None:
    for key in keys:
        result = None if result is None else result[key]
    return result


if __name__ == "__main__":
    main()
