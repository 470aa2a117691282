"""Streams that continue another one: tasks, draws and inputs are those of one stream of all tasks."""

from collections.abc import Callable, Collection
from typing import Any

import numpy as np
import pytest
import torch

from bpn_lightning.datamodules import (
    ContinualDataModule,
    PermutedMNIST,
    RotatedMNIST,
    SplitArrays,
    SplitMNIST,
    StreamOf,
)
from bpn_lightning.datamodules.loading import Samples
from bpn_lightning.datamodules.readers import ImageData
from bpn_lightning.errors import ConfigurationError, DataError
from bpn_lightning.preparation import prepare_raw
from bpn_lightning.tasks import Batch, Past

Make = Callable[..., Any]


def past_of(stream: ContinualDataModule, shared: bool = False) -> Past:
    tasks = tuple(stream.tasks)
    return Past(tasks, tuple(stream.preparations()), stream.seed, shared, len(tasks))


def continued(stream: Any, past: ContinualDataModule, shared: bool = False, **data: Any) -> Any:
    stream.continue_from(past_of(past, shared), **data)
    stream.setup()
    return stream


def batches(stream: Any, task: int, epoch: int) -> list[Batch]:
    """Of training, prepared; then those to evaluate."""
    found = [stream.prepare(batch, augment=True) for batch in stream.train_loader(task, epoch)]
    for split in ("val", "test") if stream.has_validation else ("test",):
        found += [stream.prepare(batch) for batch in stream.loader(task, split, max_samples=3)]
    return found


def same(one: list[Batch], other: list[Batch]) -> None:
    assert len(one) == len(other) > 1
    for mine, theirs in zip(one, other, strict=True):
        assert mine.task == theirs.task
        assert torch.equal(mine.inputs, theirs.inputs)
        assert torch.equal(mine.targets, theirs.targets)


def test_tasks_and_draws_go_on_where_the_past_ended(toy: Make) -> None:
    arguments = {"batch_size": 4, "augment": True, "validation_fraction": 0.3}
    whole = toy(**arguments, seed=5)
    before = toy(**arguments, seed=5, class_order=[0, 1, 2, 3])
    after = continued(toy(**arguments, class_order=[4, 5]), before)
    after.seed = None
    after = continued(after, before)
    assert after.tasks == whole.tasks
    assert (after.num_classes, after.seed, after.first_task) == (6, 5, 2)
    assert after.normalization == whole.normalization
    assert after.preparations() == whole.preparations()
    for epoch in (0, 1):
        same(batches(after, 2, epoch), batches(whole, 2, epoch))


def arrays(classes: Collection[str]) -> dict[str, Any]:
    """Samples 0 to 39 of each class, numbered by their only feature."""
    labels = np.repeat(sorted(classes), 40)
    numbers = np.tile(np.arange(40.0)[:, None], (len(classes), 1))
    return {
        f"{part}_{name}": v
        for part in ("train", "test")
        for name, v in (("features", numbers), ("labels", labels))
    }


def test_samples_are_held_out_by_the_label_in_the_data_set() -> None:
    """So a continuation holds out what one stream of all tasks does, unless its arrays are others."""

    def stream(classes: str, **given: Any) -> Any:
        return SplitArrays(arrays(classes), standardize=False, validation_fraction=0.25, **given)

    def held(one: Any) -> list[float]:
        return [x for b in one.loader(2, "val") for x in one.prepare(b).inputs.flatten().tolist()]

    whole = stream("abc", classes_per_task=1, seed=5)
    whole.setup()
    before = stream("abc", classes_per_task=1, seed=5, class_order=["a", "b"])
    before.setup()
    assert len(held(whole)) == 10
    assert held(
        continued(stream("abc", classes_per_task=1, class_order=["c"], seed=5), before)
    ) == held(whole)
    others = held(continued(stream("c", classes_per_task=1, seed=5), before))
    assert len(others) == 10
    assert others != held(whole)


def test_a_domain_goes_on_in_the_same_columns(toy: Make) -> None:
    arguments = {"domain_incremental": True, "seed": 1}
    whole, before = toy(**arguments), toy(**arguments, class_order=[0, 1])
    after = continued(toy(**arguments, class_order=[2, 3, 4, 5]), before, shared=True)
    assert after.tasks == whole.tasks
    same(batches(after, 2, 0), batches(whole, 2, 0))
    with pytest.raises(ConfigurationError, match="of the 2 columns that all learned tasks share"):
        continued(toy(classes_per_task=3, class_order=[2, 3, 4]), before, shared=True)


@pytest.mark.parametrize(
    ("kind", "past", "new"),
    [
        (PermutedMNIST, {"num_tasks": 3}, {"num_tasks": 2}),
        (RotatedMNIST, {"num_tasks": 3, "max_angle": 90}, {"num_tasks": 2, "max_angle": 60}),
    ],
)
def test_transforms_follow_the_number_of_the_task(
    kind: Any, past: Any, new: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = torch.arange(40 * 64).view(40, 1, 8, 8).remainder(251).to(torch.uint8)
    part = Samples(images, torch.arange(40) % 10)
    data = ImageData(part, part, [str(digit) for digit in range(10)], "here")
    monkeypatch.setattr(SplitMNIST, "read", lambda self: data)

    def make(**arguments: Any) -> Any:
        stream = kind(**arguments, seed=2, train_samples=20)
        stream.setup()
        return stream

    both = {name: past[name] + new[name] for name in past}
    whole, before = make(**both), make(**past)
    after = continued(make(**new), before, shared=True)
    raw = images[:4]
    for task in (3, 4):
        same(batches(after, task, 0), batches(whole, task, 0))
        prepared = whole.prepare(Batch(raw, torch.zeros(4), task, 4)).inputs
        assert torch.equal(prepare_raw(after.preparations(), raw, task), prepared)
    ids = torch.tensor([0, 4, 2, 3])
    mixed = whole.prepare(Batch(raw, torch.zeros(4), ids, 4)).inputs
    assert torch.equal(after.prepare(Batch(raw, torch.zeros(4), ids, 4)).inputs, mixed)


def test_streams_of_streams_go_on(toy: Make) -> None:
    def streams(*which: int) -> list[Any]:
        arguments = [
            {"class_order": [0, 1, 2, 3], "seed": 0},
            {"class_order": [4, 5], "seed": 4, "classes_per_task": 1},
        ]
        return [toy(**arguments[one]) for one in which]

    whole, before = StreamOf(streams(0, 1)), StreamOf(streams(0))
    whole.setup()
    before.setup()
    after = continued(StreamOf(streams(1)), before, past_data=before)
    assert after.tasks == whole.tasks
    assert after.preparations() == whole.preparations()
    for task in (2, 3):
        same(batches(after, task, 1), batches(whole, task, 1))
    assert [after.has_data(task) for task in range(4)] == [True] * 4
    (found,), (wanted,) = after.loader(1, "test"), whole.loader(1, "test")
    assert torch.equal(found.inputs, wanted.inputs)
    memory = torch.cat([found.inputs[:2], next(iter(after.loader(3, "test"))).inputs[:1]])
    ids = torch.tensor([1, 1, 3])
    prepared = [one.prepare(Batch(memory, ids, ids, 3)).inputs for one in (after, whole)]
    assert torch.equal(*prepared)
    assert len({one.record()["steps"][0][1][0] for one in after.preparations()}) == 2


def test_what_the_past_has_is_refused_by_name(toy: Make) -> None:
    before = toy(class_order=[0, 1, 2, 3])
    after = continued(toy(class_order=[4, 5]), before)
    assert [after.has_data(task) for task in range(3)] == [False, False, True]
    for ask in (
        lambda: after.members(1, "train"),
        lambda: after.train_loader(2, 0, [0, 1, 2]),
        lambda: after.loader(1, "test"),
    ):
        with pytest.raises(DataError, match=r"Expected data of task [01] \(.*\), but this stream"):
            ask()
    with pytest.raises(ConfigurationError, match="but 'dog' is one of task 1 already"):
        continued(toy(class_order=[3, 4]), before)
    with pytest.raises(
        ConfigurationError, match="Expected past_data to be a stream of the 2 tasks"
    ):
        continued(toy(class_order=[4, 5]), before, past_data=toy(class_order=[0, 1]))


def test_a_stream_is_not_its_own_past(toy: Make) -> None:
    before, after = toy(class_order=[0, 1]), toy(class_order=[4, 5])
    before.setup()
    for one, data in ((after, after), (before, after)):
        with pytest.raises(ConfigurationError, match="Expected past_data to be another stream"):
            one.continue_from(past_of(before), data)
        after.continue_from(past_of(before), before)  # a cycle of two comes next


def test_past_data_may_be_learned_for_another_time(toy: Make) -> None:
    before = toy(class_order=[0, 1])
    before.setup()
    after = continued(
        toy(class_order=[4, 5]), before, past_data=toy(class_order=[0, 1], epochs_per_task=9)
    )
    assert after.has_data(0)
    assert after.tasks[0] == before.tasks[0]


def test_other_inputs_are_refused(toy: Make) -> None:
    class Color(type(toy())):  # type: ignore[misc]
        @staticmethod
        def read_part(part: int, counts: tuple[int, ...]) -> Samples:
            images, labels = toy().read_part(part, counts)
            return Samples(images[:, :1], labels)

    with pytest.raises(
        ConfigurationError, match="Expected raw inputs as those of the learned tasks"
    ):
        continued(Color(class_order=[4, 5]), toy(class_order=[0, 1]))
