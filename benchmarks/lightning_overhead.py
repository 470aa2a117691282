"""Overhead of Lightning's loop on a tiny network, and the gain of several ways to avoid it.

    python benchmarks/lightning_overhead.py

A network of 64-32-10 with batches of 10: computation is negligible, so the time is that of the loop.
The variants alternate; ratios are of CPU time to the hand-written loop in the same round.
"""

import argparse
import logging
import time
from collections.abc import Callable, Iterator
from statistics import median

import torch
import torch.nn.functional as F
from lightning.fabric import Fabric
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from bpn_lightning.trainer.lightning import HookNameAsPlainAttribute

BATCH, BATCHES, EPOCHS = 10, 400, 3

Batch = tuple[Tensor, Tensor]


def network() -> nn.Module:
    """The same in all ways."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))


def batches() -> Iterator[Batch]:
    """One epoch."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(BATCH * BATCHES, 64, generator=generator)
    labels = torch.randint(10, (BATCH * BATCHES,), generator=generator)
    for chosen in torch.randperm(len(labels), generator=generator).split(BATCH):
        yield images.index_select(0, chosen), labels.index_select(0, chosen)


class Loader:
    """Batches, or bundles of them."""

    def __init__(self, bundle: int) -> None:
        self.bundle = bundle

    def __len__(self) -> int:
        return BATCHES // self.bundle

    def __iter__(self) -> Iterator[Batch | list[Batch]]:
        if self.bundle == 1:
            yield from batches()
            return
        bundle = []
        for batch in batches():
            bundle.append(batch)
            if len(bundle) == self.bundle:
                yield bundle
                bundle = []


class Automatic(LightningModule):
    """The usual LightningModule."""

    def __init__(self) -> None:
        super().__init__()
        self.net = network()

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Nothing is logged."""
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Plain SGD."""
        return torch.optim.SGD(self.parameters(), lr=0.01)


class PlainAttribute(HookNameAsPlainAttribute, Automatic):
    """Bypass nn.Module when the name of the running hook is set, about forty times per step."""


class Manual(PlainAttribute):
    """Manual optimization, of one batch or of a bundle."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Batch | list[Batch], batch_idx: int) -> None:  # type: ignore[override]
        """Complete updates: the Trainer's flags for clipping and accumulation have no effect."""
        optimizer = self.optimizers()
        for images, labels in batch if isinstance(batch, list) else [batch]:
            loss = F.cross_entropy(self.net(images), labels)
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()


def by_hand() -> None:
    """The floor."""
    net = network()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    for _ in range(EPOCHS):
        for images, labels in batches():
            loss = F.cross_entropy(net(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


def by_fabric() -> None:
    """No Trainer: its devices and precision, but no callbacks, checkpoints or flags."""
    fabric = Fabric(accelerator="cpu", devices=1)
    net = network()
    net, optimizer = fabric.setup(net, torch.optim.SGD(net.parameters(), lr=0.01))
    for _ in range(EPOCHS):
        for images, labels in batches():
            loss = F.cross_entropy(net(images), labels)
            optimizer.zero_grad()
            fabric.backward(loss)
            optimizer.step()


#: As many as `bpn-fit` has; a class may be there once.
IDLE = [type(f"Idle{number}", (Callback,), {}) for number in range(4)]


def by_trainer(
    module: Callable[[], LightningModule],
    bundle: int = 1,
    callbacks: bool = False,
) -> Callable[[], None]:
    """A fit."""

    def run() -> None:
        trainer = Trainer(
            max_epochs=EPOCHS,
            callbacks=[kind() for kind in IDLE] if callbacks else None,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=False,
        )
        trainer.fit(module(), Loader(bundle))

    return run


WAYS: dict[str, Callable[[], None]] = {
    "by hand": by_hand,
    "Fabric": by_fabric,
    "Trainer": by_trainer(Automatic),
    "Trainer, plain attribute": by_trainer(PlainAttribute),
    "Trainer, plain attribute, four empty callbacks": by_trainer(PlainAttribute, callbacks=True),
    "Trainer, plain attribute, manual optimization": by_trainer(Manual),
    "the same, 5 steps per call": by_trainer(Manual, 5),
    "the same, 20 steps per call": by_trainer(Manual, 20),
}


def main() -> None:
    """Print microseconds per step and ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("lightning").setLevel(logging.ERROR)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    taken: dict[str, list[float]] = {name: [] for name in WAYS}
    for _ in range(options.repeats):
        for name, way in WAYS.items():
            start = time.process_time()
            way()
            taken[name].append((time.process_time() - start) / (EPOCHS * BATCHES) * 1e6)
    print("| way | microseconds per step | ratio |\n|---|---|---|")
    for name, times in taken.items():
        ratios = [one / floor for one, floor in zip(times, taken["by hand"], strict=True)]
        print(f"| {name} | {median(times):.0f} | {median(ratios):.2f} |")


if __name__ == "__main__":
    main()
