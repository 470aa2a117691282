"""Time of a run of permuted MNIST, compared with a hand-written loop that does the same work.

    python benchmarks/permuted_speed.py --root DIR
    python benchmarks/permuted_speed.py --tasks 5 --samples 12000 --root DIR

Both train a network of 4 x 128 units for an epoch on each task and test it, before training on all
tasks and after each task on all so far and the next one. Both draw the same batches from the same
permutations, so both end with the same accuracies, which is checked. Without --root, random images of
MNIST's size are used. One thread; the two alternate, and the ratio is of CPU times.
"""

import argparse
import logging
import resource
import struct
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from torch import Tensor, nn

from bpn_lightning import ContinualModule
from bpn_lightning.datamodules import PermutedMNIST
from bpn_lightning.nn import MLP
from bpn_lightning.random_state import seeded_generator
from bpn_lightning.run.console import StreamProgress

HIDDEN = [128] * 4


class MemoryPerTask(Callback):
    """Records the peak resident size of the process at the start of each task."""

    def __init__(self) -> None:
        self.kibibytes: list[int] = []

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Linux counts in KiB."""
        self.kibibytes.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


def by_the_framework(stream: PermutedMNIST, lr: float, memory: MemoryPerTask) -> Tensor:
    """One Lightning fit as `bpn-fit` does it, without its files."""
    seed_everything(0, verbose=False)
    module = ContinualModule(
        MLP(HIDDEN),
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=lr),
        mask="shared",
        evaluate_on="seen_and_next",
        task_agnostic=False,
    )
    Trainer(
        max_epochs=-1,
        accelerator="cpu",
        callbacks=[memory, StreamProgress()],
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    ).fit(module, stream)
    return module.accuracy_matrix.accuracy


def by_hand(stream: PermutedMNIST, lr: float) -> Tensor:
    """The same without Lightning and without this package's classes, on the stream's tensors."""
    seed_everything(0, verbose=False)
    mean, std = stream.normalization.mean[0], stream.normalization.std[0]
    scale, shift = 1 / (255 * std), -mean / std
    tasks = range(stream.num_tasks)
    orders = [stream.permutation(task) for task in tasks]
    network = network_by_hand(stream)
    accuracy = torch.full((len(tasks) + 1, len(tasks)), torch.nan, dtype=torch.float64)
    train, _ = stream._parts["train"]
    test, _ = stream._parts["test"]

    def inputs(images: Tensor, task: int) -> Tensor:
        flat = (images * scale).add_(shift).flatten(1)
        return flat.index_select(1, orders[task])

    @torch.no_grad()
    def test_first(count: int, row: int) -> None:
        for task in tasks[:count]:
            right = torch.zeros((), dtype=torch.int64)
            members = stream.members(task, "test")
            for chosen in members.split(stream.eval_batch_size):
                logits = network(inputs(test.images[chosen], task))
                right += (logits.argmax(1) == test.labels[chosen]).sum()
            accuracy[row, task] = right.double() / len(members)

    test_first(len(tasks), 0)
    for task in tasks:
        optimizer = torch.optim.SGD(network.parameters(), lr=lr)
        members = stream.members(task, "train")
        generator = seeded_generator("order", stream.seed, task, 0)
        shuffled = members[torch.randperm(len(members), generator=generator)]
        for chosen in shuffled.split(stream.batch_size):
            loss = F.cross_entropy(
                network(inputs(train.images[chosen], task)), train.labels[chosen]
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        test_first(task + 2, task + 1)
    return accuracy


def network_by_hand(stream: PermutedMNIST) -> nn.Sequential:
    """Plain layers with the framework's initial weights."""
    module = ContinualModule(MLP(HIDDEN), mask="shared")
    module.attach(stream)
    layers: list[nn.Module] = []
    for start in module.network.linear_layers().values():
        layer = nn.Linear(start.in_features, start.out_features)
        layer.load_state_dict(start.state_dict())
        layers += [layer, nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def timed(run: Callable[[], Tensor]) -> tuple[float, float, Tensor]:
    """CPU seconds, seconds, and what it gave."""
    cpu, wall = time.process_time(), time.perf_counter()
    result = run()
    return time.process_time() - cpu, time.perf_counter() - wall, result


def write_random_images(root: Path) -> None:
    """MNIST's four files, of its size, with random pixels."""
    folder = root / "MNIST" / "raw"
    folder.mkdir(parents=True)
    generator = np.random.default_rng(0)
    for part, count in {"train": 60_000, "t10k": 10_000}.items():
        images = generator.integers(256, size=(count, 28, 28), dtype=np.uint8)
        labels = (np.arange(count) % 10).astype(np.uint8)
        for name, array in {"images-idx3": images, "labels-idx1": labels}.items():
            sizes = struct.pack(f">{array.ndim}I", *array.shape)
            content = bytes([0, 0, 8, array.ndim]) + sizes + array.tobytes()
            (folder / f"{part}-{name}-ubyte").write_bytes(content)


def main() -> None:
    """Run both in turn and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", type=int, default=100)
    parser.add_argument("--samples", type=int, help="training images of each task; by default all")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--lr", type=float, default=0.01)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--root", help="the folder with MNIST; by default random images")
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)

    with tempfile.TemporaryDirectory() as made:
        if options.root is None:
            write_random_images(Path(made))
        stream = PermutedMNIST(
            root=options.root or made,
            download=False,
            num_tasks=options.tasks,
            epochs_per_task=1,
            batch_size=options.batch_size,
            train_samples=options.samples,
            seed=0,
        )
        start = time.perf_counter()
        stream.setup()
        print(f"set-up of {options.tasks} tasks: {time.perf_counter() - start:.2f} s\n")
    ratios = []
    print("| | hand-written: CPU s (s) | bpn_lightning: CPU s (s) | ratio |\n|---|---|---|---|")
    for repeat in range(options.repeats):
        memory = MemoryPerTask()
        cpu, wall, expected = timed(lambda: by_hand(stream, options.lr))
        own_cpu, own_wall, found = timed(lambda: by_the_framework(stream, options.lr, memory))  # noqa: B023
        ratios.append(own_cpu / cpu)
        row = f"{cpu:.1f} ({wall:.1f}) | {own_cpu:.1f} ({own_wall:.1f}) | {ratios[-1]:.2f}"
        print(f"| {repeat + 1} | {row} |")
        torch.testing.assert_close(found, expected, rtol=0, atol=0.02, equal_nan=True)
    print(f"\nratio {sorted(ratios)[len(ratios) // 2]:.2f}, accuracies agree")
    grown = (memory.kibibytes[-1] - memory.kibibytes[1]) / 1024 if options.tasks > 2 else 0.0
    per_task = grown / max(options.tasks - 2, 1)
    print(f"peak memory {memory.kibibytes[-1] / 1024:.0f} MiB, grown by {per_task:.3f} MiB a task")


if __name__ == "__main__":
    main()
