"""The interval of a fraction of samples."""

from statistics import NormalDist

__all__ = ["wilson_interval"]

_Z = NormalDist().inv_cdf(0.975)


def wilson_interval(fraction: float, samples: int) -> tuple[float, float]:
    r"""Wilson's 95 % interval of a fraction, for the choice of the samples that it was measured with.

    .. math:: \frac{p + z^2 / 2n \pm z \sqrt{p (1 - p) / n + z^2 / 4 n^2}}{1 + z^2 / n}, \quad z = 1.96

    Wilson (1927), "Probable inference, the law of succession, and statistical inference".

    Args:
        fraction: from 0 to 1.
        samples: n, at least 1.

    Returns:
        Its lower and its upper end.

    >>> [round(end, 4) for end in wilson_interval(0.5, 100)]
    [0.4038, 0.5962]
    """
    spread = fraction * (1 - fraction) / samples + (_Z / samples) ** 2 / 4
    center, half = fraction + _Z**2 / samples / 2, _Z * max(spread, 0.0) ** 0.5
    scale = 1 + _Z**2 / samples
    return max(0.0, (center - half) / scale), min(1.0, (center + half) / scale)
