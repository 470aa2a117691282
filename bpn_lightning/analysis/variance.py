"""The share of the variance between runs that is due to the order of classes, by closed forms."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, variance

from scipy import stats

__all__ = ["Components", "OrderShare", "crossed", "order_share"]


@dataclass(frozen=True)
class Components:
    """Variances of a score.

    Args:
        order: due to the order of classes.
        seed: due to all else that the seed draws.
        rest: of their interaction, which one run for each pair cannot tell from chance.
    """

    order: float
    seed: float
    rest: float

    @property
    def share(self) -> float | None:
        """The order's fraction of the total; None where nothing varies."""
        total = self.order + self.seed + self.rest
        return self.order / total if total > 0 else None


@dataclass(frozen=True)
class OrderShare:
    """The order's share, from runs with one order and runs whose seed draws it.

    Args:
        share: fraction of the variance with drawn orders, at least 0.
        low: of its 95 % interval, at least 0.
        high: of its 95 % interval, at least 0.
    """

    share: float
    low: float
    high: float


def crossed(table: Sequence[Sequence[float]]) -> Components:
    r"""Components of a two-way random-effects model with one run for each seed and order.

    .. math:: \hat\sigma^2_{order} = (MS_{order} - MS_{rest}) / n_{seeds}

    and the same of seeds (Searle, Casella & McCulloch, 1992, chapter 4); negative estimates are 0.

    Args:
        table: a row for each seed, a column for each order; two of both at least.

    >>> found = crossed([[1.0, 3.0], [2.0, 4.0]])
    >>> found.order, found.seed, found.rest
    (2.0, 0.5, 0.0)
    """
    seeds, orders = len(table), len(table[0])
    mean = fmean(value for row in table for value in row)
    of_seed = [fmean(row) for row in table]
    of_order = [fmean(column) for column in zip(*table, strict=True)]
    rest = sum(
        (table[i][j] - of_seed[i] - of_order[j] + mean) ** 2
        for i in range(seeds)
        for j in range(orders)
    ) / ((seeds - 1) * (orders - 1))
    return Components(
        order=max(0.0, variance(of_order) - rest / seeds),
        seed=max(0.0, variance(of_seed) - rest / orders),
        rest=rest,
    )


def order_share(fixed: Mapping[int, float], drawn: Mapping[int, float]) -> OrderShare | None:
    r"""The order's share where the seeds of one group share it and those of the other draw it.

    .. math:: 1 - s^2_{fixed} / s^2_{drawn}

    with the exact interval of a ratio of variances of normal values, by quantiles of F.

    Args:
        fixed: scores by seed, in one order.
        drawn: scores by seed, each in an order of its own.

    Returns:
        None for fewer than two seeds, or where nothing varies with drawn orders.
    """
    if len(fixed) < 2 or len(drawn) < 2:
        return None
    one, other = variance(fixed.values()), variance(drawn.values())
    if other == 0:
        return None
    ratio, freedom = one / other, (len(fixed) - 1, len(drawn) - 1)
    low, high = (ratio / float(stats.f.ppf(q, *freedom)) for q in (0.025, 0.975))
    return OrderShare(*(max(0.0, 1 - value) for value in (ratio, low, high)))
