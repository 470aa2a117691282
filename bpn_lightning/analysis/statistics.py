"""Means over seeds with their intervals, and tests of differences."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from scipy import stats

from bpn_lightning.intervals import wilson_interval

__all__ = [
    "Difference",
    "Interval",
    "binomial_half",
    "holm",
    "interval",
    "p_text",
    "paired",
    "two_sample",
]


@dataclass(frozen=True)
class Interval:
    """A mean and the half width of its 95 % interval.

    Args:
        mean: of the values.
        half: of Student's t with n - 1 degrees of freedom; None for a single value.
        n: how many values.
    """

    mean: float
    half: float | None
    n: int

    def text(self, digits: int = 3) -> str:
        """``0.983 ± 0.054``; a single value stands alone."""
        tail = "" if self.half is None else f" ± {self.half:.{digits}f}"
        return f"{self.mean:.{digits}f}{tail}"


def interval(values: Sequence[float | None]) -> Interval | None:
    """The mean over seeds and its 95 % interval; None where a value, or all of them, are missing.

    No mean is quietly taken over fewer seeds.

    >>> interval([1.0, 2.0, 3.0]).text(2)
    '2.00 ± 2.48'
    """
    numbers = [value for value in values if value is not None]
    if not numbers or len(numbers) < len(values):
        return None
    if len(numbers) == 1:
        return Interval(numbers[0], None, 1)
    half = float(stats.t.ppf(0.975, len(numbers) - 1)) * stdev(numbers) / len(numbers) ** 0.5
    return Interval(fmean(numbers), half, len(numbers))


@dataclass(frozen=True)
class Difference:
    """How much better the first of two methods is.

    Args:
        mean: of the differences, seed by seed.
        half: half width of the 95 % interval of that mean; None for a single seed.
        p: of the two-sided paired t-test; None where all differences are equal, so that there is no
            spread to compare them with.
        n: how many pairs.
    """

    mean: float
    half: float | None
    p: float | None
    n: int

    @property
    def interval(self) -> Interval:
        """The mean with its interval."""
        return Interval(self.mean, self.half, self.n)


def paired(first: Mapping[int, float], second: Mapping[int, float]) -> Difference | None:
    """Student's paired t-test over the seeds that both have; None where there are none.

    Args:
        first: a value for each seed.
        second: a value for each seed.
    """
    seeds = sorted(set(first) & set(second))
    differences = [first[seed] - second[seed] for seed in seeds]
    found = interval(differences)
    if found is None:
        return None
    p = None
    if _spread(differences):
        p = float(stats.ttest_rel([first[s] for s in seeds], [second[s] for s in seeds]).pvalue)
    return Difference(found.mean, found.half, p, len(seeds))


def two_sample(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Return p of Student's two-sided t-test for two groups of equal variance; None without any spread."""
    if len(first) < 2 or len(second) < 2 or not (_spread(first) or _spread(second)):
        return None
    return float(stats.ttest_ind(first, second).pvalue)


def holm(values: Sequence[float | None]) -> list[float | None]:
    """p-values corrected for how many tests there are, after Holm (1979).

    >>> holm([0.01, 0.04, None, 0.03])
    [0.03, 0.06, None, 0.06]
    """
    known = sorted((p, index) for index, p in enumerate(values) if p is not None)
    corrected: list[float | None] = [None] * len(values)
    largest = 0.0
    for rank, (p, index) in enumerate(known):
        largest = max(largest, min(1.0, (len(known) - rank) * p))
        corrected[index] = largest
    return corrected


def binomial_half(fraction: float, samples: int) -> float:
    """Half the width of Wilson's 95 % interval of a fraction of so many samples.

    >>> round(binomial_half(0.5, 100), 3)
    0.096
    """
    low, high = wilson_interval(fraction, samples)
    return (high - low) / 2


def p_text(value: float | None) -> str | None:
    """A p-value to three digits; None without a test."""
    if value is None:
        return None
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def _spread(values: Sequence[float]) -> bool:
    """Whether values differ by more than rounding."""
    return len(values) > 1 and max(values) - min(values) > 1e-12
