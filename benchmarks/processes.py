"""Differences between several processes and one, per method, with shards of unequal size.

    python benchmarks/processes.py                          # 1, 2 and 4 processes, every method
    python benchmarks/processes.py --precision 32-true      # rounding as in practice
    python benchmarks/processes.py --processes 1 2 --methods bd+ewc gem

Three tasks of 288, 288 and 291 digits, in batches of 41 (the last one has a single sample or four) and
consolidated in batches of 287 (likewise), so that some processes have none. Compares the state of a method
at the end and right before the consolidation of each task: weights, M and W, banks, keys, importances, path
integrals, memories, teachers, the multipliers of every projection of GEM, the accuracy matrix. Prints the
largest difference to a single process: absolute, and relative to the largest number of the same tensor. At
the end of every task it is checked that processes agree with each other bit for bit.
"""

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor

from bpn_lightning.conformance.cases import read_cases
from bpn_lightning.conformance.runs import Run, Setting, fit, flatten
from bpn_lightning.strategies import STRATEGIES, gem


@dataclass(frozen=True)
class Method:
    """Strategies with their arguments, and the module's."""

    strategies: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    module: Mapping[str, Any] = field(default_factory=dict)


#: Fewer epochs of what comes before and after a task's own training; memories that are not even.
SHORT: dict[str, Any] = {
    "ebll": {"autoencoder_epochs": 2, "warm_up_epochs": 1},
    "lwf": {"warm_up_epochs": 1},
    "gem": {"memory_size": 7},
    "agem": {"memory_size": 20, "sample_size": 3},
}
MULTI_HEAD = {"mask": "task"}
METHODS = {
    **{name: Method(name, SHORT) for name in STRATEGIES},
    **{
        name: Method(name, SHORT)
        for name in ("bd+ewc", "bd+psp", "bd+si", "bd+mas", "bd+gem", "psp+ewc", "si+lwf")
    },
    "ewc, sampled labels": Method("ewc", {"ewc": {"fisher": "sampled", "gamma": 0.7}}),
    "ewc, multi-head": Method("ewc", {"ewc": {"fisher": "exact"}}, MULTI_HEAD),
    "gem, multi-head": Method("gem", SHORT, MULTI_HEAD),
    "imm, mean": Method("imm", {"imm": {"mode": "mean"}}),
    "joint, multi-head": Method("joint", {}, MULTI_HEAD),
    "ebll, multi-head": Method("ebll", SHORT, MULTI_HEAD),
}


def main() -> None:
    """Fit with every number of processes, then compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--precision", choices=["64-true", "32-true"], default="64-true")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--fit", type=Path, help="used by this script itself: fit and write here")
    flags = parser.parse_args()
    if flags.fit is not None:
        for name in flags.methods:
            _learn(name, flags.processes[0], flags.precision, flags.fit)
        return
    with tempfile.TemporaryDirectory() as folder:
        for number in flags.processes:
            command = [sys.executable, __file__, "--fit", folder, "--processes", str(number)]
            command += ["--precision", flags.precision, "--methods", *flags.methods]
            subprocess.run(command, check=True, stdout=sys.stderr)
        _print_table(Path(folder), flags.methods, flags.processes, flags.precision)


# --- learning ------------------------------------------------------------------------------------


def _learn(name: str, processes: int, precision: str, folder: Path) -> None:
    method = METHODS[name]
    named = {part: method.arguments.get(part, {}) for part in method.strategies.split("+")}
    (case,) = read_cases([method.strategies], named)
    together = DDPStrategy(process_group_backend="gloo") if processes > 1 else "auto"
    setting = Setting(
        stream={"batch_size": 41, "eval_batch_size": 287, "augment": True},
        module={"check_processes": True, **method.module},
        trainer={"devices": processes, "strategy": together, "precision": precision},
    )
    known: dict[str, Any] = {}

    def watch(run: Run) -> None:
        def note(task: int) -> None:
            known[f"before task {task} is closed"] = run.learned()

        run.module.before_close = note

    with _noted_multipliers() as multipliers:
        run = fit(case.make(), setting, watch=watch)
    if run.trainer.global_rank == 0:
        known |= {
            "at the end": run.learned(),
            "multipliers": multipliers,
            "curve": run.module.curve,
        }
        torch.save(flatten(known), folder / f"{name}_{processes}.pt")


@contextmanager
def _noted_multipliers() -> Iterator[list[Tensor]]:
    """Every solution of GEM's quadratic program, in the process that solves them."""
    noted: list[Tensor] = []
    solve = gem.multipliers

    def note(*args: Any) -> Tensor:
        noted.append(solve(*args))
        return noted[-1]

    with patch.object(gem, "multipliers", note):
        yield noted


# --- comparing -----------------------------------------------------------------------------------


def _print_table(folder: Path, methods: list[str], processes: list[int], precision: str) -> None:
    one, *several = processes
    columns = [f"{number} processes: {what}" for number in several for what in ("abs", "rel")]
    print(f"Largest differences to {one} process, {precision}; processes agree bit for bit.\n")
    print(f"| method | numbers | {' | '.join(columns)} | accuracies |")
    print("|---" * (len(columns) + 3) + "|")
    for name in methods:
        alone, *together = (
            torch.load(folder / f"{name}_{number}.pt", weights_only=True) for number in processes
        )
        cells = []
        for found in together:
            cells += [f"{value:.0e}" for value in _largest(found, alone)]
        accuracies = [_largest(_accuracies(found), _accuracies(alone))[0] for found in together]
        numbers = sum(value.numel() for value in alone.values() if isinstance(value, Tensor))
        worst = max(accuracies, default=0.0)
        print(f"| {name} | {numbers:,} | {' | '.join(cells)} | {worst:.0e} |")


def _accuracies(learned: Mapping[str, Any]) -> dict[str, Any]:
    return {path: value for path, value in learned.items() if "accuracy" in path}


def _largest(mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> tuple[float, float]:
    """The largest difference, and the largest one relative to its tensor; infinite where none fits."""
    if mine.keys() != theirs.keys():
        return float("inf"), float("inf")
    absolute, relative = 0.0, 0.0
    for path, value in theirs.items():
        a, b = (torch.as_tensor(_number(one)).double() for one in (mine[path], value))
        if a.shape != b.shape or not torch.equal(a.isnan(), b.isnan()):
            return float("inf"), float("inf")
        if a.numel():
            gap, size = (float(one.abs().nan_to_num(0.0).max()) for one in (a - b, b))
            absolute, relative = max(absolute, gap), max(relative, gap / (size or 1.0))
    return absolute, relative


def _number(value: Any) -> Any:
    """What can be compared by size, else by its hash."""
    if value is None:
        return float("nan")
    return value if isinstance(value, Tensor | int | float) else float(hash(value) % 2**31)


if __name__ == "__main__":
    main()
