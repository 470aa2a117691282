"""Several streams as one: what each would give alone, numbered through."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from jsonargparse import ArgumentParser
from lightning.pytorch import Callback

from bpn_lightning.datamodules import ContinualDataModule, Gaussians, SplitDigits, StreamOf
from bpn_lightning.errors import ConfigurationError
from bpn_lightning.strategies import EWC, JointTraining
from bpn_lightning.tasks import Batch, TrainingEpoch

Make = Callable[..., Any]

FIRST = {"classes_per_task": 2, "epochs_per_task": [1, 2, 1], "batch_size": 8, "augment": True}
SECOND = {"classes_per_task": 3, "epochs_per_task": 1, "batch_size": 5, "seed": 4}


@pytest.fixture
def pair(toy: Make) -> tuple[StreamOf, list[Any]]:
    """Two streams as one, and the same two alone."""
    arguments = [
        {**FIRST, "validation_fraction": 0.3, "seed": 0},
        {**SECOND, "validation_fraction": 0.2, "class_order_seed": 1},
    ]
    whole = StreamOf([toy(**a) for a in arguments])
    whole.setup()
    return whole, [toy(**a) for a in arguments]


def same(found: Batch, alone: Batch, task: int, column: int) -> bool:
    return (
        torch.equal(found.inputs, alone.inputs)
        and torch.equal(found.targets, alone.targets + column)
        and torch.equal(torch.as_tensor(found.task), torch.as_tensor(alone.task + task))
        and found.global_size == alone.global_size
        and (found.augmentation is None) == (alone.augmentation is None)
    )


PLACES = [(0, 0), (0, 0), (0, 0), (3, 6), (3, 6)]  # of each task's stream: first task, first column


def test_tasks_are_numbered_through_and_columns_come_one_after_another(pair: Any) -> None:
    whole, alone = pair
    assert [task.id for task in whole.tasks] == [0, 1, 2, 3, 4]
    assert [task.columns for task in whole.tasks] == [(0, 2), (2, 4), (4, 6), (6, 9), (9, 12)]
    assert [task.epochs for task in whole.tasks] == [1, 2, 1, 1, 1]
    names = [task.class_names for stream in alone for task in stream.tasks]
    assert [task.class_names for task in whole.tasks] == names
    assert (whole.num_classes, whole.input_shape, whole.has_validation) == (12, (3, 8, 8), True)


@pytest.mark.parametrize("task", range(5))
def test_every_loader_gives_what_the_stream_gives_alone(pair: Any, task: int) -> None:
    whole, alone = pair
    first, column = PLACES[task]
    stream = alone[first > 0]
    loaders = [
        (whole.loader(task, split, 4), stream.loader(task - first, split, 4))
        for split in ("train", "val", "test")
    ]
    loaders += [(whole.train_loader(task, e), stream.train_loader(task - first, e)) for e in (0, 1)]
    for ours, theirs in loaders:
        assert len(ours) == len(theirs)
        for found, expected in zip(ours, theirs, strict=True):
            assert same(found, expected, first, column)
            prepared, wanted = whole.prepare(found, True), stream.prepare(expected, True)
            assert torch.equal(prepared.inputs, wanted.inputs), "its own normalization"
            assert torch.equal(torch.as_tensor(prepared.task), torch.as_tensor(found.task))


def test_normalizations_differ_here(pair: Any) -> None:
    assert pair[1][0].normalization != pair[1][1].normalization


def test_a_batch_of_several_streams_is_prepared_by_each(pair: Any) -> None:
    whole, _ = pair
    batches = [next(iter(whole.loader(task, "train", 6))) for task in (4, 0, 3)]
    mixed = Batch(
        torch.cat([b.inputs for b in batches]),
        torch.cat([b.targets for b in batches]),
        torch.cat([torch.full_like(b.targets, b.task) for b in batches]),
        18,
    )
    order = torch.randperm(18)
    mixed = mixed._replace(inputs=mixed.inputs[order], task=mixed.task[order])
    expected = torch.cat([whole.prepare(b).inputs for b in batches])[order]
    assert torch.equal(whole.prepare(mixed).inputs, expected)


@pytest.mark.parametrize("world_size", [1, 3])
def test_test_and_validation_take_every_sample_once_in_every_process(
    pair: Any, world_size: int
) -> None:
    whole, alone = pair
    expected = [
        (task + first, n)
        for stream, first in zip(alone, (0, 3), strict=True)
        for task in range(len(stream.tasks))
        for batch in stream.loader(task, "test")
        for n in batch.inputs[:, 0, 0, 0].tolist()
    ]
    found, validated = [], set()
    for rank in range(world_size):
        whole.trainer = SimpleNamespace(
            global_rank=rank,
            world_size=world_size,
        )
        whole.follow(lambda: TrainingEpoch(3, 0, [3]))
        for batch in whole.test_dataloader():
            found += zip(batch.task.tolist(), batch.inputs[:, 0, 0, 0].tolist(), strict=True)
        for batch in whole.val_dataloader():
            validated |= set(batch.task.tolist())
    assert sorted(found) == sorted(expected)
    assert validated == {0, 1, 2, 3}


def test_tasks_of_several_streams_are_mixed_batch_by_batch(pair: Any) -> None:
    whole, alone = pair
    loader = whole.train_loader(4, 0, [0, 1, 2, 3, 4])
    batches = list(loader)
    assert len(batches) == len(loader)
    streams = [set((b.task >= 3).tolist()) for b in batches]
    assert all(len(of_one) == 1 for of_one in streams), "one stream in a batch"
    order = [of_one.pop() for of_one in streams]
    assert order not in (sorted(order), sorted(order, reverse=True)), "and they come mixed"
    for task in range(5):
        first, _ = PLACES[task]
        count = sum(int((b.task == task).sum()) for b in batches)
        assert count == len(alone[first > 0].members(task - first, "train"))
    for done in (0, 3, 6):
        loader = whole.train_loader(4, 0, [0, 1, 2, 3, 4])
        loader.load_state_dict({"processed": done})
        rest = list(loader)
        assert len(rest) == len(batches) - done
        for again, before in zip(rest, batches[done:], strict=True):
            assert same(again, before, 0, 0)


def test_columns_may_be_shared(toy: Make) -> None:
    whole = StreamOf(
        [toy(classes_per_task=6), toy(classes_per_task=6, seed=1)], shared_columns=True
    )
    whole.setup()
    assert [task.columns for task in whole.tasks] == [(0, 6), (0, 6)]
    assert whole.num_classes == 6
    (batch,) = whole.loader(1, "test", 100)
    assert int(batch.targets.max()) == 5


def test_a_part_without_a_seed_takes_that_of_the_whole() -> None:
    parts = [SplitDigits(num_tasks=1), SplitDigits(num_tasks=1, seed=2)]
    StreamOf(parts, seed=7).setup()
    assert [part.seed for part in parts] == [7, 2]


def test_bad_lists_are_refused(toy: Make) -> None:
    with pytest.raises(ConfigurationError, match="at least one stream"):
        StreamOf([])
    with pytest.raises(ConfigurationError, match="list streams, but got str"):
        StreamOf(["SplitDigits"])  # type: ignore[list-item]
    with pytest.raises(ConfigurationError, match="validation_fraction"):
        StreamOf([toy(), toy(validation_fraction=0.1)])
    held = {"validation_fraction": 0.1}
    with pytest.raises(ConfigurationError, match="evaluation_split to be the same in all streams"):
        StreamOf([toy(**held), toy(**held, evaluation_split="val")])
    with pytest.raises(ConfigurationError, match=r"one shape, but got .*\(2,\)"):
        StreamOf([toy(), Gaussians()]).setup()
    with pytest.raises(ConfigurationError, match="share columns"):
        StreamOf([toy(), toy(num_tasks=1)], shared_columns=True).setup()
    with pytest.raises(ConfigurationError, match="Use its streams"):
        StreamOf([toy()]).read()


def test_a_yaml_may_list_the_streams(tmp_path: Path) -> None:
    config = tmp_path / "data.yaml"
    config.write_text(
        "data:\n"
        "  class_path: bpn_lightning.datamodules.stream_of.StreamOf\n"
        "  init_args:\n"
        "    seed: 3\n"
        "    streams:\n"
        "    - class_path: SplitDigits\n"
        "      init_args: {num_tasks: 2}\n"
        "    - class_path: bpn_lightning.datamodules.digits.SplitDigits\n"
        "      init_args: {num_tasks: 1, classes_per_task: 4}\n"
    )
    parser = ArgumentParser()
    parser.add_argument("--config", action="config")
    parser.add_subclass_arguments(ContinualDataModule, "data")
    stream = parser.instantiate(parser.parse_args(["--config", str(config)])).data
    stream.setup()
    assert [task.columns for task in stream.tasks] == [(0, 2), (2, 4), (4, 8)]


# ---------------------------------------------------------------------- learned


def digits() -> StreamOf:
    common = {"epochs_per_task": 2, "batch_size": 64}
    return StreamOf(
        [
            SplitDigits(num_tasks=1, classes_per_task=4, **common),
            SplitDigits(num_tasks=2, class_order=[4, 5, 6, 7], **common),
        ],
        seed=0,
    )


def test_streams_of_one_data_set_are_learned_as_one_stream_of_it(fit: Any) -> None:
    """Bit for bit: two streams that take turns, and the stream whose halves they are."""

    def half(order: list[int]) -> SplitDigits:
        return SplitDigits(num_tasks=1, class_order=order, epochs_per_task=1, seed=0)

    whole = SplitDigits(num_tasks=2, epochs_per_task=1, seed=0)
    one, _ = fit([EWC(strength=1.0)], stream=whole)
    of_two, _ = fit([EWC(strength=1.0)], stream=StreamOf([half([0, 1]), half([2, 3])], seed=0))
    first, second = (m.accuracy_matrix.accuracy[:2] for m in (one, of_two))
    assert torch.equal(first, second), "up to the second task, whose order has another key"


@pytest.mark.slow
@pytest.mark.parametrize("method", [EWC, JointTraining])
def test_a_resumed_run_ends_where_an_unbroken_one_does(
    fit: Any, tmp_path: Path, method: Any
) -> None:
    moments = (5, 17, 33)

    class Save(Callback):
        def on_train_batch_end(self, trainer: Any, *arguments: Any) -> None:
            if trainer.global_step in moments:
                trainer.save_checkpoint(tmp_path / f"{trainer.global_step}.ckpt")

    whole, trainer = fit([method(), Save()], stream=digits())
    assert trainer.global_step > max(moments)
    for stop in moments:
        resumed, _ = fit([method()], stream=digits(), ckpt_path=tmp_path / f"{stop}.ckpt")
        for name, value in whole.state_dict().items():
            assert torch.equal(value, resumed.state_dict()[name]), (stop, name)
