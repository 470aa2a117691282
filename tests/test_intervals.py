"""Wilson's interval: by hand, and where the score test just does not reject."""

from math import sqrt

import pytest

from bpn_lightning.intervals import wilson_interval

Z = 1.959963984540054


@pytest.mark.parametrize(("right", "samples"), [(0, 7), (1, 1), (36, 72), (95, 100), (9999, 10000)])
def test_its_ends_are_z_standard_errors_from_the_fraction(right: int, samples: int) -> None:
    """The standard error is that of the end, not of the fraction: this defines the interval."""
    fraction = right / samples
    for end in wilson_interval(fraction, samples):
        assert abs(fraction - end) == pytest.approx(Z * sqrt(end * (1 - end) / samples), abs=1e-9)


def test_by_hand() -> None:
    """8 of 10, with z = 1.96: (0.8 + 0.19207 +- 1.96 sqrt(0.016 + 0.009604)) / 1.38416."""
    low, high = wilson_interval(0.8, 10)
    assert (low, high) == (pytest.approx(0.4902, abs=1e-4), pytest.approx(0.9433, abs=1e-4))


def test_it_stays_within_0_and_1() -> None:
    assert wilson_interval(0.0, 3)[0] == 0
    assert wilson_interval(1.0, 3)[1] == 1
