"""The order's share of the variance against tables worked out by hand, and against simulated orders."""

import numpy as np
import pytest
from scipy import stats

from bpn_lightning.analysis.variance import crossed, order_share


def test_a_two_way_table_by_hand() -> None:
    """Three seeds, two orders.

    Means of orders 4 and 8, of seeds 4, 6 and 8, of all 6. Sums of squares: orders 3 (4 + 4) = 24, seeds
    2 (4 + 0 + 4) = 16, all (2-6)^2 + (6-6)^2 + (5-6)^2 + (7-6)^2 + (5-6)^2 + (11-6)^2 = 44, rest 4. Mean squares 24,
    8 and 2; components (24 - 2) / 3, (8 - 2) / 2 and 2.
    """
    found = crossed([[2.0, 6.0], [5.0, 7.0], [5.0, 11.0]])
    assert (found.order, found.seed, found.rest) == pytest.approx((22 / 3, 3.0, 2.0))
    assert found.share == pytest.approx((22 / 3) / (22 / 3 + 5))


def test_a_negative_component_is_0_and_nothing_varies_has_no_share() -> None:
    found = crossed([[1.0, 2.0], [2.0, 1.0]])  # all of it is interaction
    assert (found.order, found.seed, found.rest) == (0.0, 0.0, pytest.approx(1.0))
    assert found.share == 0
    assert crossed([[1.0, 1.0], [1.0, 1.0]]).share is None


def test_components_are_those_that_the_numbers_were_drawn_with() -> None:
    rng = np.random.default_rng(0)
    shares = []
    for _ in range(300):
        table = rng.normal(0, 2, (1, 8)) + rng.normal(0, 1, (8, 1)) + rng.normal(0, 1, (8, 8))
        found = crossed(table.tolist())
        shares.append((found.order, found.seed, found.rest))
    assert np.mean(shares, axis=0) == pytest.approx([4, 1, 1], rel=0.1)


def test_drawn_orders_next_to_a_fixed_one_by_hand() -> None:
    fixed, drawn = {0: 1.0, 1: 2.0, 2: 3.0}, {0: 1.0, 1: 3.0, 2: 5.0}  # variances 1 and 4
    found = order_share(fixed, drawn)
    assert found is not None
    assert found.share == pytest.approx(0.75)
    # F with (2, 2) degrees of freedom has the distribution function f / (1 + f): quantiles 1/39 and 39.
    assert (found.low, found.high) == pytest.approx((0.0, 1 - 0.25 / 39))
    assert stats.f.ppf(0.975, 2, 2) == pytest.approx(39)
    assert order_share(drawn, fixed).share == 0  # type: ignore[union-attr]


@pytest.mark.parametrize("drawn", [{0: 1.0}, {0: 1.0, 1: 1.0}])
def test_what_has_no_share(drawn: dict[int, float]) -> None:
    assert order_share({0: 1.0, 1: 2.0}, drawn) is None
