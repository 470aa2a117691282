"""A Lightning Trainer around the floor, and nothing else: what Lightning itself costs."""

import logging
from collections.abc import Iterator
from math import ceil

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from work import Answer, Clock, Work, by_task, make_data, network, resident, serve


class Batches:
    """Batches by index of one task, in a new order every time."""

    def __init__(self, images: Tensor, labels: Tensor, size: int) -> None:
        self.images, self.labels, self.size = images, labels, size

    def __len__(self) -> int:
        return ceil(len(self.labels) / self.size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.randperm(len(self.labels)).to(self.labels.device)
        for chosen in order.split(self.size):
            yield self.images.index_select(0, chosen), self.labels.index_select(0, chosen)


class Module(LightningModule):
    """The floor's network, loss and optimizer."""

    def __init__(self, work: Work) -> None:
        super().__init__()
        self.net, self.work, self.answer = network(work), work, Answer()

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Nothing is logged."""
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Plain SGD."""
        return torch.optim.SGD(self.parameters(), lr=self.work.lr)

    def on_train_epoch_end(self) -> None:
        """All epochs but the first are timed."""
        if self.current_epoch == 0:
            self.clock = Clock(self.work.device)
        if self.current_epoch == self.work.epochs - 1:
            self.answer.step.append(self.clock.read(self.work.timed_steps))


def run(work: Work) -> Answer:
    """A fit for every task."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    module = Module(work)
    for images, labels in by_task(make_data(work).train, work):
        Trainer(
            max_epochs=work.epochs,
            accelerator="gpu" if work.device == "cuda" else "cpu",
            devices=1,
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=False,
        ).fit(module, Batches(images, labels, work.batch_size))
        module.answer.resident.append(resident())
    return module.answer


if __name__ == "__main__":
    serve(run)
