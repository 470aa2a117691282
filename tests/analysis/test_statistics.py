"""Intervals and tests, against scipy and by hand."""

import pytest
from scipy import stats

from bpn_lightning.analysis.statistics import holm, interval, paired, two_sample


def test_the_interval_is_scipys() -> None:
    values = [0.91, 0.94, 0.89, 0.97]
    found = interval(values)
    assert found is not None
    low, high = stats.t.interval(0.95, 3, loc=sum(values) / 4, scale=stats.sem(values))
    assert (found.mean - found.half, found.mean + found.half) == pytest.approx((low, high))  # type: ignore[operator]
    assert found.text(2) == "0.93 ± 0.06"


def test_a_missing_seed_is_not_averaged_away() -> None:
    assert interval([0.5, None]) is None
    assert interval([]) is None
    one = interval([0.5])
    assert one is not None
    assert (one.half, one.text()) == (None, "0.500")


def test_the_paired_test_is_scipys_over_the_seeds_that_both_have() -> None:
    ours, theirs = {0: 0.9, 1: 0.8, 2: 0.95, 7: 0.1}, {2: 0.7, 1: 0.75, 0: 0.6, 8: 0.9}
    found = paired(ours, theirs)
    assert found is not None
    expected = stats.ttest_rel([0.9, 0.8, 0.95], [0.6, 0.75, 0.7])
    assert (found.p, found.n) == (pytest.approx(expected.pvalue), 3)
    low, high = expected.confidence_interval(0.95)
    assert (found.mean, found.half) == (pytest.approx(0.2), pytest.approx((high - low) / 2))


def test_without_spread_there_is_no_p() -> None:
    same = paired({0: 0.5, 1: 0.7}, {0: 0.4, 1: 0.6})
    assert same is not None
    assert (same.mean, same.p) == (pytest.approx(0.1), None)
    assert paired({0: 0.5}, {1: 0.5}) is None
    one = paired({0: 0.5}, {0: 0.2})
    assert one is not None
    assert (one.p, one.half) == (None, None)
    assert two_sample([1.0, 1.0], [1.0, 1.0]) is None


def test_two_samples_as_scipy_has_it() -> None:
    first, second = [0.5, 0.6, 0.7], [0.4, 0.5, 0.45]
    assert two_sample(first, second) == pytest.approx(stats.ttest_ind(first, second).pvalue)


def test_holm_by_hand() -> None:
    # 3 x .01; 2 x .02 = .04; 1 x .03, but not below the one before
    assert holm([0.03, 0.01, 0.02]) == pytest.approx([0.04, 0.03, 0.04])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
