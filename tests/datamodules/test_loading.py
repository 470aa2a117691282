"""The order of an epoch, the shares of processes, and the position after a resume."""

from itertools import chain
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.types import _Stateful
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from torch import Tensor

from bpn_lightning.datamodules.augmentation import CropAndFlip
from bpn_lightning.datamodules.loading import (
    EvaluationLoader,
    Samples,
    Share,
    TrainLoader,
)
from bpn_lightning.random_state import seeded_generator

STORE = Samples(torch.arange(40, dtype=torch.uint8).reshape(40, 1, 1, 1), torch.arange(40) % 7)
INDICES = torch.arange(3, 40, 2)[:17]  # a task's samples are some of the store's


def loader(share: Share = Share(), processed: int = 0, **changes: int) -> TrainLoader:  # noqa: B008
    arguments = {"task": 1, "epoch": 2, "seed": 3, "batch_size": 5, **changes}
    return TrainLoader(
        STORE,
        INDICES,
        arguments.pop("task"),
        arguments.pop("epoch"),
        processed=lambda: processed,
        share=share,
        augmentation=CropAndFlip(padding=2, flip=True),
        **arguments,
    )


def numbers(batches: object) -> list[list[int]]:
    return [batch.inputs.flatten().tolist() for batch in batches]  # type: ignore[attr-defined]


def flat(batches: object) -> list[int]:
    return list(chain.from_iterable(numbers(batches)))


def test_an_epoch_is_every_sample_once_and_the_last_batch_is_short() -> None:
    batches = list(loader())
    assert [len(batch.targets) for batch in batches] == [5, 5, 5, 2]
    assert [batch.global_size for batch in batches] == [5, 5, 5, 2]
    assert {batch.task for batch in batches} == {1}
    seen = torch.cat([batch.inputs.flatten() for batch in batches])
    assert sorted(seen.tolist()) == INDICES.tolist()
    assert seen.tolist() != INDICES.tolist()
    assert torch.equal(torch.cat([batch.targets for batch in batches]), seen.long() % 7)
    assert batches[0].inputs.dtype == torch.uint8
    assert batches[0].targets.dtype == torch.int64


@pytest.mark.parametrize("batch_size", [1, 2, 3, 5, 8, 16, 17, 20])
@pytest.mark.parametrize("count", [1, 2, 3, 9, 16, 17])
@pytest.mark.parametrize("world_size", [1, 3])
def test_no_batch_has_one_sample_where_it_can_be_helped(
    batch_size: int, count: int, world_size: int
) -> None:
    """Batches are those of torch's ``split``, but for a last one of a single sample."""

    def made(rank: int, indices: Tensor, processed: int = 0) -> TrainLoader:
        share = Share(rank, world_size)
        keys = {"seed": 3, "batch_size": batch_size, "processed": lambda: processed}
        return TrainLoader(STORE, indices, 1, 2, share=share, **keys)

    expected = [len(part) for part in torch.arange(count).split(batch_size)]
    if len(expected) > 1 and batch_size > 1 and expected[-1] == 1:
        expected[-2:] = [batch_size + 1]
    loaders = [made(rank, INDICES[:count]) for rank in range(world_size)]
    for one in loaders:
        assert [batch.global_size for batch in one] == expected
        assert len(one) == len(expected)
        assert [one.count(k, k + 1) for k in range(len(one))] == expected
        assert one.count(0, len(one)) == count
        assert [one.smallest(k) for k in (1, len(one))] == [expected[0], min(expected)]
    assert min(expected) > 1 or count == 1 or batch_size == 1
    for done in range(len(expected) + 1):
        resumed = made(0, INDICES[:count])
        resumed.load_state_dict({"processed": done})
        assert numbers(resumed) == numbers(loaders[0])[done:]
    together = [[*chain(*parts)] for parts in zip(*map(numbers, loaders), strict=True)]
    assert [len(batch) for batch in together] == expected
    assert sorted(chain.from_iterable(together)) == sorted(INDICES[:count].tolist())


@pytest.mark.parametrize("what", ["task", "epoch", "seed"])
def test_every_epoch_of_every_task_has_its_own_augmentation(what: str) -> None:
    """Reading it again gives the same augmentation, in batches of any size."""

    def draws(**changes: int) -> torch.Tensor:
        return torch.cat([batch.augmentation for batch in loader(**changes)])

    assert torch.equal(draws(batch_size=4), draws())
    first, others = draws(), [draws(**{what: number}) for number in range(4, 8)]
    assert first.shape == (17, 3)
    assert not any(torch.equal(first, other) for other in others)
    assert not any(torch.equal(others[0], other) for other in others[1:])


@pytest.mark.parametrize("world_size", [1, 3])
def test_batches_say_where_their_samples_stand(world_size: int) -> None:
    for rank in range(world_size):
        share = Share(rank, world_size)
        plain = TrainLoader(
            STORE, INDICES, 1, 0, seed=3, batch_size=5, processed=lambda: 0, share=share
        )
        for loader_ in (plain, EvaluationLoader(STORE, INDICES, 1, 5, share)):
            for batch in loader_:
                assert torch.equal(INDICES[batch.samples], batch.inputs.flatten().long())
        assert all(batch.samples is None for batch in loader(share))  # augmented


def test_order_follows_from_seed_task_and_epoch_alone() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    order = numbers(loader())
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    assert numbers(loader()) == order
    changed = [numbers(loader(**{key: 4})) for key in ("seed", "task", "epoch")]
    assert all(a != b for a in changed for b in [order, *(c for c in changed if c is not a)])


def test_order_does_not_depend_on_the_batch_size() -> None:
    assert flat(loader()) == flat(loader(batch_size=3))


@pytest.mark.parametrize("size", range(13))
@pytest.mark.parametrize("world_size", range(1, 6))
def test_shares_make_up_the_batch(world_size: int, size: int) -> None:
    batch = list(range(100, 100 + size + 20))
    shares = [batch[Share(rank, world_size).of(10, 10 + size)] for rank in range(world_size)]
    assert list(chain.from_iterable(shares)) == batch[10 : 10 + size]
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@pytest.mark.parametrize("world_size", range(1, 6))
def test_processes_together_see_what_one_would(world_size: int) -> None:
    ranks = [loader(Share(rank, world_size)) for rank in range(world_size)]
    assert {len(rank) for rank in ranks} == {4}
    for whole, *parts in zip(loader(), *ranks, strict=True):
        for field in ("inputs", "targets", "augmentation"):
            together = torch.cat([getattr(part, field) for part in parts])
            assert torch.equal(together, getattr(whole, field))
        assert {part.global_size for part in parts} == {len(whole.targets)}


@pytest.mark.parametrize("done", range(5))
def test_resume_yields_the_exact_tail(done: int) -> None:
    whole = list(loader())
    saved = loader(processed=done).state_dict()
    resumed = loader()
    resumed.load_state_dict(saved)
    assert len(resumed) == 4, "the length is the whole epoch's"
    for _ in range(2):  # Lightning takes an iterator, drops it, and takes another one
        tail = list(resumed)
        assert numbers(tail) == numbers(whole[done:])
        for batch, expected in zip(tail, whole[done:], strict=True):
            assert torch.equal(batch.augmentation, expected.augmentation)


def test_position_is_what_was_processed_and_not_what_was_fetched() -> None:
    train = loader(processed=1)
    fetched = iter(train)
    next(fetched), next(fetched), next(fetched)
    assert train.state_dict() == {"processed": 1}
    assert numbers(train) == numbers(loader()), "fetching moved the start"


def test_lightning_takes_it_as_stateful_and_sized() -> None:
    train = loader(processed=2)
    assert isinstance(train, _Stateful)
    combined = CombinedLoader(train, "max_size_cycle")
    assert combined._state_dicts() == [{"processed": 2}]
    iter(combined)
    assert len(combined) == 4


@pytest.mark.parametrize("world_size", range(1, 6))
def test_evaluation_is_every_sample_once_in_order_with_its_task(world_size: int) -> None:
    ids = INDICES // 10
    ranks = [
        EvaluationLoader(STORE, INDICES, ids, 4, Share(rank, world_size))
        for rank in range(world_size)
    ]
    assert {len(rank) for rank in ranks} == {5}
    batches = [batch for parts in zip(*ranks, strict=True) for batch in parts]
    assert flat(batches) == INDICES.tolist()
    assert torch.equal(torch.cat([batch.task for batch in batches]), ids)
    assert torch.equal(torch.cat([batch.targets for batch in batches]), INDICES % 7)
    assert all(batch.augmentation is None for batch in batches)
    assert [len(b.targets) for b in EvaluationLoader(STORE, INDICES, 0, 100)] == [17]


def test_loaders_share_one_store() -> None:
    assert loader().samples.images.data_ptr() == STORE.images.data_ptr()


def test_generators_of_different_purposes_differ() -> None:
    draws = {
        torch.rand(1, generator=seeded_generator(*key)).item()
        for key in [("a", 1), ("b", 1), ("a", 2), ("a", 1, 0), ("a", "1")]
    }
    assert len(draws) == 5


# --- batches of several tasks --------------------------------------------------------------------

IDS = INDICES // 14  # 0, 1 or 2: not what the loader's own task is


def mixed(share: Share = Share(), processed: int = 0) -> TrainLoader:  # noqa: B008
    return TrainLoader(
        STORE,
        INDICES,
        5,
        2,
        task_ids=IDS,
        seed=3,
        batch_size=5,
        processed=lambda: processed,
        share=share,
    )


def test_mixed_batches_carry_the_task_of_each_sample() -> None:
    batches = list(mixed())
    found = torch.cat([batch.inputs.flatten() for batch in batches]).long()
    assert sorted(found.tolist()) == INDICES.tolist()
    assert torch.equal(torch.cat([batch.task for batch in batches]), found // 14)
    assert torch.equal(torch.cat([batch.targets for batch in batches]), found % 7)
    assert all(len(set(batch.task.tolist())) > 1 for batch in batches[:3])


@pytest.mark.parametrize("world_size", [2, 3])
def test_processes_share_mixed_batches(world_size: int) -> None:
    ranks = [mixed(Share(rank, world_size)) for rank in range(world_size)]
    for whole, *parts in zip(mixed(), *ranks, strict=True):
        for field in ("inputs", "targets", "task"):
            together = torch.cat([getattr(part, field) for part in parts])
            assert torch.equal(together, getattr(whole, field))
        assert {part.global_size for part in parts} == {len(whole.targets)}


@pytest.mark.parametrize("done", range(5))
@pytest.mark.parametrize("world_size", [1, 3])
def test_mixed_epochs_resume_with_the_right_tasks(done: int, world_size: int) -> None:
    share = Share(world_size - 1, world_size)
    whole, resumed = list(mixed(share)), mixed(share)
    resumed.load_state_dict(mixed(share, processed=done).state_dict())
    for batch, expected in zip(resumed, whole[done:], strict=True):
        assert torch.equal(batch.inputs, expected.inputs)
        assert torch.equal(batch.task, expected.task)


@pytest.mark.parametrize("tasks", [[0, 1], [1, 2], [0, 1, 2]])
def test_a_stream_makes_mixed_epochs(toy: Any, tasks: list[int]) -> None:
    """The toy's pixels say which image of which class it is."""
    stream = toy(batch_size=7, classes_per_task=2)
    epoch = list(stream.train_loader(1, 0, tasks))
    numbers_of = lambda batches: [image[0, 0, 0].item() for b in batches for image in b.inputs]
    wanted = [numbers_of(stream.loader(task, "train")) for task in tasks]
    assert sorted(numbers_of(epoch)) == sorted(chain.from_iterable(wanted))
    for batch in epoch:
        assert torch.equal(batch.inputs[:, 1, 0, 0].long() // 2, batch.task)
        assert torch.equal(batch.targets // 2, batch.task)
    assert [batch.global_size for batch in epoch[:-1]] == [7] * (len(epoch) - 1)
    assert numbers_of(stream.train_loader(1, 1, tasks)) != numbers_of(epoch)


def test_an_epoch_of_its_own_task_only_is_the_plain_one(toy: Any) -> None:
    stream = toy(classes_per_task=2)
    plain, alone = stream.train_loader(1, 0), stream.train_loader(1, 0, [1])
    for one, other in zip(plain, alone, strict=True):
        assert torch.equal(one.inputs, other.inputs)
        assert one.task == other.task == 1
