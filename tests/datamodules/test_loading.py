"""The order of an epoch, the shares of processes, and the position after a resume."""

from itertools import chain

import pytest
import torch
from lightning.fabric.utilities.types import _Stateful
from lightning.pytorch.utilities.combined_loader import CombinedLoader

from bpn_lightning.datamodules.augmentation import CropAndFlip
from bpn_lightning.datamodules.loading import (
    EvaluationLoader,
    Samples,
    Share,
    TrainLoader,
)

STORE = Samples(torch.arange(40, dtype=torch.uint8).reshape(40, 1, 1, 1), torch.arange(40) % 7)
INDICES = torch.arange(3, 40, 2)[:17]  # a task's samples are some of the store's
from bpn_lightning.random_state import seeded_generator


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
