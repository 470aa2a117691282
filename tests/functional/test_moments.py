"""Sums of groups against numpy on all samples at once, however the samples come."""

import numpy as np
import pytest
import torch

from bpn_lightning.functional.moments import GroupSums, SecondMoments, draw_held_out

KINDS: list[SecondMoments] = ["none", "shared", "group"]


def made(kind: SecondMoments, parts: list[torch.Tensor], width: int = 4) -> GroupSums:
    """The moments of a fixed data set, of which each part is added by its samples' numbers."""
    x, groups = data()
    sums = GroupSums.zero(3, width, kind)
    for part in parts:
        sums.add_(x[part], groups[part])
    return sums


def data() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(30, 4, generator=generator) * 3 + 40
    return x, torch.randint(3, (30,), generator=generator)


@pytest.mark.parametrize("kind", KINDS)
def test_sums_are_those_of_all_samples_at_once(kind: SecondMoments) -> None:
    x, groups = (value.numpy() for value in data())
    x = x.astype(np.float64)
    found = made(kind, [torch.arange(30)])
    own = [x[groups == group] for group in range(3)]
    second = {"none": [], "shared": [x.T @ x], "group": [part.T @ part for part in own]}[kind]
    np.testing.assert_array_equal(found.counts, [len(part) for part in own])
    np.testing.assert_allclose(found.first, [part.sum(0) for part in own], rtol=1e-14)
    np.testing.assert_allclose(found.second, np.reshape(second, (-1, 4, 4)), rtol=1e-14)


@pytest.mark.parametrize("kind", KINDS)
def test_order_and_division_do_not_matter(kind: SecondMoments) -> None:
    whole = made(kind, [torch.arange(30)])
    shuffled = torch.randperm(30, generator=torch.Generator().manual_seed(0))
    divided = made(kind, list(shuffled.split([1, 7, 0, 22])))
    two = made(kind, [shuffled[:11]]).plus(made(kind, [shuffled[11:]]))
    for other in (divided, two):
        torch.testing.assert_close(tuple(whole), tuple(other), rtol=1e-13, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_doubled_samples_are_twice_the_sums(kind: SecondMoments) -> None:
    whole = made(kind, [torch.arange(30)])
    doubled = made(kind, [torch.arange(30), torch.arange(30)])
    torch.testing.assert_close(
        tuple(2 * value for value in whole), tuple(doubled), rtol=1e-13, atol=0
    )
    torch.testing.assert_close(whole.means, doubled.means, rtol=1e-13, atol=0)


def test_scatter_about_any_centers_is_the_sum_of_outer_products() -> None:
    x, groups = (value.numpy() for value in data())
    centers = np.random.default_rng(0).normal(size=(3, 4)) + 40
    own = [x[groups == group].astype(np.float64) for group in range(3)]
    expected = np.stack([(p - c).T @ (p - c) for p, c in zip(own, centers, strict=True)])
    about = torch.from_numpy(centers)
    apart = made("group", [torch.arange(30)]).scatter(about)
    together = made("shared", [torch.arange(30)]).scatter(about)
    np.testing.assert_allclose(apart, expected, rtol=1e-9)
    np.testing.assert_allclose(together, expected.sum(0, keepdims=True), rtol=1e-9)
    biased = np.stack([np.cov(p.T, bias=True) * len(p) for p in own])
    np.testing.assert_allclose(
        made("group", [torch.arange(30)]).scatter(), biased, rtol=1e-8, atol=1e-9
    )


def test_groups_are_appended_and_the_old_ones_stay() -> None:
    one, other = made("shared", [torch.arange(15)]), made("shared", [torch.arange(15, 30)])
    both = one.append(other)
    torch.testing.assert_close(both.first[:3], one.first, rtol=0, atol=0)
    torch.testing.assert_close(both.counts[3:], other.counts, rtol=0, atol=0)
    torch.testing.assert_close(both.second, made("shared", [torch.arange(30)]).second)


@pytest.mark.parametrize("period", [1, 2, 5, 10])
def test_held_out_samples_are_a_fair_draw_of_every_class(period: int) -> None:
    """Labels that repeat with a period, as in generated data: each is held out alike."""
    samples = torch.arange(5000)
    held = draw_held_out(samples, 0.1, seed=4)
    for label in range(period):
        share = held[samples % period == label].double().mean().item()
        assert share == pytest.approx(0.1, abs=0.02)


def test_held_out_samples_do_not_depend_on_the_batch() -> None:
    samples = torch.arange(1000)
    shuffled = torch.randperm(1000)
    whole = draw_held_out(samples, 0.3)
    assert torch.equal(draw_held_out(samples[shuffled], 0.3), whole[shuffled])
    assert not torch.equal(draw_held_out(samples, 0.3, seed=1), whole)
    assert not draw_held_out(samples, 0.0).any()


def test_a_group_that_goes_leaves_the_covariance_and_nothing_of_its_mean() -> None:
    """The pooled covariance stays; moving the group that goes, with all of its samples, changes nothing."""
    x, groups = data()
    kept = torch.tensor([True, False, True])
    whole = made("shared", [torch.arange(30)])
    left = whole.only(kept)
    assert left.counts.tolist() == whole.counts[kept].tolist()
    assert torch.equal(left.first, whole.first[kept])
    covariance = whole.scatter()[0] / whole.counts.sum()
    torch.testing.assert_close(left.scatter()[0] / left.counts.sum(), covariance)
    moved = GroupSums.zero(3, 4, "shared")
    moved.add_(x.double() + 7.0 * (groups == 1)[:, None], groups)
    torch.testing.assert_close(tuple(moved.only(kept)), tuple(left))
    # Held-out samples, about the means of others.
    centers = whole.means + 1
    scatter = whole.scatter(centers)[0] / whole.counts.sum()
    about = whole.only(kept, centers)
    torch.testing.assert_close(about.scatter(centers[kept])[0] / about.counts.sum(), scatter)
