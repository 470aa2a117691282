"""Check that time and memory per task do not grow over thousands of short tasks.

    python benchmarks/soak.py
    python benchmarks/soak.py --tasks 1000 --methods ewc bd+psp
    python benchmarks/soak.py --continuations 20 --tasks 100 --methods bd+psp

Each method is a separate `bpn-fit`, including all the files that it writes: an MLP of 32 units is trained
on a sequence of permutations of the pixels, with five updates each, of scikit-learn's digits instead of
MNIST. Prints CPU time per task and resident memory at tenths of the stream. One thread.

With `--continuations`, a run is followed by so many that continue from the one before with as many new tasks,
without past data. Each is forked from this process, which has imported torch. Prints CPU time until the first
task, per task and after the last one, also compared with the first continuation; and the sizes of
checkpoints. The exit status is 1 if one differs from its formula.
"""

import argparse
import json
import os
import struct
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from resource import RUSAGE_CHILDREN, getrusage
from statistics import fmean, linear_regression, median
from typing import NamedTuple

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from bpn_lightning.cli.main import main as bpn_fit
from bpn_lightning.costs import tensor_bytes, tensors_in

METHODS = ("finetune", "ewc", "si", "mas", "bd+ewc", "psp", "bd+psp")
UPDATES, BATCH = 5, 32
PIXELS, HIDDEN, CLASSES = 784, 32, 10
UNITS = ("steps", "epochs", "tasks")  # there is one at the end anyway
NOTES = "soak.json"
TENTHS = 10


class Notes(Callback):
    """CPU seconds and resident bytes of this process at the start of each task."""

    def __init__(self) -> None:
        self.notes: list[tuple[float, int]] = []

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A task has one epoch."""
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        self.notes.append((time.process_time(), pages * os.sysconf("SC_PAGE_SIZE")))

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave them in the run's folder."""
        Path(trainer.default_root_dir, NOTES).write_text(json.dumps(self.notes))


def arguments(
    method: str, tasks: int, place: Path, experiment: str, flags: Mapping[str, object]
) -> list[str]:
    """The arguments of `bpn-fit`."""
    chosen = {
        "config": "permuted_mnist.yaml",
        "method": method,
        "experiment": experiment,
        "runs": place,
        "model.backbone.init_args.hidden": [HIDDEN],
        "model.evaluate_on": "current",
        "data.init_args.root": place,
        "data.init_args.num_tasks": tasks,
        "data.init_args.train_samples": UPDATES * BATCH,
        "data.init_args.test_samples": 100,
        "data.init_args.batch_size": BATCH,
        "trainer.accelerator": "cpu",
        "trainer.log_every_n_steps": UPDATES,
        **flags,
        "trainer.callbacks+": f"{Path(__file__).stem}.Notes",
    }
    return [
        "--trust",  # the callback, which a run that goes on has from the run before
        "--quiet",
        *(f"--{key}={value}" for key, value in chosen.items()),
    ]


def folder_of(place: Path, experiment: str, method: str) -> Path:
    """The folder of a run."""
    return place / experiment / method / "seed_0"


def notes_of(folder: Path) -> list[tuple[float, int]]:
    """What a run noted."""
    return [(second, size) for second, size in json.loads((folder / NOTES).read_text())]


def soak(method: str, tasks: int, place: Path) -> tuple[list[float], list[float]]:
    """Run a method on all tasks at once, in a process of its own.

    Returns:
        CPU milliseconds of each task but the last, and MiB at its beginning.
    """
    flags = {"trainer.enable_checkpointing": False}
    line = [
        *(sys.executable, "-m", "bpn_lightning.cli.main"),
        *arguments(method, tasks, place, "whole", flags),
    ]
    paths = [str(Path(__file__).resolve().parent), os.environ.get("PYTHONPATH")]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
    }
    subprocess.run(line, env=environment, check=True)
    seconds, sizes = zip(*notes_of(folder_of(place, "whole", method)), strict=True)
    times = [1000 * (after - before) for before, after in pairwise(seconds)]
    return times, [size / 2**20 for size in sizes[:-1]]


# --- a stream in several runs --------------------------------------------------------------------


class Sizes(NamedTuple):
    """Bytes of a checkpoint.

    Args:
        matrix: of accuracies.
        biases: of the tasks learned.
        keys: of the tasks learned.
        others: of all other tensors, which no task adds to.
        file: what is in it but the tensors.
    """

    matrix: int
    biases: int
    keys: int
    others: int
    file: int


class Run(NamedTuple):
    """One of several runs: CPU seconds until its first task, per task, after its last one; and its sizes."""

    start: float
    task: float
    end: float
    sizes: Sizes


def sizes_of(path: Path) -> Sizes:
    """The bytes of a checkpoint, by the names of its tensors."""
    tree = torch.load(path, weights_only=True)
    state = tree["state_dict"]
    parts = [
        tensor_bytes(value for key, value in state.items() if name in key)
        for name in ("accuracy_matrix.", "bias_units.bank", "keys.bank")
    ]
    whole = tensor_bytes(tensors_in(tree))
    return Sizes(*parts, others=whole - sum(parts), file=path.stat().st_size - whole)


def expected(method: str, tasks: int, others: int) -> tuple[int, ...]:
    """The bytes of a checkpoint's tensors after so many tasks, by formula.

    The matrix has a row before training and one after each task, a row without task IDs, and two of numbers of
    samples, in float64; a task's biases are one number per unit in float32, its keys one sign per input in int8.
    """
    parts = method.split("+")
    biases = 4 * tasks * (HIDDEN + CLASSES) * ("bd" in parts)
    keys = tasks * (PIXELS + HIDDEN) * ("psp" in parts)
    return 8 * tasks * (tasks + 4), biases, keys, others


def fork(line: Sequence[str]) -> float:
    """Run `bpn-fit` in a fork of this process; the CPU seconds that it takes."""
    before = getrusage(RUSAGE_CHILDREN)
    child = os.fork()
    if child == 0:
        status = 1
        try:
            sys.modules.setdefault(Path(__file__).stem, sys.modules[__name__])
            status = bpn_fit(line)
        except BaseException:  # noqa: BLE001  a child reports the error, and ends here
            traceback.print_exc()
        finally:
            os._exit(status)
    if os.waitpid(child, 0)[1]:
        raise SystemExit(f"This run failed: bpn-fit {' '.join(line)}")
    after = getrusage(RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def go_on(method: str, tasks: int, continuations: int, place: Path) -> list[Run]:
    """Run a method on some tasks, and then again and again on as many new ones."""
    flags: dict[str, object] = {f"checkpoint_every_n_{unit}": "null" for unit in UNITS}
    flags["model.task_agnostic"] = False  # takes a forward of every mode
    found = []
    for number in range(continuations + 1):
        whole = fork(arguments(method, tasks, place, f"run_{number}", flags))
        folder = folder_of(place, f"run_{number}", method)
        flags["continue_from"] = folder
        seconds = [second for second, _ in notes_of(folder)]
        each = median(after - before for before, after in pairwise(seconds))
        sizes = sizes_of(folder / "checkpoints" / "last.ckpt")
        found.append(Run(seconds[0], each, whole - seconds[-1], sizes))
    return found


def print_runs(method: str, tasks: int, runs: list[Run]) -> bool:
    """Print both tables of a method; whether all sizes are those of the formulas."""
    heads = ["CPU", "tasks", "start, s", "per task, ms", "end, s", *(["compared"] * 3)]
    print(f"\n| {' | '.join(heads)} |\n|{'---|' * len(heads)}")
    for number, run in enumerate(runs):
        ratios = [f"{a / b:.2f}" for a, b in zip(run[:3], runs[1][:3], strict=True)]
        cells = [f"{run.start:.2f}", f"{1000 * run.task:.2f}", f"{run.end:.2f}", *ratios]
        print(f"| {method} | {tasks * (number + 1)} | {' | '.join(cells)} |")
    heads = ["bytes", "tasks", *Sizes._fields, "file per task", "unlike the formula"]
    print(f"\n| {' | '.join(heads)} |\n|{'---|' * len(heads)}")
    first, unlike = runs[0].sizes, 0
    for number, run in enumerate(runs):
        now, sizes = tasks * (number + 1), run.sizes
        wanted = expected(method, now, first.others)
        wrong = sum(a != b for a, b in zip(sizes[:4], wanted, strict=True))
        rest = (sizes.file - first.file) / (now - tasks) if number else 0
        cells = [*(f"{size:,}" for size in sizes), f"{rest:.1f}", str(wrong)]
        print(f"| {method} | {now} | {' | '.join(cells)} |", flush=True)
        unlike += wrong
    return not unlike


# --- tables ----------------------------------------------------------------------------------------


def tenths(values: list[float]) -> list[float]:
    """Means of ten parts of equal length; the very first task warms up and is left out."""
    values = values[1:]
    ends = [len(values) * part // TENTHS for part in range(TENTHS + 1)]
    return [fmean(values[a:b]) for a, b in pairwise(ends)]


def row(method: str, values: list[float], digits: int) -> str:
    """A line of the table: tenths, the last over the first, and the slope over a thousand tasks."""
    means = tenths(values)
    slope = 1000 * linear_regression(range(len(values) - 1), values[1:]).slope
    cells = [f"{value:.{digits}f}" for value in means]
    return f"| {method} | {' | '.join(cells)} | {means[-1] / means[0]:.2f} | {slope:+.2f} |"


def write_digits(root: Path) -> None:
    """scikit-learn's digits, three times as large and framed, in MNIST's four files."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    large = np.kron(images.reshape(-1, 8, 8) * (255 / 16), np.ones((3, 3)))
    framed = np.pad(large, ((0, 0), (2, 2), (2, 2))).round().astype(np.uint8)
    folder = root / "MNIST" / "raw"
    folder.mkdir(parents=True)
    for part, chosen in {"train": slice(0, 1400), "t10k": slice(1400, None)}.items():
        for name, array in {"images-idx3": framed, "labels-idx1": labels.astype(np.uint8)}.items():
            array = array[chosen]
            sizes = struct.pack(f">{array.ndim}I", *array.shape)
            content = bytes([0, 0, 8, array.ndim]) + sizes + array.tobytes()
            (folder / f"{part}-{name}-ubyte").write_bytes(content)


def main() -> int:
    """Run the methods one after another and print the tables; 1 if a size is not as it should be."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", type=int, default=5000, help="of each run")
    parser.add_argument("--methods", nargs="+", default=METHODS)
    parser.add_argument("--continuations", type=int, default=0, help="runs after the first")
    options = parser.parse_args()
    torch.set_num_threads(1)  # forked children cannot use the parent's threads
    found, as_expected = {}, True
    for method in options.methods:
        with tempfile.TemporaryDirectory() as made:
            write_digits(Path(made))
            if not options.continuations:
                found[method] = soak(method, options.tasks, Path(made))
                continue
            runs = go_on(method, options.tasks, options.continuations, Path(made))
        as_expected &= print_runs(method, options.tasks, runs)
    if found:
        print_tenths(found)
    return int(not as_expected)


def print_tenths(found: Mapping[str, tuple[list[float], list[float]]]) -> None:
    """Print both tables of methods that learned all tasks at once."""
    heads = [f"{100 * part // TENTHS} %" for part in range(1, TENTHS + 1)]
    for which, unit in enumerate(("CPU ms per task", "resident MiB")):
        names = [unit, *heads, "last / first", "per 1,000 tasks"]
        print(f"\n| {' | '.join(names)} |\n|{'---|' * len(names)}")
        for method, values in found.items():
            print(row(method, values[which], digits=1 if which == 0 else 0), flush=True)


if __name__ == "__main__":
    sys.exit(main())
