"""What memories keep: against probabilities, and algorithms written out from their papers."""

from collections import Counter
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from bpn_lightning.functional.replay import (
    Chosen,
    greedy_balanced,
    herding,
    replay_order,
    reservoir,
)
from bpn_lightning.random_state import seeded_generator


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def after(memory: list[Any], arrived: list[Any], chosen: Chosen) -> list[Any]:
    return [memory[i] for i in chosen.kept.tolist()] + [arrived[i] for i in chosen.drawn.tolist()]


# --- the reservoir -------------------------------------------------------------------------------


def by_reservoir(parts: list[int], size: int, seed: int) -> list[int]:
    """The memory after samples 0, 1, 2, ... arrived in parts."""
    memory: list[int] = []
    seen = 0
    for number, new in enumerate(parts):
        arrived = list(range(seen, seen + new))
        chosen = reservoir(len(memory), seen, new, size, seeded_generator("test", seed, number))
        memory, seen = after(memory, arrived, chosen), seen + new
    return memory


@pytest.mark.parametrize(("parts", "size"), [([7, 5, 13], 6), ([3, 4, 5], 5), ([20], 8)])
def test_every_sample_is_kept_with_the_same_probability(parts: list[int], size: int) -> None:
    """K / n: chi-square of how often each is in the memory, whatever task it came with."""
    runs, n = 3000, sum(parts)
    counts = Counter(i for seed in range(runs) for i in by_reservoir(parts, size, seed))
    expected = runs * size / n
    statistic = sum((counts[i] - expected) ** 2 for i in range(n)) / (expected * (1 - size / n))
    assert stats.chi2.sf(statistic * (n - 1) / n, n - 1) > 1e-3


def test_pairs_of_samples_are_kept_independently_of_each_other() -> None:
    """Each pair with the probability k (k - 1) / (n (n - 1)), also pairs of two tasks."""
    runs, size, n = 4000, 3, 6
    counts: Counter[tuple[int, int]] = Counter()
    for seed in range(runs):
        kept = sorted(by_reservoir([2, 4], size, seed))
        counts.update((a, b) for a in kept for b in kept if a < b)
    expected = runs * size * (size - 1) / (n * (n - 1))
    assert all(
        abs(counts[a, b] - expected) < 5 * expected**0.5 for a in range(n) for b in range(a + 1, n)
    )


def test_a_reservoir_is_full_as_soon_as_it_can_be() -> None:
    assert sorted(by_reservoir([3, 2], 8, 0)) == [0, 1, 2, 3, 4]
    assert len(set(by_reservoir([3, 9, 9], 8, 0))) == 8


def test_free_places_are_taken_first() -> None:
    """As after a task was forgotten."""
    chosen = reservoir(4, 100, 3, 10, seeded(0))
    assert (chosen.kept.tolist(), chosen.drawn.tolist()) == ([0, 1, 2, 3], [0, 1, 2])


# --- the greedy sampler --------------------------------------------------------------------------


def algorithm_1(
    held: list[int], new: list[int], size: int, generator: torch.Generator
) -> tuple[list[int], list[int]]:
    """Prabhu et al.'s, line by line, on a list of samples and a counter."""
    counter = Counter(held)
    data = list(enumerate(held))
    for index in torch.randperm(len(new), generator=generator).tolist():
        y = new[index]
        if y not in counter or counter[y] < size / len(counter):
            if sum(counter.values()) >= size:
                y_r = min(c for c in counter if counter[c] == max(counter.values()))
                of_class = [sample for sample in data if sample[1] == y_r]
                gone = int(torch.randint(len(of_class), (), generator=generator))
                data.remove(of_class[gone])
                counter[y_r] -= 1
            data.append((len(held) + index, y))
            counter[y] += 1
    ids = sorted(sample for sample, _ in data)
    return [i for i in ids if i < len(held)], [i - len(held) for i in ids if i >= len(held)]


def labels(seed: int, classes: list[int], number: int) -> list[int]:
    drawn = torch.randint(len(classes), (number,), generator=seeded(seed)).tolist()
    return [classes[i] for i in drawn]


@pytest.mark.parametrize("size", [5, 12, 31, 1000])
@pytest.mark.parametrize("seed", range(5))
def test_the_greedy_sampler_is_algorithm_1(seed: int, size: int) -> None:
    held = labels(seed, [3, 1], 40)[:size]
    for number, classes in enumerate(([0, 2], [4], [1, 4])):
        new = labels(seed + 10, classes, 50)
        chosen = greedy_balanced(held, new, size, seeded(number))
        kept, drawn = algorithm_1(held, new, size, seeded(number))
        assert (chosen.kept.tolist(), chosen.drawn.tolist()) == (kept, drawn)
        held = after(held, new, chosen)


@pytest.mark.parametrize("size", [10, 17, 23])
def test_it_is_balanced_to_within_one_sample(size: int) -> None:
    held: list[int] = []
    for task in range(5):
        new = [2 * task] * 60 + [2 * task + 1] * 30
        held = after(held, new, greedy_balanced(held, new, size, seeded(task)))
        counts = Counter(held)
        assert len(held) == size
        assert len(counts) == 2 * (task + 1)
        assert max(counts.values()) - min(counts.values()) <= 1


def test_which_samples_of_a_class_it_keeps_is_random() -> None:
    kept = Counter(
        i
        for seed in range(500)
        for i in greedy_balanced([0] * 8, [1] * 50, 8, seeded(seed)).kept.tolist()
    )
    assert sum(kept.values()) == 500 * 4
    assert all(abs(kept[i] - 250) < 5 * 125**0.5 for i in range(8))


# --- herding -------------------------------------------------------------------------------------


def algorithm_4(features: np.ndarray[Any, Any], number: int) -> list[int]:
    """Rebuffi et al.'s by trying every sample, in numpy and double precision."""
    mean = features.mean(0)
    mean = mean / np.sqrt((mean**2).sum())
    chosen: list[int] = []
    for k in range(1, number + 1):
        tried = {
            x: np.linalg.norm(mean - (features[x] + sum(features[p] for p in chosen)) / k)
            for x in range(len(features))
            if x not in chosen
        }
        chosen.append(min(tried, key=lambda x: tried[x]))
    return chosen


@pytest.mark.parametrize("seed", range(8))
def test_herding_is_algorithm_4(seed: int) -> None:
    features = torch.nn.functional.normalize(
        torch.randn(30, 5, generator=seeded(seed)) + 0.5, dim=1
    )
    found = herding(features, 30).tolist()
    assert found == algorithm_4(features.double().numpy(), 30)
    assert sorted(found) == list(range(30))
    assert herding(features, 7).tolist() == found[:7]


def test_means_of_exemplars_are_nearer_than_those_of_draws() -> None:
    """What herding is for."""
    features = torch.nn.functional.normalize(torch.randn(200, 8, generator=seeded(0)) + 1, dim=1)
    mean = torch.nn.functional.normalize(features.mean(0), dim=0)
    chosen = (features[herding(features, 10)].mean(0) - mean).norm()
    draws = [
        (features[torch.randperm(200, generator=seeded(s))[:10]].mean(0) - mean).norm()
        for s in range(100)
    ]
    assert chosen < min(draws)


# --- the order of replay -------------------------------------------------------------------------


@pytest.mark.parametrize("cuts", [[60], [20, 20, 20], [7, 30, 23], [0, 1, 0, 59]])
def test_every_sample_comes_once_before_any_comes_again(cuts: list[int]) -> None:
    whole = replay_order(30, 0, 60, ("test", 1)).tolist()
    assert sorted(whole[:30]) == sorted(whole[30:]) == list(range(30))
    assert whole[:30] != whole[30:]
    ends = np.cumsum([0, *cuts]).tolist()
    parts = [replay_order(30, a, b - a, ("test", 1)).tolist() for a, b in pairwise(ends)]
    assert [i for part in parts for i in part] == whole


def test_orders_of_other_keys_are_others() -> None:
    one, other = (replay_order(30, 0, 30, ("test", seed)).tolist() for seed in (1, 2))
    assert one != other
    assert replay_order(0, 0, 5, ("test",)).tolist() == []
