"""Streams inside a Trainer: epochs, splits and resumes, with a module that only writes down."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn

from bpn_lightning.datamodules.base import ContinualDataModule
from bpn_lightning.errors import ConfigurationError
from bpn_lightning.tasks import Batch, TrainingEpoch

pytestmark = pytest.mark.slow

Make = Callable[..., ContinualDataModule]


class Recorder(L.LightningModule):
    """Knows nothing of tasks, and writes down what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1)
        self.trained: list[tuple[int, Any]] = []
        self.validated: list[tuple[int, list[int]]] = []
        self.tested: list[tuple[float, int]] = []

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        self.trained.append((self.trainer.current_epoch, batch.inputs.flatten().tolist()))
        return self.layer(torch.ones(1)).sum()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        if not self.trainer.sanity_checking:
            self.validated.append((self.trainer.current_epoch, batch.task.tolist()))

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self.tested += zip(batch.inputs.mean((1, 2, 3)).tolist(), batch.task.tolist(), strict=True)

    def predict_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return batch.task

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class SaveAt(L.Callback):
    """Save a checkpoint when a hook fires for the n-th time."""

    def __init__(self, hook: str, count: int, path: Path) -> None:
        self.left = count

        def save(trainer: L.Trainer, *arguments: object) -> None:
            self.left -= 1
            if self.left == 0:
                trainer.save_checkpoint(path)

        setattr(self, hook, save)


def fit(
    stream: ContinualDataModule,
    *callbacks: L.Callback,
    resume: Path | None = None,
    reload: int = 1,
) -> Recorder:
    stream.setup()
    module = Recorder()
    trainer = L.Trainer(
        max_epochs=sum(task.epochs for task in stream.tasks),
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        reload_dataloaders_every_n_epochs=reload,
        callbacks=list(callbacks),
    )
    trainer.fit(module, stream, ckpt_path=resume, weights_only=False)
    return module


def test_a_fit_sees_every_epoch_of_every_task_in_the_streams_order(toy: Make) -> None:
    arguments = {"epochs_per_task": [1, 2, 1], "batch_size": 8, "augment": True, "seed": 3}
    stream = toy(**arguments)
    trained = fit(stream).trained
    alone = toy(**arguments)
    expected = [
        (epoch, alone.prepare(batch, augment=True).inputs.flatten().tolist())
        for epoch, (task, own) in enumerate([(0, 0), (1, 0), (1, 1), (2, 0)])
        for batch in alone.train_loader(task, own)
    ]
    assert trained == expected


def test_a_trainer_that_would_keep_one_epochs_loader_is_refused(toy: Make) -> None:
    for reload in (0, 2):
        with pytest.raises(ConfigurationError, match=rf"own loader, but got {reload}\. Pass it"):
            fit(toy(epochs_per_task=1), reload=reload)


def test_a_module_that_is_followed_is_followed_for_one_fit(toy: Make) -> None:
    stream = toy(epochs_per_task=1, batch_size=8)
    alone = fit(toy(epochs_per_task=1, batch_size=8)).trained
    stream.follow(lambda: TrainingEpoch(2, 0, [2]))
    assert fit(stream).trained[:2] == [(0, inputs) for epoch, inputs in alone if epoch == 2]
    assert fit(stream).trained == alone


BATCHES = 3 + 2 * 3 + 2  # tasks of 21, 20 and 17 images in batches of 8; the last has 9


@pytest.mark.parametrize(
    ("hook", "done_at"),
    [
        ("on_train_batch_start", range(BATCHES)),  # fetched, but not trained on
        ("on_train_batch_end", range(1, BATCHES + 1)),
        ("on_train_epoch_end", [3, 6, 9, 11]),
    ],
)
def test_a_resumed_fit_sees_exactly_what_was_missing(
    toy: Make, tmp_path: Path, hook: str, done_at: Sequence[int]
) -> None:
    def stream() -> ContinualDataModule:
        return toy(epochs_per_task=[1, 2, 1], batch_size=8, augment=True)

    whole = fit(stream()).trained
    assert len(whole) == BATCHES
    for moment, done in enumerate(done_at, start=1):
        path = tmp_path / f"{moment}.ckpt"
        saver = SaveAt(hook, moment, path)
        assert fit(stream(), saver).trained == whole
        assert fit(stream(), resume=path).trained == whole[done:], f"saved at {moment}"


def test_validation_sees_the_tasks_so_far(toy: Make) -> None:
    stream = toy(epochs_per_task=1, validation_fraction=0.3)
    validated = fit(stream).validated
    assert [epoch for epoch, _ in validated] == [0, 1, 2]
    assert [sorted(set(ids)) for _, ids in validated] == [[0], [0, 1], [0, 1, 2]]


def test_without_a_validation_part_nothing_is_validated(toy: Make) -> None:
    assert fit(toy(epochs_per_task=1)).validated == []


def test_test_and_predict_loops_see_every_test_image(toy: Make) -> None:
    stream = toy(eval_batch_size=4)
    module = Recorder()
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False)
    trainer.test(module, stream, verbose=False)
    predicted = trainer.predict(module, stream)
    batches = [b for task in stream.tasks for b in stream.loader(task.id, "test")]
    ids = [task for b in batches for task in [b.task] * len(b.targets)]
    means = torch.cat([stream.prepare(b).inputs.mean((1, 2, 3)) for b in batches])
    assert [task for _, task in module.tested] == ids
    torch.testing.assert_close(torch.tensor([mean for mean, _ in module.tested]), means)
    assert torch.cat(predicted).tolist() == ids  # type: ignore[arg-type]
