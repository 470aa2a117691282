"""Replay against closed forms at a network that answers nothing yet, and against what must not change."""

from collections import Counter
from importlib.metadata import entry_points
from math import log
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from bpn_replay import Replay
from torch import Tensor

from bpn_lightning import ContinualModule
from bpn_lightning.costs import measured_bytes
from bpn_lightning.datamodules import SplitDigits
from bpn_lightning.datamodules.loading import Share
from bpn_lightning.errors import ConfigurationError
from bpn_lightning.nn import MLP
from bpn_lightning.strategies import ContinualStrategy
from bpn_lightning.tasks import Batch, Task


def run(*strategies: ContinualStrategy, epochs: int = 1, mask: Any = "all", **flags: Any) -> Any:
    """Three tasks of two digits; returns the module and the trainer."""
    stream = SplitDigits(
        num_tasks=3, epochs_per_task=epochs, batch_size=32, validation_fraction=0.1, seed=0
    )
    torch.manual_seed(0)
    module = ContinualModule(MLP([32]), optimizer=lambda p: torch.optim.SGD(p, lr=0.05), mask=mask)
    checkpoint = flags.pop("ckpt_path", None)
    off = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    trainer = L.Trainer(
        max_epochs=-1,
        accelerator="cpu",
        callbacks=list(strategies),
        num_sanity_val_steps=0,
        **dict.fromkeys(off, False),
        **flags,
    )
    trainer.fit(module, stream, ckpt_path=checkpoint, weights_only=checkpoint and True)
    return module, trainer


@pytest.fixture(scope="module")
def learned() -> Any:
    """A run that is over, with its strategy."""
    replay = Replay(size=5)
    module, _ = run(replay)
    return module, replay


def images_of(module: ContinualModule, task: int) -> dict[bytes, int]:
    """The class of every training image of a task."""
    batches = list(module.host.stream.loader(task, "train"))
    pairs = [(i, t) for batch in batches for i, t in zip(batch.inputs, batch.targets, strict=True)]
    return {image.numpy().tobytes(): int(target) for image, target in pairs}


def same_memory(one: Replay, other: Replay) -> None:
    """Bit for bit."""
    states = one.memory.state_dict(), other.memory.state_dict()
    torch.testing.assert_close(*states, rtol=0, atol=0)


# --- the memory ----------------------------------------------------------------------------------


def test_the_memory_is_size_training_samples_of_each_class(learned: Any) -> None:
    """Neither test nor held-out images, none twice, labels and tasks those of the stream."""
    module, replay = learned
    memory = replay.memory
    images, targets, tasks = memory.inputs, memory.targets, memory.tasks()
    assert images.dtype == torch.uint8
    assert Counter(targets.tolist()) == dict.fromkeys(range(6), 5)
    assert len({image.numpy().tobytes() for image in images}) == 30
    for image, target, task in zip(images, targets.tolist(), tasks.tolist(), strict=True):
        assert images_of(module, task)[image.numpy().tobytes()] == target


def test_the_choice_follows_from_the_streams_seed_alone(learned: Any) -> None:
    """Not from what else drew random numbers."""

    class Draws(ContinualStrategy):
        def on_task_end(self, host: Any, task: Task) -> None:
            torch.rand(7)

    again = Replay(size=5)
    run(Draws(), again)
    same_memory(again, learned[1])


def test_declared_bytes_are_measured_bytes(learned: Any) -> None:
    """An image of 8 x 8 bytes and a number of 8 bytes for each of 30 samples."""
    module, replay = learned
    assert (
        replay.declared_bytes(module.host).held
        == measured_bytes(replay, module.host)
        == (30 * (64 + 8), 0)
    )


@pytest.mark.parametrize(("number", "batches"), [(60, 1), (20, 3), (7, 9)])
def test_every_sample_comes_once_before_any_comes_again(
    learned: Any, number: int, batches: int
) -> None:
    """However the sequence is cut into batches, it is the same."""
    module, replay = learned
    before, replay.replayed = replay.replayed, 0
    whole = replay._next(module.host, 63).tolist()
    replay.replayed = 0
    cut = [row for _ in range(batches) for row in replay._next(module.host, number).tolist()]
    replay.replayed = before
    assert sorted(whole[:30]) == sorted(whole[30:60]) == list(range(30))
    assert whole[:30] != whole[30:60]
    assert cut == whole[: len(cut)]


# --- the loss ------------------------------------------------------------------------------------


def term_and_rows(
    module: Any, replay: Replay, size: int, share: slice | None = None
) -> tuple[Tensor, Tensor]:
    """Replay's loss term beside a slice of a batch of this size, and the samples that it is over."""
    before, share = replay.replayed, share or slice(0, size)
    rows = replay._next(module.host, size)[share]
    replay.replayed = before
    batch = Batch(torch.empty(0), torch.empty(len(rows)), 0, size, start=share.start)
    term = replay.loss_terms(module.host, batch, torch.empty(0))["replay"].sum()
    replay.replayed = before
    return term, rows


@pytest.mark.parametrize(("mask", "columns"), [("all", 6), ("seen", 6), ("task", 2)])
def test_at_equal_logits_it_is_the_log_of_the_number_of_classes(mask: str, columns: int) -> None:
    """Value, and softmax minus label as the gradient of the head's bias, in each sample's mode."""
    replay = Replay(size=5)
    module, _ = run(replay, mask=mask)
    with torch.no_grad():
        module.network.head.weight.zero_()
        module.network.head.bias.zero_()
    term, rows = term_and_rows(module, replay, 7)
    assert term.item() == pytest.approx(7 * log(columns), rel=1e-6)
    (gradient,) = torch.autograd.grad(term, module.network.head.bias)
    expected = [0.0] * 6
    for row in rows.tolist():
        target, task = int(replay.memory.targets[row]), int(replay.memory.tasks()[row])
        active = range(2 * task, 2 * task + 2) if mask == "task" else range(6)
        for column in active:
            expected[column] += 1 / columns - (column == target)
    assert gradient.tolist() == pytest.approx(expected, abs=1e-6)


def test_it_is_the_sum_of_cross_entropies(learned: Any) -> None:
    """Each written out for one sample in its task's mode."""
    module, replay = learned
    term, rows = term_and_rows(module, replay, 40)
    total = 0.0
    for row in rows.tolist():
        image, target = replay.memory.inputs[row], replay.memory.targets[row]
        task = int(replay.memory.tasks()[row])
        one = module.host.stream.prepare(Batch(image[None], target[None], task, 1))
        with torch.no_grad(), module.task_mode(task):
            probabilities = module(one.inputs)[0].double().softmax(0)
        total -= log(probabilities[int(target)])
    assert term.item() == pytest.approx(total, rel=1e-5)


@pytest.mark.parametrize("size", [1, 2, 33])
def test_the_shares_of_processes_add_up_to_the_whole(learned: Any, size: int) -> None:
    """Also where a process has nothing to do."""
    module, replay = learned
    whole, _ = term_and_rows(module, replay, size)
    parts = []
    for rank in range(3):
        parts.append(term_and_rows(module, replay, size, Share(rank, 3).of(0, size))[0].item())
    assert sum(parts) == pytest.approx(whole.item(), rel=1e-6)


# --- whole runs ----------------------------------------------------------------------------------


def test_size_zero_is_fine_tuning_bit_for_bit() -> None:
    """Weights and random numbers."""
    states = []
    for strategies in ([Replay(**(Replay.null_arguments or {}))], []):
        module, _ = run(*strategies)
        states.append([module.state_dict(), torch.get_rng_state()])
    torch.testing.assert_close(states[0], states[1], rtol=0, atol=0, equal_nan=True)


def test_it_remembers_what_fine_tuning_forgets() -> None:
    """With one head and nobody who names the task."""
    kept, lost = (
        run(*strategies, epochs=4)[0].accuracy_matrix.accuracy[-1]
        for strategies in ([Replay()], [])
    )
    assert kept.mean() > 0.8
    assert lost[:2].max() < 0.1


def test_a_run_that_was_stopped_inside_a_task_goes_on_to_the_same_end(tmp_path: Path) -> None:
    """Memory and order of replay are in the checkpoint, which loads without trust."""

    class Save(L.Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            if trainer.global_step == 15:  # the sixth update of task 1
                trainer.save_checkpoint(tmp_path / "inside.ckpt")

    whole, resumed = Replay(size=5), Replay(size=5)
    module, _ = run(whole, Save())
    again, _ = run(resumed, ckpt_path=tmp_path / "inside.ckpt")
    saved = torch.load(tmp_path / "inside.ckpt", weights_only=True)["callbacks"]
    assert saved[whole.state_key]["replayed"] == 6 * 32
    same_memory(whole, resumed)
    weights = module.state_dict(), again.state_dict()
    torch.testing.assert_close(*weights, rtol=0, atol=0, equal_nan=True)


def test_a_second_fit_of_the_same_object_begins_with_an_empty_memory() -> None:
    """As in a loop over seeds: it learns what a new object does."""
    used, new = Replay(size=5), Replay(size=5)
    run(used)
    weights = [run(replay)[0].state_dict() for replay in (used, new)]
    torch.testing.assert_close(*weights, rtol=0, atol=0, equal_nan=True)
    same_memory(used, new)


# --- what is refused, and its name ---------------------------------------------------------------


def test_a_negative_size_is_refused() -> None:
    """When it is made."""
    with pytest.raises(ConfigurationError) as caught:
        Replay(-1)
    assert str(caught.value) == (
        "Expected size to be 0 or a number of samples per class, but got -1. 0 is fine-tuning."
    )


def test_more_than_a_class_has_is_refused_before_training() -> None:
    """Also where the class is one of the last task."""
    with pytest.raises(
        ConfigurationError,
        match=r"size to be at most the \d+ training samples of class '\d' in task \d, but got 130\.",
    ):
        run(Replay(130))


def test_it_is_registered_under_its_name() -> None:
    """Where the package is installed: this is what `bpn-fit --method replay` finds."""
    (found,) = entry_points(group="bpn_lightning.strategies", name="replay")
    assert found.load() is Replay
