"""Tasks of unequal sizes, tasks of samples, and blurry boundaries."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from bpn_lightning.datamodules import (
    ClassIncrementalDataModule,
    ContinualDataModule,
    SplitDigits,
)
from bpn_lightning.datamodules.division import SamplesOfTasks
from bpn_lightning.datamodules.loading import Samples
from bpn_lightning.datamodules.readers import ImageData
from bpn_lightning.datamodules.splitting import blur_boundaries
from bpn_lightning.errors import ConfigurationError, DataError
from bpn_lightning.strategies import EWC, GradientEpisodicMemory, LearningWithoutForgetting
from bpn_lightning.tasks import Split, Task

Make = Callable[..., Any]
TRAIN_COUNTS = (13, 8, 11, 9, 10, 7)  # of the toy's classes
TEST_COUNTS = (4, 3, 5, 2, 3, 4)


def labels(stream: Any, task: int, split: Split) -> list[int]:
    """The toy's classes of a task's samples; its images say them."""
    return [c for batch in stream.loader(task, split) for c in batch.inputs[:, 1, 0, 0].tolist()]


# --- unequal tasks -------------------------------------------------------------------------------


def test_tasks_may_have_classes_of_their_own_number(toy: Make) -> None:
    stream = toy(classes_per_task=[3, 1, 2], class_order=[5, 4, 3, 2, 1, 0])
    assert [task.columns for task in stream.tasks] == [(0, 3), (3, 4), (4, 6)]
    names = [("fox", "elk", "dog"), ("cat",), ("bee", "ant")]
    assert [task.class_names for task in stream.tasks] == names
    assert stream.num_classes == 6
    wanted = [{5, 4, 3}, {2}, {1, 0}]
    for task in range(3):
        for split in ("train", "test"):
            assert set(labels(stream, task, split)) == wanted[task]
            for batch in stream.loader(task, split):
                assert torch.equal(batch.targets, 5 - batch.inputs[:, 1, 0, 0].long())


def test_equal_sizes_are_those_of_one_number(toy: Make) -> None:
    assert toy(classes_per_task=[2, 2, 2]).tasks == toy(classes_per_task=2).tasks
    shared = {"domain_incremental": True}
    assert toy(classes_per_task=[2, 2], **shared).tasks == toy(num_tasks=2, **shared).tasks


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            {"classes_per_task": [4, 3]},
            r"the sum of classes_per_task to be at most the 6 classes of the toy in here, but got 4 \+ 3 = 7\.",
        ),
        (
            {"classes_per_task": [2, 2], "num_tasks": 3},
            "one entry for each task, 3 in all, but got 2. Give one number for all tasks, 3 of them, or another",
        ),
        ({"classes_per_task": []}, "one entry for each task, 1 in all, but got 0"),
        (
            {"classes_per_task": [2, 0]},
            "classes_per_task to be a whole number of at least 1, but got 0",
        ),
        (
            {"classes_per_task": [2, 1], "domain_incremental": True},
            r"the same for all tasks in a domain-incremental stream.* but got \[2, 1\]",
        ),
        ({"classes_per_task": [3, 3], "epochs_per_task": [1]}, "one entry for each of the 2 tasks"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(toy: Make, arguments: Any, said: str) -> None:
    with pytest.raises(ConfigurationError, match=said):
        toy(**arguments)


@pytest.mark.parametrize("mask", ["all", "seen", "task"])
def test_unequal_tasks_are_learned_under_every_mask(fit: Make, mask: Any) -> None:
    stream = SplitDigits(classes_per_task=[4, 2, 3], epochs_per_task=1, validation_fraction=0.1)
    strategies = [EWC(strength=1.0, update="clamped"), GradientEpisodicMemory(memory_size=12)]
    module, _ = fit(strategies, stream=stream, mask=mask)
    assert module.network.head.out_features == 9
    assert module.closed == 2


# --- samples -------------------------------------------------------------------------------------


@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.5, 0.95])
def test_a_fraction_of_each_class_is_spread_over_the_other_tasks(fraction: float) -> None:
    labels = torch.arange(2400) % 6
    tasks = blur_boundaries(labels, [[0, 1], [4], [2, 3]], fraction, seed=0)
    together = torch.cat(tasks).sort().values
    assert together.tolist() == (labels != 5).nonzero().flatten().tolist(), "each once, but class 5"
    for task, own in enumerate([[0, 1], [4], [2, 3]]):
        counts = labels[tasks[task]].bincount(minlength=6)
        others = [one for one in range(5) if one not in own]
        assert counts[own].tolist() == [400 - round(400 * fraction)] * len(own)
        # Binomial(400 * fraction, 1 / 2): within four deviations.
        spare = (400 * fraction / 4) ** 0.5 * 4
        assert all(abs(counts[one] - 200 * fraction) <= spare for one in others)
    again, other = (
        blur_boundaries(labels, [[0, 1], [4], [2, 3]], fraction, seed) for seed in (0, 1)
    )
    assert all(map(torch.equal, tasks, again))
    assert fraction == 0 or not all(map(torch.equal, tasks, other))


def test_boundaries_may_be_blurry(toy: Make) -> None:
    plain, stream = toy(seed=2), toy(seed=2, blurry=0.3)
    assert [task.columns for task in stream.tasks] == [(0, 6)] * 3
    assert {task.class_names for task in stream.tasks} == {plain.classes}
    for task in range(3):
        found, own = labels(stream, task, "train"), set(labels(plain, task, "train"))
        moved = sum(one not in own for one in found)
        assert 0 < moved < len(found) / 2
        assert sorted(labels(stream, task, "test")) == sorted(labels(plain, task, "test"))
        for batch in stream.loader(task, "train"):
            assert torch.equal(batch.targets, batch.inputs[:, 1, 0, 0].long())
    everything = sorted(n for task in range(3) for n in labels(stream, task, "train"))
    assert everything == [c for c, count in enumerate(TRAIN_COUNTS) for _ in range(count)]


def test_nothing_is_blurry_at_nought(toy: Make) -> None:
    assert toy(blurry=0.0).tasks == toy().tasks


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"blurry": 1.0}, "Expected blurry to be at least 0 and below 1, .* but got 1.0. Use 0.1"),
        ({"blurry": 0.1, "domain_incremental": True}, "and 0 in a domain-incremental stream"),
        ({"blurry": 0.1, "classes_per_task": 6}, "two or more tasks where boundaries are blurry"),
    ],
)
def test_what_cannot_be_blurry_is_refused(toy: Make, arguments: Any, said: str) -> None:
    with pytest.raises(ConfigurationError, match=said):
        toy(**arguments)


@pytest.mark.parametrize(
    "strategy",
    [EWC(strength=1.0), GradientEpisodicMemory(memory_size=20), LearningWithoutForgetting()],
)
def test_blurry_tasks_are_learned(fit: Make, strategy: Any) -> None:
    """All strategies' tasks are as those of domain-incremental streams: all classes, in shared columns."""
    stream = SplitDigits(
        num_tasks=2, epochs_per_task=2, blurry=0.2, seed=0, validation_fraction=0.1
    )
    module, _ = fit([strategy], stream=stream, mask="shared")
    assert module.closed == 1
    assert module.accuracy_matrix.summary()["after_learning"]["average"] > 0.5


def test_the_mask_that_blurry_tasks_need_is_named(fit: Make) -> None:
    stream = SplitDigits(num_tasks=2, epochs_per_task=1, blurry=0.2)
    with pytest.raises(ConfigurationError, match="Expected mask to be 'shared'"):
        fit(stream=stream)


def data_of_six_classes() -> ImageData:
    """As the toy's: an image's second channel is its class."""

    def samples(counts: tuple[int, ...]) -> Samples:
        labels = torch.arange(6).repeat_interleave(torch.tensor(counts))
        images = torch.stack([torch.arange(len(labels)), labels], dim=1).byte()
        return Samples(images[:, :, None, None].repeat(1, 1, 8, 8), labels)

    names = ["ant", "bee", "cat", "dog", "elk", "fox"]
    return ImageData(samples(TRAIN_COUNTS), samples(TEST_COUNTS), names, "here")


@dataclass(eq=False, repr=False)
class Given(ContinualDataModule):
    """Tasks as a test gives them."""

    division: Any = None

    def read(self) -> ImageData:
        return data_of_six_classes()

    def divide(self, data: ImageData) -> tuple[list[Task], list[list[int]], SamplesOfTasks]:
        return self.division


def overlapping(**changes: Any) -> Any:
    """Two tasks that share a class, in one column, and some samples."""
    tasks = [Task(0, (0, 3), ("ant", "bee", "cat"), 1), Task(1, (2, 5), ("cat", "dog", "elk"), 1)]
    data = data_of_six_classes()
    of = {
        part: (samples.labels < 3, (samples.labels > 1) & (samples.labels < 5))
        for part, samples in (("train", data.train), ("test", data.test))
    }
    samples = {
        part: [mask.nonzero().flatten().flip(0) for mask in masks] for part, masks in of.items()
    }
    return tasks, [[0, 1, 2], [2, 3, 4]], samples | changes


def test_a_class_may_be_in_several_tasks() -> None:
    stream = Given(division=overlapping(), validation_fraction=0.2, seed=0)
    stream.setup()
    assert (len(stream.tasks), stream.num_classes) == (2, 5)
    for task, classes in enumerate([{0, 1, 2}, {2, 3, 4}]):
        for split in ("train", "val", "test"):
            assert set(labels(stream, task, split)) <= classes
            for batch in stream.loader(task, split):
                assert torch.equal(batch.targets, batch.inputs[:, 1, 0, 0].long())
    numbers = [
        {*stream.members(k, "train").tolist(), *stream.members(k, "val").tolist()} for k in (0, 1)
    ]
    assert numbers == [set(one.tolist()) for one in overlapping()[2]["train"]]
    assert not {*stream.members(0, "train").tolist()} & {*stream.members(0, "val").tolist()}


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        (
            [[0, 0], [30]],
            ConfigurationError,
            r"task 0 indices into the 58 samples of train.*each once",
        ),
        ([[0], [58]], ConfigurationError, r"task 1 indices into the 58 samples of train"),
        ([[-1], [30]], ConfigurationError, r"task 0 indices into the 58 samples of train"),
        ([[0.0], [30]], ConfigurationError, r"task 0 indices into the 58 samples of train, int64"),
        (
            [[*range(58)], [30]],
            ConfigurationError,
            r"task 0 samples of its own classes \(ant, bee, cat\)",
        ),
        (
            [[], []],
            DataError,
            "Expected every task to have training samples of here, but got none for task 0",
        ),
    ],
)
def test_samples_that_are_not_there_are_refused(change: Any, error: Any, said: str) -> None:
    indices = [torch.tensor(one, dtype=None if one else torch.int64) for one in change]
    if change == [[0], [58]]:
        indices[0] = overlapping()[2]["train"][0]
    with pytest.raises(error, match=said):
        Given(division=overlapping(train=indices)).setup()


def test_a_class_in_two_columns_is_refused() -> None:
    """Its targets would be those of the later task in both, without a word."""
    tasks, classes, _ = overlapping()
    tasks = [Task(0, (0, 3), tasks[0].class_names, 1), Task(1, (0, 3), tasks[1].class_names, 1)]
    with pytest.raises(ConfigurationError, match=r"same column .* but got 2 and 0 for 'cat'"):
        Given(division=(tasks, classes)).setup()


# --- what read gives -----------------------------------------------------------------------------


@dataclass(eq=False, repr=False)
class Odd(ClassIncrementalDataModule):
    """Data as a test changes them."""

    change: Any = None

    def read(self) -> ImageData:
        return self.change(data_of_six_classes())


def part(inputs: Any = None, labels: Any = None) -> Callable[[ImageData], ImageData]:
    def change(data: ImageData) -> ImageData:
        return data._replace(
            train=Samples(
                inputs(data.train.images) if inputs else data.train.images,
                labels(data.train.labels) if labels else data.train.labels,
            )
        )

    return change


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            part(labels=torch.Tensor.float),
            "but got torch.float32. Regression targets are not classes",
        ),
        (
            part(labels=torch.Tensor.byte),
            r"to be int64, but got torch.uint8. Convert them with .long\(\)",
        ),
        (
            part(labels=lambda one: one[:-1]),
            r"one label for each of the 58 training samples of here",
        ),
        (part(labels=lambda one: one + 1), "indices into its 6 class names, but got 1 to 6"),
        (
            part(inputs=torch.Tensor.int),
            "uint8, features as floats or tokens as int64, but got torch.int32",
        ),
        (part(inputs=torch.Tensor.float), r"of one dtype and shape, but got \(torch.float32"),
        (part(inputs=lambda one: one[..., :4]), "of one dtype and shape"),
        (
            part(inputs=lambda one: one / 0),
            "the training features of here to be finite, but some are not",
        ),
    ],
)
def test_data_that_no_stream_can_be_made_of_are_refused(change: Any, said: str) -> None:
    with pytest.raises(DataError, match=said):
        Odd(change=change).setup()
