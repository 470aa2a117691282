"""What computing a front's features once saves, in CPU time of whole fits.

    python benchmarks/front_cache.py
    python benchmarks/front_cache.py --root DIR  # CIFAR-100 instead of digits

Each fit learns five tasks of two classes on patches, with the gates ncm and slda. Turns alternate; one
thread. The time that fitting the front takes is in both.
"""

import argparse
import logging
import time
import warnings
from statistics import median

import torch
from lightning.pytorch import Trainer, seed_everything

from bpn_lightning import ContinualModule
from bpn_lightning.datamodules import ContinualDataModule, SplitCIFAR100, SplitDigits
from bpn_lightning.nn import MLP, Patches
from bpn_lightning.strategies import SLDA, NearestClassMean


def stream_of(root: str | None, epochs: int) -> ContinualDataModule:
    """Five tasks of two classes."""
    if root is None:
        return SplitDigits(num_tasks=5, epochs_per_task=epochs, seed=0)
    return SplitCIFAR100(
        root=root, download=False, num_tasks=5, classes_per_task=2, epochs_per_task=epochs, seed=0
    )


def fit(root: str | None, epochs: int, gigabytes: float) -> tuple[float, float]:
    """CPU seconds of a fit, and the mean accuracy that it ends with."""
    seed_everything(0, verbose=False)
    size = 3 if root is None else 6
    model = ContinualModule(MLP([300]), front=Patches(100, size), front_cache_gb=gigabytes)
    trainer = Trainer(
        max_epochs=-1,
        accelerator="cpu",
        callbacks=[NearestClassMean(), SLDA()],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    stream = stream_of(root, epochs)
    stream.setup()
    began = time.process_time()
    trainer.fit(model, stream)
    return time.process_time() - began, float(model.accuracy_matrix.accuracy[-1].mean())


def main() -> None:
    """Print a row for each number of epochs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", help="folder with CIFAR-100")
    parser.add_argument("--epochs", type=int, nargs="+", default=[1, 5])
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    print("| epochs per task | s without | s with | ratio | accuracies |\n|---|---|---|---|---|")
    for epochs in options.epochs:
        turns = [
            [fit(options.root, epochs, size) for size in (0, 2)] for _ in range(options.repeats)
        ]
        without, cached = (median(turn[way][0] for turn in turns) for way in (0, 1))
        accuracies = " and ".join(f"{accuracy:.3f}" for _, accuracy in turns[0])
        print(
            f"| {epochs} | {without:.1f} | {cached:.1f} | {without / cached:.2f} | {accuracies} |"
        )


if __name__ == "__main__":
    main()
