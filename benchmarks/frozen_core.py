"""Memory and time of an update on a frozen core, as a fraction of those of full training, and bytes per task.

    python benchmarks/frozen_core.py
    python benchmarks/frozen_core.py --updates 20 --size 64

Measured with torchvision's ResNet-18 on the CPU, batches of random images and Adam, in a real fit. Memory is
what autograd saves for the backward pass (each storage once, without weights), gradients, and the optimizer's
state. The weights, which every way has, are left out. Time is the median CPU time of an update, forward to
step, of one thread.
By formula, for ViT-B/16: bytes that a task stores, and of gradients and Adam's two averages.
"""

import argparse
import logging
import time
import warnings
from collections.abc import Callable, Mapping
from statistics import median
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torchvision.models import vit_b_16

from bpn_lightning import ContinualModule
from bpn_lightning.costs import bytes_per_task, tensor_bytes
from bpn_lightning.datamodules import SplitArrays
from bpn_lightning.nn import torchvision_backbone
from bpn_lightning.nn.attaching import able_to_have, numbers_per_task
from bpn_lightning.nn.switching import kind_of
from bpn_lightning.strategies import IA3, BeneficialPerturbation, BitFit, ContinualStrategy, LoRA

Make = Callable[[], list[ContinualStrategy]]
WAYS: Mapping[str, tuple[str, Make]] = {
    "full": ("all", list),
    "head": ("head", list),
    "bd": ("modes", lambda: [BeneficialPerturbation()]),
    "bitfit": ("modes", lambda: [BitFit()]),
    "ia3": ("modes", lambda: [IA3()]),
    "lora, r = 1": ("modes", lambda: [LoRA(1)]),
    "lora, r = 8": ("modes", lambda: [LoRA(8)]),
}
PARTS = {"bitfit": ("bias_units", 0), "ia3": ("scales", 0)}
PARTS |= {f"lora, r = {r}": ("low_rank", r) for r in (1, 8)}
DEFAULTS = ("linear", "conv", "attention")


class Measure(Callback):
    """What autograd saves in the first update, and the seconds of CPU time of the others."""

    def __init__(self) -> None:
        self.kept: dict[int, int] = {}
        self.seconds: list[float] = []
        self.state = self.gradients = 0
        self.hooks: Any = None

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Count in the first batch, and time in the others."""
        if batch_idx == 0:
            held = [*pl_module.parameters(), *pl_module.buffers()]
            own = {value.untyped_storage().data_ptr() for value in held}

            def note(tensor: Tensor) -> Tensor:
                storage = tensor.untyped_storage()
                if storage.data_ptr() not in own:
                    self.kept[storage.data_ptr()] = storage.nbytes()
                return tensor

            self.hooks = torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor)
            self.hooks.__enter__()
        self.start = time.process_time()

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """Stop counting or timing."""
        self.seconds.append(time.process_time() - self.start)
        if self.hooks is None:
            return
        self.hooks.__exit__(None, None, None)
        self.hooks = None
        self.seconds.clear()
        optimizer = trainer.optimizers[0]
        states = [value for one in optimizer.state.values() for value in one.values()]
        self.state = tensor_bytes(value for value in states if isinstance(value, Tensor))
        parameters = trainer.lightning_module.parameters()
        self.gradients = tensor_bytes(p for p in parameters if p.requires_grad)


def images(updates: int, size: int, batch: int) -> SplitArrays:
    """Noise of two classes, so many batches of it."""
    draw = torch.Generator().manual_seed(0)
    shape = (updates * batch, size, size, 3)
    noise = torch.randint(256, shape, generator=draw, dtype=torch.uint8)
    labels = torch.arange(len(noise)) % 2
    arrays = {
        "train_images": noise.numpy(),
        "train_labels": labels.numpy(),
        "test_images": noise[:2].numpy(),
        "test_labels": labels[:2].numpy(),
    }
    return SplitArrays(path=arrays, num_tasks=1, epochs_per_task=1, batch_size=batch, seed=0)


def measure(way: str, options: argparse.Namespace) -> tuple[int, int, float, int]:
    """Bytes saved for backward, of gradients and optimizer, seconds, and bytes per task."""
    train, make = WAYS[way]
    found, made = Measure(), make()
    torch.manual_seed(0)
    module = ContinualModule(
        torchvision_backbone("resnet18"), mask="task", train=train, optimizer=torch.optim.Adam
    )
    Trainer(
        max_epochs=-1,
        accelerator="cpu",
        callbacks=[*made, found],
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        num_sanity_val_steps=0,
    ).fit(module, images(options.updates + 1, options.size, options.batch))
    stored = bytes_per_task(made, module.host)["measured"]
    return sum(found.kept.values()), found.gradients + found.state, median(found.seconds), stored


def print_measured(options: argparse.Namespace) -> None:
    """A row for each way: fractions of full training."""
    print(f"ResNet-18, {options.batch} images of {options.size} x {options.size}, CPU, Adam\n")
    print(
        "| trains | saved for backward | gradients and optimizer | both | time | bytes per task |"
    )
    print("|---|---|---|---|---|---|")
    full = None
    for way in WAYS:
        saved, trained, seconds, stored = measure(way, options)
        full = full or (saved, trained, saved + trained, seconds)
        parts = (saved, trained, saved + trained, seconds)
        cells = [f"{part / of:.3f}" for part, of in zip(parts, full, strict=True)]
        print(f"| {way} | {' | '.join(cells)} | {stored:,} |", flush=True)


def print_formulas() -> None:
    """Of ViT-B/16 with 10 classes per task: what is stored, and what training holds besides weights."""
    with torch.device("meta"):
        network = vit_b_16(weights=None)
    network.heads = torch.nn.Identity()  # type: ignore[assignment]
    layers = {name: part for name, part in network.named_modules() if kind_of(part) is not None}
    core = sum(p.numel() for p in network.parameters())
    head = 10 * (768 + 1)
    print(f"\nViT-B/16, {core:,} parameters, head of {head:,}, by formula\n")
    print(
        "| trains | bytes per task | gradients and Adam, bytes | of full training |\n|---|---|---|---|"
    )
    full = 12 * (core + head)
    print(f"| full | {4 * core:,} | {full:,} | 1 |")
    print(f"| head | 0 | {12 * head:,} | {12 * head / full:.5f} |")
    for way, (part, rank) in PARTS.items():
        numbers = sum(
            numbers_per_task(part, layer, rank)
            for layer in able_to_have(part, layers).values()
            if getattr(kind_of(layer), "name", "") in DEFAULTS
        )
        numbers += 10 if part == "bias_units" else 0  # of the head
        held = 12 * (numbers + head)
        print(f"| {way} | {4 * numbers:,} | {held:,} | {held / full:.5f} |")


def main() -> None:
    """Both tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--updates", type=int, default=10, help="timed, of each way")
    parser.add_argument("--size", type=int, default=64, help="of the images, in pixels")
    parser.add_argument("--batch", type=int, default=16, help="images of an update")
    options = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    print_formulas()
    print()
    print_measured(options)


if __name__ == "__main__":
    main()
