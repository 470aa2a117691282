"""Permuted and rotated MNIST, from made files in torchvision's layout."""

import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.ndimage import rotate
from torch import Tensor

from bpn_lightning.datamodules import PermutedMNIST, RotatedMNIST, SplitMNIST
from bpn_lightning.errors import ConfigurationError
from bpn_lightning.strategies import EWC
from bpn_lightning.tasks import Batch

COUNT = 60


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Random images, six of each digit in each part."""
    folder = tmp_path / "MNIST" / "raw"
    folder.mkdir(parents=True)
    generator = np.random.default_rng(0)
    for part in ("train", "t10k"):
        images = generator.integers(256, size=(COUNT, 28, 28), dtype=np.uint8)
        labels = (np.arange(COUNT) % 10).astype(np.uint8)
        for name, array in {"images-idx3": images, "labels-idx1": labels}.items():
            sizes = struct.pack(f">{array.ndim}I", *array.shape)
            content = bytes([0, 0, 8, array.ndim]) + sizes + array.tobytes()
            (folder / f"{part}-{name}-ubyte").write_bytes(content)
    return tmp_path


@pytest.fixture
def make(root: Path) -> Callable[..., Any]:
    def made(kind: Any = PermutedMNIST, **arguments: object) -> Any:
        stream = kind(root=str(root), download=False, seed=0, **arguments)
        stream.setup()
        return stream

    return made


def whole(stream: Any, task: int, split: str = "test") -> Batch:
    """All of a task's samples, raw."""
    (batch,) = stream.loader(task, split, COUNT)
    return batch


def seen(stream: Any, task: int) -> Tensor:
    inputs: Tensor = stream.prepare(whole(stream, task)).inputs
    return inputs


def test_every_task_has_all_digits_and_the_same_columns(make: Any) -> None:
    stream = make(num_tasks=4, epochs_per_task=[1, 2, 3, 4])
    digits = tuple("0123456789")
    assert [(t.id, t.columns, t.class_names) for t in stream.tasks] == [
        (task, (0, 10), digits) for task in range(4)
    ]
    assert [task.epochs for task in stream.tasks] == [1, 2, 3, 4]
    assert (stream.num_classes, stream.input_shape) == (10, (1, 28, 28))
    for task in range(4):
        assert whole(stream, task).targets.tolist() == [n % 10 for n in range(COUNT)]


def test_each_task_has_the_pixels_in_an_order_of_its_own(make: Any, root: Path) -> None:
    """Every image of a task is numpy's indexing of the plain one by one permutation of 784."""
    stream = make(num_tasks=3)
    split = SplitMNIST(str(root), num_tasks=1, classes_per_task=10, download=False)
    split.setup()
    plain = seen(split, 0).flatten(1).numpy()
    orders = [stream.permutation(task).numpy() for task in range(3)]
    for task, order in enumerate(orders):
        assert sorted(order) == list(range(784))
        np.testing.assert_array_equal(seen(stream, task).flatten(1).numpy(), plain[:, order])
    assert (orders[0] != orders[1]).mean() > 0.9
    assert (orders[1] != orders[2]).mean() > 0.9
    assert (orders[0] != np.arange(784)).mean() > 0.9


def test_the_first_task_may_stay_as_it_is(make: Any) -> None:
    plain, permuted = make(permute_first_task=False), make()
    split = make(SplitMNIST, num_tasks=1, classes_per_task=10)
    assert torch.equal(seen(plain, 0), seen(split, 0))
    assert torch.equal(seen(plain, 1), seen(permuted, 1))


def test_permutations_follow_the_seed_and_not_the_number_of_tasks(make: Any) -> None:
    short, long = make(num_tasks=3), make(num_tasks=30)
    assert all(torch.equal(short.permutation(k), long.permutation(k)) for k in range(3))
    other = make(num_tasks=3)
    other.seed = 1
    assert not torch.equal(short.permutation(0), other.permutation(0))


@pytest.mark.parametrize("kind", [PermutedMNIST, RotatedMNIST])
def test_a_batch_of_several_tasks_has_each_image_as_its_own_task_has_it(
    make: Any, kind: Any
) -> None:
    stream = make(kind, num_tasks=3)
    batch = whole(stream, 0)
    tasks = torch.arange(COUNT) % 3
    mixed = stream.prepare(batch._replace(task=tasks)).inputs
    for task in range(3):
        torch.testing.assert_close(mixed[tasks == task], seen(stream, task)[tasks == task])


def test_test_and_training_batches_of_all_tasks_agree_with_single_ones(make: Any) -> None:
    stream = make(num_tasks=2, eval_batch_size=COUNT, batch_size=COUNT)
    for task, batch in enumerate(stream.test_dataloader()):
        assert batch.task.tolist() == [task] * COUNT
        assert torch.equal(stream.prepare(batch).inputs, seen(stream, task))
    trained = [int(t) for b in stream.train_loader(1, 0, [0, 1]) for t in b.task]
    assert sorted(trained) == [0] * COUNT + [1] * COUNT


def test_nothing_is_copied_for_a_task(make: Any) -> None:
    """A hundred tasks hold what one does, the images are one tensor, and set-up is as quick."""
    sizes = []
    for num_tasks in (2, 100):
        tracemalloc.start()
        stream = make(num_tasks=num_tasks)
        sizes.append(tracemalloc.get_traced_memory()[0])
        tracemalloc.stop()
        for split in ("train", "test"):
            stores = {id(stream.loader(task, split).samples) for task in range(num_tasks)}
            assert len(stores) == 1
            members = {stream.members(task, split).data_ptr() for task in range(num_tasks)}
            assert len(members) == 1
        for task in range(num_tasks):
            seen(stream, task)
        tensors = [v for v in vars(stream).values() if isinstance(v, Tensor)]
        assert not tensors
    assert sizes[1] - sizes[0] < 100 * 1000  # bytes: the tasks' names and numbers


def test_the_whole_held_out_part_is_evaluated_whatever_test_samples_says(make: Any) -> None:
    held = {"validation_fraction": 0.5, "evaluation_split": "val"}
    stream = make(num_tasks=2, test_samples=60, **held)
    assert len(stream.members(1, "test")) == COUNT // 2
    assert torch.equal(stream.members(1, "test"), stream.members(1, "val"))


def test_a_task_may_take_a_part_of_the_images(make: Any) -> None:
    stream = make(num_tasks=3, train_samples=20, test_samples=7)
    drawn = [frozenset(stream.members(task, "train").tolist()) for task in range(3)]
    assert [len(own) for own in drawn] == [20, 20, 20]
    assert len(set(drawn)) == 3, "a draw for each task"
    assert torch.equal(stream.members(1, "train"), make(train_samples=20).members(1, "train"))
    assert [len(whole(stream, task).targets) for task in range(3)] == [7, 7, 7]
    assert sum(len(b.targets) for b in stream.train_loader(0, 0)) == 20
    assert len(stream.test_dataloader().indices) == 21


def test_what_is_held_out_is_not_drawn(make: Any) -> None:
    stream = make(validation_fraction=0.5, train_samples=30)
    held = set(stream.members(0, "val").tolist())
    assert len(held) == 30
    assert not held & set(stream.members(0, "train").tolist())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_tasks": 0}, "num_tasks"),
        ({"train_samples": 0}, "train_samples"),
        ({"train_samples": 61}, "at most the 60 available images"),
        ({"test_samples": 61}, "at most the 60 available images"),
        ({"num_tasks": 3, "epochs_per_task": [1, 2]}, "epochs_per_task"),
    ],
)
def test_bad_numbers_are_refused(make: Any, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        make(**arguments)


# ---------------------------------------------------------------------- rotated


def test_images_are_turned_as_scipy_turns_them(make: Any) -> None:
    stream = make(RotatedMNIST, num_tasks=4, max_angle=180.0)
    assert [stream.angle(task) for task in range(4)] == [0, 45, 90, 135]
    mean, std = stream.normalization.mean[0], stream.normalization.std[0]
    pixels = whole(stream, 0).inputs[:5, 0].numpy() / 255
    inside = np.hypot(*np.mgrid[-13.5:14, -13.5:14]) < 13  # scipy's edges are its own
    for task in range(4):
        turned = seen(stream, task)[:5, 0].numpy() * std + mean
        for ours, image in zip(turned, pixels, strict=True):
            theirs = rotate(image, stream.angle(task), reshape=False, order=1)
            np.testing.assert_allclose(ours[inside], theirs[inside], atol=2e-3)


def test_what_turns_in_from_outside_is_black(make: Any) -> None:
    stream = make(RotatedMNIST, num_tasks=4)
    white = whole(stream, 1)._replace(inputs=torch.full((COUNT, 1, 28, 28), 255).byte())
    turned = stream.prepare(white).inputs
    corner, middle = turned[:, 0, 0, 0], turned[:, 0, 14, 14]
    mean, std = stream.normalization.mean[0], stream.normalization.std[0]
    torch.testing.assert_close(corner, torch.full((COUNT,), -mean / std))
    torch.testing.assert_close(middle, torch.full((COUNT,), (1 - mean) / std))


# ---------------------------------------------------------------------- learned


def test_a_stream_is_learned_and_evaluated_on_the_tasks_seen_and_the_next(
    make: Any, fit: Any
) -> None:
    arguments = {"num_tasks": 4, "epochs_per_task": 1}
    few, _ = fit(
        [EWC(strength=1.0)], stream=make(**arguments), mask="shared", evaluate_on="seen_and_next"
    )
    everything, _ = fit([EWC(strength=1.0)], stream=make(**arguments), mask="shared")
    measured = few.accuracy_matrix.accuracy
    for learned in range(5):
        count = 4 if learned == 0 else min(learned + 1, 4)
        assert measured[learned].isnan().tolist() == [task >= count for task in range(4)]
    known = ~measured.isnan()
    assert torch.equal(measured[known], everything.accuracy_matrix.accuracy[known])
    summaries = [run.accuracy_matrix.summary() for run in (few, everything)]
    for key in ("average", "first_task", "bwt", "fwt"):
        assert summaries[0][key] == summaries[1][key]
