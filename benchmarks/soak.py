"""Check that time and memory per task do not grow over thousands of short tasks.

    python benchmarks/soak.py
    python benchmarks/soak.py --tasks 1000 --methods ewc bd+psp

Each method is a separate `bpn-fit`, including all the files that it writes: an MLP of 32 units is trained
on a sequence of permutations of the pixels, with five updates each, of scikit-learn's digits instead of
MNIST. Prints CPU time per task and resident memory at tenths of the stream. One thread.
"""

import argparse
import json
import os
import struct
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from statistics import fmean, linear_regression

import numpy as np
from lightning.pytorch import Callback, LightningModule, Trainer

METHODS = ("finetune", "ewc", "si", "mas", "bd+ewc", "psp", "bd+psp")
UPDATES, BATCH = 5, 32
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


def soak(method: str, tasks: int, folder: Path) -> tuple[list[float], list[float]]:
    """Run a method.

    Returns:
        CPU milliseconds of each task but the last, and MiB at its beginning.
    """
    flags = {
        "config": "permuted_mnist.yaml",
        "method": method,
        "runs": folder,
        "model.backbone.init_args.hidden": [32],
        "model.evaluate_on": "current",
        "data.init_args.root": folder,
        "data.init_args.num_tasks": tasks,
        "data.init_args.train_samples": UPDATES * BATCH,
        "data.init_args.test_samples": 100,
        "data.init_args.batch_size": BATCH,
        "trainer.accelerator": "cpu",
        "trainer.enable_checkpointing": False,
        "trainer.log_every_n_steps": UPDATES,
        "trainer.callbacks+": f"{Path(__file__).stem}.Notes",
    }
    line = [
        sys.executable,
        "-m",
        "bpn_lightning.cli.main",
        *(f"--{k}={v}" for k, v in flags.items()),
    ]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(Path(__file__).resolve().parent),
    }
    subprocess.run(line, env=environment, check=True, stdout=subprocess.DEVNULL)
    notes = json.loads((folder / "permuted_mnist" / method / "seed_0" / NOTES).read_text())
    seconds, sizes = zip(*notes, strict=True)
    times = [1000 * (after - before) for before, after in pairwise(seconds)]
    return times, [size / 2**20 for size in sizes[:-1]]


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


def main() -> None:
    """Run the methods one after another and print both tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", type=int, default=5000)
    parser.add_argument("--methods", nargs="+", default=METHODS)
    options = parser.parse_args()
    found = {}
    for method in options.methods:
        with tempfile.TemporaryDirectory() as made:
            write_digits(Path(made))
            found[method] = soak(method, options.tasks, Path(made))
    heads = [f"{100 * part // TENTHS} %" for part in range(1, TENTHS + 1)]
    for which, unit in enumerate(("CPU ms per task", "resident MiB")):
        names = [unit, *heads, "last / first", "per 1,000 tasks"]
        print(f"\n| {' | '.join(names)} |\n|{'---|' * len(names)}")
        for method, values in found.items():
            print(row(method, values[which], digits=1 if which == 0 else 0), flush=True)


if __name__ == "__main__":
    main()
