"""Episodic memories in several processes: the same everywhere, and the same as in one."""

import threading
from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fits import trainer_of
from lightning.pytorch import seed_everything
from torch import Tensor
from waiting import PATIENCE

from bpn_lightning.datamodules.digits import SplitDigits
from bpn_lightning.datamodules.loading import Share
from bpn_lightning.memory import draw, gather, read_slice
from bpn_lightning.model.module import ContinualModule
from bpn_lightning.nn.backbones import MLP
from bpn_lightning.strategies.bd import BeneficialPerturbation
from bpn_lightning.strategies.gem import AveragedGEM, GradientEpisodicMemory
from bpn_lightning.tasks import Batch

# --- which samples, in threads that stand for processes ------------------------------------------


class Ranks:
    """Runs a function once per rank, with an ``all_reduce`` that waits for the others."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.barrier = threading.Barrier(number, timeout=PATIENCE)
        self.parts: list[Tensor] = [torch.empty(0)] * number

    def reduce(self, rank: int, value: Tensor) -> Tensor:
        self.parts[rank] = value.clone()
        self.barrier.wait()
        total = torch.stack(self.parts).sum(0, dtype=value.dtype)
        self.barrier.wait()
        return total

    def run(self, function: Any) -> list[Any]:
        results: list[Any] = [None] * self.number

        def one(rank: int) -> None:
            results[rank] = function(rank)

        threads = [threading.Thread(target=one, args=(rank,)) for rank in range(self.number)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return results


def kept(number: int, batch_size: int, dealt: bool) -> list[tuple[Tensor, Tensor]]:
    """What each rank keeps of 50 samples, which tell their number; 19 are of class 3."""
    images = torch.arange(50, dtype=torch.uint8).view(50, 1, 1, 1).expand(50, 1, 2, 2)
    labels = torch.where(torch.arange(50) % 8 < 3, 3, 5)
    ranks = Ranks(number)

    def own(rank: int, start: int) -> slice:
        stop = min(50, start + batch_size)
        return slice(start + rank, stop, number) if dealt else Share(rank, number).of(start, stop)

    def batches(rank: int) -> Any:
        for start in range(0, 50, batch_size):
            mine = own(rank, start)
            yield Batch(images[mine], labels[mine], 0, min(50, start + batch_size) - start)

    def keep(rank: int) -> tuple[Tensor, Tensor]:
        host: Any = SimpleNamespace(
            device=torch.device("cpu"),
            global_rank=rank,
            all_reduce=lambda value: ranks.reduce(rank, value),
            stream=SimpleNamespace(loader=lambda task, split: batches(rank)),
        )
        own = read_slice(host, 0)
        chosen = draw(own.targets, 13, "task", ("memory", 0, 0))
        return gather(host, 0, own, chosen), own.targets[chosen]

    return ranks.run(keep)


@pytest.mark.parametrize("number", [1, 2, 3, 7])
@pytest.mark.parametrize("batch_size", [50, 20, 5])
def test_memory_does_not_depend_on_processes(number: int, batch_size: int, same: Any) -> None:
    ((inputs, targets),) = kept(1, 50, dealt=False)
    for held in kept(number, batch_size, dealt=False):
        same(held, (inputs, targets))


@pytest.mark.parametrize("dealt", [False, True])
def test_memory_is_one_wherever_samples_are_read(dealt: bool, same: Any) -> None:
    """Shares that are dealt out like cards make another order, and still one for all."""
    first, *others = kept(3, 20, dealt)
    for held in others:
        same(held, first)
    inputs, targets = first
    numbers = inputs[:, 0, 0, 0]
    assert len(set(numbers.tolist())) == 13
    assert targets.tolist() == [3 if number % 8 < 3 else 5 for number in numbers.tolist()]
    assert sorted(Counter(targets.tolist()).values()) == [6, 7]


# --- whole fits ----------------------------------------------------------------------------------

MADE = {
    "gem": (lambda: GradientEpisodicMemory(7, memory_per="class"), "task"),
    # The second process finds none of the one sample.
    "agem": (lambda: AveragedGEM(20, sample_size=1), "all"),
}


def learn(name: str, devices: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The network's weights, and what the memory has."""
    seed_everything(0, verbose=False)
    # 288 samples in batches of 33: uneven shards and a short last batch.
    stream = SplitDigits(
        num_tasks=3, epochs_per_task=1, batch_size=33, eval_batch_size=101, augment=True
    )
    make, mask = MADE[name]
    gem = make()
    module = ContinualModule(
        MLP([16, 16]), mask=mask, optimizer=lambda p: torch.optim.SGD(p, lr=0.05)
    )
    trainer = trainer_of(devices, [BeneficialPerturbation(4), gem])
    trainer.fit(module, stream)
    return dict(module.network.state_dict()), gem.state_dict()


@pytest.mark.parametrize("name", MADE)
def test_two_processes_equal_one(ranks: Any, same: Any, name: str) -> None:
    one, (two, other) = learn(name, 1), ranks(learn, name, 2)
    same(two, other)
    lowest = [held[1].pop("lowest_cosine") for held in (two, one)]
    assert lowest[0] == pytest.approx(lowest[1], rel=1e-4, abs=1e-5)
    same(two[1], one[1])
    torch.testing.assert_close(two[0], one[0], rtol=1e-4, atol=1e-5, equal_nan=True)
