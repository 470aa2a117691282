"""What every stream promises, on a toy whose pixels say which sample they belong to."""

import inspect
from collections.abc import Callable
from itertools import chain
from types import SimpleNamespace
from typing import get_args

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torchvision.transforms import Compose, Normalize, ToTensor

from bpn_lightning.datamodules import PermutedMNIST, RotatedMNIST, SplitDigits, StreamOf
from bpn_lightning.datamodules.augmentation import CropAndFlip
from bpn_lightning.datamodules.base import ContinualDataModule
from bpn_lightning.datamodules.loading import Samples
from bpn_lightning.datamodules.normalization import ChannelStats
from bpn_lightning.errors import ConfigurationError, DataError
from bpn_lightning.tasks import Batch, ContinualStream, Split, Task, TrainingEpoch

Make = Callable[..., ContinualDataModule]
CLASSES = ("ant", "bee", "cat", "dog", "elk", "fox")


def members(stream: ContinualDataModule, split: Split) -> list[set[int]]:
    """The numbers of each task's samples; a number that comes twice is an error."""
    result = []
    for task in stream.tasks:
        found = [n for b in stream.loader(task.id, split, 4) for n in b.inputs[:, 0, 0, 0].tolist()]
        assert len(found) == len(set(found))
        result.append(set(found))
    return result


def attach(stream: ContinualDataModule, rank: int, world_size: int, task: int = 0) -> None:
    stream.trainer = SimpleNamespace(  # type: ignore[assignment]
        global_rank=rank,
        world_size=world_size,
        training=True,
    )
    stream.follow(lambda: TrainingEpoch(task, 1, [task]))


def test_it_has_everything_that_the_protocol_asks_for(toy: Make) -> None:
    stream = toy()
    names = {*ContinualStream.__annotations__, "loader", "prepare"}
    assert names > {"tasks", "loader"}
    assert [name for name in sorted(names) if not hasattr(stream, name)] == []
    assert stream.reset_optimizer in get_args(
        inspect.get_annotations(ContinualStream)["reset_optimizer"]
    )


def test_tasks_take_the_classes_in_order(toy: Make) -> None:
    stream = toy(
        epochs_per_task=[1, 2], classes_per_task=2, class_order=["fox", 0, "dog", "bee", 2]
    )
    assert stream.tasks == [
        Task(0, (0, 2), ("fox", "ant"), 1),
        Task(1, (2, 4), ("dog", "bee"), 2),
    ]
    assert stream.num_classes == 4
    assert stream.input_shape == (3, 8, 8)


def test_tasks_of_a_domain_incremental_stream_share_the_columns(toy: Make) -> None:
    """The same images per task as with columns of their own, numbered within the task."""
    shared, own = (toy(classes_per_task=2, domain_incremental=it) for it in (True, False))
    assert [task.columns for task in shared.tasks] == [(0, 2)] * 3
    assert shared.num_classes == 2
    for split in ("train", "test"):
        assert members(shared, split) == members(own, split)
        for task in range(3):
            pairs = zip(shared.loader(task, split), own.loader(task, split), strict=True)
            assert all(torch.equal(a.targets, b.targets - 2 * task) for a, b in pairs)


def test_tasks_are_as_many_as_the_classes_make_by_default(toy: Make) -> None:
    assert [len(toy(classes_per_task=size).tasks) for size in (1, 2, 4, 6)] == [6, 3, 1, 1]


def test_targets_are_columns_of_the_head(toy: Make) -> None:
    stream = toy(class_order_seed="stream", seed=1, validation_fraction=0.3)
    assert [name for task in stream.tasks for name in task.class_names] != [*CLASSES]
    for task in stream.tasks:
        for split in ("train", "val", "test"):
            for batch in stream.loader(task.id, split):
                assert batch.task == task.id
                for image, target in zip(batch.inputs, batch.targets.tolist(), strict=True):
                    name = CLASSES[image[1, 0, 0]]
                    assert task.class_names[target - task.columns[0]] == name


@pytest.mark.parametrize("fraction", [0.0, 0.3])
def test_the_parts_are_disjoint_and_complete(toy: Make, fraction: float) -> None:
    stream = toy(num_tasks=2, classes_per_task=2, validation_fraction=fraction)
    data = stream.read()
    train, val, test = (members(stream, split) for split in ("train", "val", "test"))
    assert stream.has_validation == any(val) == (fraction > 0)
    for task in stream.tasks:
        wanted = {CLASSES.index(name) for name in task.class_names}
        of_classes = [
            {n for n, label in enumerate(part.labels.tolist()) if label in wanted}
            for part in (data.train, data.test)
        ]
        assert train[task.id] | val[task.id] == of_classes[0]
        assert not train[task.id] & val[task.id]
        assert test[task.id] == of_classes[1]
    for split, part in (("train", 0), ("val", 0), ("test", 1)):
        for batch in stream.loader(0, split):
            assert batch.inputs[:, 2].eq(part).all(), "test images are not training images"


class Sealed(torch.Tensor):
    """Images that tell their shape and dtype, and refuse to be looked at."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func.__name__ in ("__get__", "__len__", "dim", "is_floating_point"):
            return super().__torch_function__(func, types, args, kwargs or {})
        raise AssertionError(f"the test set was read by {func.__name__}")


def test_the_test_set_is_not_read_where_the_held_out_part_is_evaluated(fit) -> None:
    class SealedDigits(SplitDigits):
        def read(self):
            data = super().read()
            images = data.test.images.as_subclass(Sealed)
            return data._replace(test=Samples(images, data.test.labels))

    def make(**more: object) -> SealedDigits:
        return SealedDigits(num_tasks=2, validation_fraction=0.2, seed=0, **more)  # type: ignore[arg-type]

    module, trainer = fit(stream=make(evaluation_split="val"), evaluate_every="epoch")
    trainer.test(module, datamodule=trainer.datamodule, verbose=False)
    held = module.evaluate(split="val")
    assert torch.equal(module.accuracy_matrix.accuracy[2], held)
    sizes = [len(trainer.datamodule.members(task, "val")) for task in range(2)]
    assert module.history.class_counts["accuracy"]["tasks"] == sizes
    with pytest.raises(AssertionError, match="the test set was read"):
        fit(stream=make())


def test_held_out_part_follows_the_seed_and_not_the_order_of_classes(toy: Make) -> None:
    def held(**arguments: object) -> set[int]:
        return set().union(*members(toy(validation_fraction=0.3, **arguments), "val"))

    assert held(seed=1) == held(seed=1, class_order_seed=5)
    assert held(seed=1) != held(seed=2)


def test_the_streams_own_seed_may_draw_the_order_of_classes(toy: Make) -> None:
    def names(**arguments: object) -> list[str]:
        return [name for task in toy(**arguments).tasks for name in task.class_names]

    drawn = [names(seed=seed, class_order_seed="stream") for seed in range(6)]
    assert [sorted(order) for order in drawn] == [[*CLASSES]] * 6
    assert drawn[3] == names(seed=3, class_order_seed="stream") == names(seed=0, class_order_seed=3)
    assert len({*map(tuple, drawn)}) > 1
    listed = names(seed=3, class_order_seed="stream", class_order=["dog", 0], classes_per_task=1)
    assert sorted(listed) == ["ant", "dog"]


def test_a_stream_knows_whether_its_seed_draws_what_tasks_are_made_of(toy: Make) -> None:
    streams = [toy(), toy(class_order_seed=3), toy(class_order_seed="stream")]
    assert [stream.order for stream in streams] == ["fixed", "fixed", "seed"]
    assert [StreamOf([one]).order for one in streams[1:]] == ["fixed", "seed"]
    assert (PermutedMNIST().order, RotatedMNIST().order) == ("seed", "fixed")


def test_epochs_differ_and_cover_the_task(toy: Make) -> None:
    stream = toy(batch_size=4, validation_fraction=0.2)
    epochs = [torch.cat([b.inputs[:, 0, 0, 0] for b in stream.train_loader(1, e)]) for e in (0, 1)]
    assert not torch.equal(*epochs)
    assert {frozenset(epoch.tolist()) for epoch in epochs} == {
        frozenset(members(stream, "train")[1])
    }


def test_the_seed_is_seed_everythings(toy: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)
    assert toy().seed == 0
    monkeypatch.setenv("PL_GLOBAL_SEED", "7")
    assert toy().seed == 7
    assert toy(seed=3).seed == 3


def test_setting_up_twice_reads_once(toy: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = toy()
    monkeypatch.setattr(stream, "read", lambda: pytest.fail("read again"))
    stream.setup("test")


# ---------------------------------------------------------------------- what Lightning asks for


def test_train_dataloader_is_the_modules_position(toy: Make) -> None:
    stream = toy(batch_size=4)
    attach(stream, 0, 1, task=2)
    loader = stream.train_dataloader()
    assert (loader.task, loader.epoch) == (2, 1)
    expected = [b.inputs for b in stream.train_loader(2, 1)]
    assert all(torch.equal(b.inputs, e) for b, e in zip(loader, expected, strict=True))


@pytest.mark.parametrize("task", range(3))
def test_val_dataloader_is_one_loader_over_the_tasks_so_far(toy: Make, task: int) -> None:
    stream = toy(validation_fraction=0.3, eval_batch_size=3)
    attach(stream, 0, 1, task)
    found = {}
    for batch in stream.val_dataloader():
        assert isinstance(batch, Batch)
        for image, task_id in zip(batch.inputs, batch.task.tolist(), strict=True):
            found[int(image[0, 0, 0])] = task_id
    parts = members(stream, "val")[: task + 1]
    assert found == {number: task_id for task_id, part in enumerate(parts) for number in part}


def test_batches_of_several_tasks_and_of_a_draw_say_where_samples_stand(toy: Make) -> None:
    """In the loader of their own task."""
    stream = toy(validation_fraction=0.3, eval_batch_size=5, batch_size=5)
    attach(stream, 0, 1, 2)
    loaders = {
        "val": [stream.val_dataloader()],
        "test": [stream.test_dataloader(), stream.loader(1, "test", max_samples=3)],
        "train": [stream.train_loader(2, 0, [0, 2]), stream.train_loader(1, 0)],
    }
    for split, of_split in loaders.items():
        whole = [next(iter(stream.loader(task, split, 100))) for task in range(3)]
        for batch in chain.from_iterable(of_split):
            tasks = torch.as_tensor(batch.task).expand(len(batch.targets)).tolist()
            for task, place, image in zip(tasks, batch.samples, batch.inputs, strict=True):
                assert torch.equal(whole[task].inputs[place], image)


def test_val_dataloader_without_a_validation_part_is_none(toy: Make) -> None:
    assert not toy().val_dataloader().flattened  # type: ignore[union-attr]


@pytest.mark.parametrize("world_size", [1, 2, 5])
def test_test_and_predict_take_every_sample_once(toy: Make, world_size: int) -> None:
    stream = toy(eval_batch_size=6)
    found = []
    for rank in range(world_size):
        attach(stream, rank, world_size)
        assert len(stream.test_dataloader()) == 4  # 21 images
        for batch in stream.predict_dataloader():
            found += zip(batch.inputs[:, 0, 0, 0].tolist(), batch.task.tolist(), strict=True)
    parts = members(stream, "test") if world_size == 1 else members(toy(), "test")
    assert sorted(found) == sorted((n, task) for task, part in enumerate(parts) for n in part)


def test_processes_share_the_batches_of_one(toy: Make) -> None:
    whole = [b.inputs for b in toy(batch_size=7, augment=True).train_loader(0, 0)]
    stream = toy(batch_size=7, augment=True)
    ranks = []
    for rank in range(3):
        attach(stream, rank, 3)
        ranks.append(list(stream.train_loader(0, 0)))
    for inputs, *parts in zip(whole, *ranks, strict=True):
        assert torch.equal(torch.cat([part.inputs for part in parts]), inputs)
        assert sum(len(part.targets) for part in parts) == parts[0].global_size


def test_a_stream_on_which_nobody_trains_has_no_current_epoch(toy: Make) -> None:
    stream = toy()
    with pytest.raises(ConfigurationError, match=r"a trainer .*, but the stream has none"):
        stream.train_dataloader()


# ---------------------------------------------------------------------- on the device


def test_prepare_normalizes_like_torchvision() -> None:
    stream = SplitDigits()
    stream.setup()
    batch = next(iter(stream.loader(0, "test")))
    transform = Compose([ToTensor(), Normalize(*stream.normalization)])
    expected = torch.stack([transform(image.numpy()[0]) for image in batch.inputs])
    prepared = stream.prepare(batch)
    assert prepared.inputs.dtype == torch.float32
    torch.testing.assert_close(prepared.inputs, expected)
    assert torch.equal(prepared.targets, batch.targets)
    assert batch.inputs.dtype == torch.uint8, "the store stays as it is"


def test_constants_are_measured_on_the_first_tasks_training_images(toy: Make) -> None:
    stream = toy(validation_fraction=0.3)
    images = torch.cat([b.inputs for b in stream.loader(0, "train")]).numpy() / 255
    # two of the three channels; the third is of one color
    mean, std = (np.array(values) for values in stream.normalization)
    np.testing.assert_allclose(mean, images.mean((0, 2, 3)), atol=1e-12)
    np.testing.assert_allclose(std[:2], images.std((0, 2, 3))[:2], atol=1e-9)
    assert std[2] == 1, "a channel of one color is not blown up"


def test_constants_per_channel_are_used_per_channel(toy: Make) -> None:
    stream = toy()
    stream.normalization = ChannelStats((0.1, 0.2, 0.3), (0.5, 1.0, 2.0))
    batch = Batch(torch.full((1, 3, 2, 2), 255, dtype=torch.uint8), torch.zeros(1).long(), 0, 1)
    got = stream.prepare(batch).inputs[0, :, 0, 0]
    torch.testing.assert_close(got, torch.tensor([0.9 / 0.5, 0.8, 0.7 / 2]))


def test_augmentation_is_the_same_in_parts_and_after_a_resume(toy: Make) -> None:
    stream = toy(batch_size=5, augment=True)
    whole = list(stream.train_loader(1, 3))
    expected = [stream.prepare(b, augment=True).inputs for b in whole]
    plain = [stream.prepare(b).inputs for b in whole]
    assert not any(torch.equal(a, b) for a, b in zip(expected, plain, strict=True))
    # by hand: crop the raw image, then normalize
    raw = CropAndFlip(1, True).apply(whole[0].inputs, whole[0].augmentation)
    torch.testing.assert_close(
        expected[0], stream.prepare(whole[0]._replace(inputs=raw)).inputs, rtol=0, atol=0
    )
    ranks = []
    for rank in range(3):
        attach(stream, rank, 3)
        loader = stream.train_loader(1, 3)
        loader.load_state_dict({"processed": 2})
        ranks.append([stream.on_after_batch_transfer(b, 0).inputs for b in loader])
    for parts, inputs in zip(zip(*ranks, strict=True), expected[2:], strict=True):
        assert torch.equal(torch.cat(parts), inputs)


def test_batches_move_whole_and_only_where_they_are_not_yet(toy: Make) -> None:
    stream = toy(augment=True)
    stream.setup()
    batch = next(iter(stream.train_loader(0, 0, [0, 1])))
    assert stream.transfer_batch_to_device(batch, torch.device("cpu"), 0) is batch
    moved = stream.transfer_batch_to_device(batch, torch.device("meta"), 0)
    tensors = {name for name, value in batch._asdict().items() if isinstance(value, torch.Tensor)}
    assert tensors == {"inputs", "targets", "task", "augmentation"}
    assert {getattr(moved, name).device.type for name in tensors} == {"meta"}
    assert (moved.global_size, moved.start) == (batch.global_size, batch.start)


def test_only_training_batches_of_an_augmenting_stream_are_augmented(toy: Make) -> None:
    stream = toy(augment=True)
    batch = next(iter(stream.train_loader(0, 0)))
    attach(stream, 0, 1)
    stream.trainer.training = False  # type: ignore[union-attr, misc]
    assert torch.equal(
        stream.on_after_batch_transfer(batch, 0).inputs, stream.prepare(batch).inputs
    )
    assert next(iter(stream.loader(0, "train"))).augmentation is None
    assert next(iter(toy().train_loader(0, 0))).augmentation is None
    assert stream.prepare(batch, augment=True).augmentation is None


# ---------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "batch_size to be a whole number of at least 1, but got 0"),
        ({"eval_batch_size": -1}, "eval_batch_size .* got -1"),
        ({"num_tasks": 0}, "num_tasks .* got 0"),
        ({"classes_per_task": 0}, "classes_per_task .* got 0"),
        ({"epochs_per_task": 0}, "epochs_per_task .* got 0"),
        ({"epochs_per_task": [1, 0, 1]}, "epochs_per_task .* got 0"),
        ({"epochs_per_task": [1, 2], "num_tasks": 3}, "each of the 3 tasks, but got 2"),
        ({"epochs_per_task": [1, 2]}, "each of the 3 tasks, but got 2"),
        ({"validation_fraction": 1.0}, "validation_fraction .* below 1, but got 1.0"),
        ({"validation_fraction": -0.1}, "validation_fraction .* got -0.1"),
        ({"evaluation_split": "train"}, "evaluation_split to be one of test, val, but got 'train'"),
        (
            {"evaluation_split": "val"},
            "validation_fraction to be above 0 where evaluation_split is",
        ),
        ({"reset_optimizer": "sometimes"}, "reset_optimizer .* got 'sometimes'"),
        ({"num_tasks": 4}, r"at most the 6 classes of the toy in here, but got 4 \* 2"),
        ({"classes_per_task": 7}, r"at most the 6 classes .* but got 1 \* 7"),
        (
            {"num_tasks": 2, "class_order": ["ant", "bee", "cat"]},
            r"at most the 3 classes that class_order lists, but got 2 \* 2",
        ),
        ({"class_order": ["ant", "foxs"]}, "'foxs'. Did you mean 'fox'"),
        ({"class_order_seed": "steam"}, "a whole number, 'stream' or null, but got 'steam'"),
        ({"class_order_seed": True}, "a whole number, 'stream' or null, but got True"),
    ],
)
def test_wrong_arguments_are_errors(toy: Make, arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        toy(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"train_counts": (3, 3, 3, 0, 3, 3)}, "training images in here, but got none of 'dog'"),
        ({"test_counts": (3, 3, 0, 3, 3, 3)}, "test images in here, but got none of 'cat'"),
        (
            {"train_counts": (3, 3, 3, 3, 3, 1), "validation_fraction": 0.5},
            "validation images in here, but got none of 'fox'",
        ),
    ],
)
def test_an_empty_class_is_an_error(toy: Make, arguments: dict[str, object], message: str) -> None:
    with pytest.raises(DataError, match=message):
        toy(**arguments)


def test_an_empty_class_that_is_left_out_is_none(toy: Make) -> None:
    stream = toy(train_counts=(3, 3, 3, 0, 3, 3), class_order=[0, 1, 2, 4])
    assert stream.num_classes == 4


# ---------------------------------------------------------------------- the bundled digits


def test_digits_are_scikit_learns() -> None:
    stream = SplitDigits(num_tasks=5, classes_per_task=2)
    stream.setup()
    digits = load_digits()
    images = {
        split: [b for t in range(5) for b in stream.loader(t, split)] for split in ("train", "test")
    }
    found = [
        (tuple(image.flatten().tolist()), target)
        for batches in images.values()
        for batch in batches
        for image, target in zip(batch.inputs, batch.targets.tolist(), strict=True)
    ]
    stretched = np.rint(digits.images * 255 / 16).astype(int).reshape(len(digits.images), -1)
    assert sorted(found) == sorted(zip(map(tuple, stretched.tolist()), digits.target, strict=True))
    assert stretched.max() == 255


def test_digits_that_are_written_to_change_no_other_stream() -> None:
    """The file is parsed once for all streams of a process."""
    one = SplitDigits().read().train
    kept = [tensor.clone() for tensor in one]
    for tensor in one:
        tensor.zero_()
    assert all(map(torch.equal, SplitDigits().read().train, kept))


def test_digits_constants_and_split_are_what_the_docstring_says() -> None:
    parts = []
    for seed in (0, 1):
        stream = SplitDigits(seed=seed, classes_per_task=10)
        stream.setup()
        parts.append([next(iter(stream.loader(0, s, 2000))) for s in ("train", "test")])
    (train, test), (_, other) = parts
    assert (len(train.targets), len(test.targets)) == (1438, 359)
    assert torch.equal(test.inputs, other.inputs), "the test part does not follow the seed"
    shares = test.targets.bincount() / (train.targets.bincount() + test.targets.bincount())
    assert (shares - 0.2).abs().max() < 0.004
    pixels = train.inputs.numpy() / 255
    assert stream.normalization.mean == (round(float(pixels.mean()), 4),)
    assert stream.normalization.std == (round(float(pixels.std()), 4),)
