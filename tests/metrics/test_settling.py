"""A task that loses accuracy in its last epoch is named, by right answers counted in the updates."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from torch import Tensor

from bpn_lightning.datamodules import SplitDigits
from bpn_lightning.metrics import settling
from bpn_lightning.metrics.settling import Settling, Unsettled
from bpn_lightning.strategies import ContinualStrategy
from bpn_lightning.tasks import Phase

Fit = Callable[..., Any]


class Answers(ContinualStrategy):
    """Counts right answers of every epoch with a loop of its own, from the logits of each update."""

    def __init__(self) -> None:
        self.epochs: dict[int, list[bool]] = {}

    def loss_terms(self, host: Any, batch: Any, logits: Tensor) -> dict[str, Tensor]:
        first, stop = host.network.columns(host.network.opened)
        answers = [
            first + max(range(stop - first), key=row[first:stop].tolist().__getitem__)
            for row in logits
        ]
        right = [one == target for one, target in zip(answers, batch.targets.tolist(), strict=True)]
        self.epochs.setdefault(host.trainer.current_epoch, []).extend(right)
        return {}

    def accuracy(self, epoch: int) -> float:
        return sum(self.epochs[epoch]) / len(self.epochs[epoch])


class Break(Callback):
    """Makes nonsense of the network where a task's last epoch begins."""

    def __init__(self, epochs: tuple[int, ...]) -> None:
        self.epochs = epochs

    def on_train_epoch_start(self, trainer: Any, module: Any) -> None:
        if trainer.current_epoch in self.epochs:
            with torch.no_grad():
                module.network.head.weight.mul_(-20)


def stream(**options: Any) -> SplitDigits:
    return SplitDigits(
        **{"num_tasks": 2, "epochs_per_task": 3, "batch_size": 50, "seed": 0, **options}
    )


@pytest.fixture
def named_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every task is named, whatever its accuracies."""
    monkeypatch.setattr(settling, "MAX_FALL", -2.0)


@pytest.mark.parametrize("mask", ["all", "task"])
def test_the_task_that_falls_is_named_with_what_it_had(fit: Fit, mask: str) -> None:
    answers = Answers()
    module, _ = fit([answers, Break((5,))], stream=stream(), lr=0.2, mask=mask)
    assert module.unsettled == [Unsettled(1, "train", answers.accuracy(4), answers.accuracy(5))]
    assert answers.accuracy(4) - answers.accuracy(5) > 0.1
    steady, _ = fit([], stream=stream(), lr=0.2, mask=mask)
    assert steady.unsettled == []


@pytest.mark.usefixtures("named_all")
@pytest.mark.parametrize("accumulate", [1, 4])
def test_every_task_counts_its_last_two_epochs_alone(fit: Fit, accumulate: int) -> None:
    answers = Answers()
    trainer = {"accumulate_grad_batches": accumulate}
    module, _ = fit([answers], stream=stream(), trainer=trainer)
    wanted = [
        Unsettled(task, "train", answers.accuracy(last - 1), answers.accuracy(last))
        for task, last in ((0, 2), (1, 5))
    ]
    assert module.unsettled == wanted


class FirstAnswers(Answers):
    """Of an update whose optimizer asks for its gradient several times, the answers before it moved."""

    def on_train_batch_start(self, *_: Any) -> None:
        self.moved = False

    def loss_terms(self, host: Any, batch: Any, logits: Tensor) -> dict[str, Tensor]:
        found = {} if self.moved else super().loss_terms(host, batch, logits)
        self.moved = True
        return found


@pytest.mark.usefixtures("named_all")
def test_each_sample_counts_once_whatever_the_optimizer_asks_for(fit: Fit) -> None:
    answers = FirstAnswers()
    optimizer = partial(torch.optim.LBFGS, lr=0.1, max_iter=3)
    module, _ = fit([answers], stream=stream(), optimizer=optimizer)
    assert len(answers.epochs[2]) == 288
    wanted = [
        Unsettled(k, "train", answers.accuracy(e), answers.accuracy(e + 1))
        for k, e in ((0, 1), (1, 4))
    ]
    assert module.unsettled == wanted


@pytest.mark.usefixtures("named_all")
def test_a_single_epoch_has_none_to_fall_from(fit: Fit) -> None:
    module, _ = fit(stream=stream(epochs_per_task=[1, 2]))
    assert [one.task for one in module.unsettled] == [1]


class Phases(ContinualStrategy):
    """A warm-up of the head before, and a phase of the strategy's own after the training."""

    def phases(self, task: Any, phases: list[Phase]) -> list[Phase]:
        return [Phase("warm_up", 1, "head"), *phases, Phase("own", 1, "strategy")]

    def phase_optimizer(self, host: Any, phase: Phase) -> Any:
        self.number = torch.nn.Parameter(torch.zeros(()))
        return torch.optim.SGD([self.number], lr=0.1)

    def phase_loss(self, host: Any, phase: Phase, batch: Any) -> Tensor:
        return self.number.expand(len(batch.targets))


@pytest.mark.usefixtures("named_all")
def test_only_epochs_that_train_the_network_are_compared(fit: Fit) -> None:
    answers = Answers()
    module, _ = fit([Phases(), answers], stream=stream(epochs_per_task=[2, 1]))
    wanted = Unsettled(0, "train", answers.accuracy(1), answers.accuracy(2))
    assert module.unsettled == [wanted]


@pytest.mark.usefixtures("named_all")
@pytest.mark.parametrize("patience", [None, 1])
def test_held_out_samples_are_counted_where_there_are_some(fit: Fit, patience: int | None) -> None:
    found = []

    class Validate(Callback):
        def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
            found.append((module.opened, module.evaluate([module.opened], "val").item()))

    held = stream(validation_fraction=0.2, epochs_per_task=4)
    module, _ = fit([Validate()], stream=held, lr=0.0 if patience else 0.05, patience=patience)
    for task in (0, 1):
        of_task = [accuracy for opened, accuracy in found if opened == task]
        assert len(of_task) == (2 if patience else 4)
        assert module.unsettled[task] == Unsettled(task, "val", *of_task[-2:])


@pytest.mark.usefixtures("named_all")
@pytest.mark.parametrize("steps", [8, 12, 14, 18, 21])
@pytest.mark.filterwarnings("ignore:The stream stopped before its end")
def test_a_resumed_count_goes_on(fit: Fit, tmp_path: Path, steps: int) -> None:
    """Six updates an epoch: inside and at the ends of counted epochs, and of a task."""
    whole, _ = fit(stream=stream())
    _, trainer = fit(stream=stream(), trainer={"max_steps": steps})
    trainer.save_checkpoint(tmp_path / "part.ckpt")
    rest, _ = fit(stream=stream(), seed=1, ckpt_path=tmp_path / "part.ckpt")
    assert rest.unsettled == whole.unsettled
    assert len(rest.unsettled) == 2


def test_nothing_is_read_from_the_device_before_the_epochs_end() -> None:
    class Watched(Tensor):
        reads = 0

        @classmethod
        def __torch_function__(
            cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            Watched.reads += func in (Tensor.item, Tensor.__bool__, Tensor.__int__, Tensor.tolist)
            return super().__torch_function__(func, types, args, kwargs or {})

    one = Settling()
    for right in (3, 4, 5):
        one.add(torch.tensor(right).as_subclass(Watched), 6)
    assert Watched.reads == 0
    assert one.accuracy(int(one.right)) == 12 / 18
