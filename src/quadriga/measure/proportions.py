"""Bounds for proportions of paired right/wrong answers. Imports no torch."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

Array = NDArray[np.float64]


def tango_score(difference: ArrayLike, gained: ArrayLike, lost: ArrayLike, n: ArrayLike) -> Array:
    """The score statistic z of the hypothesis that P(gained) − P(lost) = `difference`; it falls as `difference` rises.

    The variance is taken at the restricted maximum of the likelihood, the positive root of
    2n·q² + B·q − lost·d(1 − d) = 0 with B = (2n − gained + lost)·d − gained − lost.

    Args:
        difference: d, hypothesised, in [−1, 1].
        gained: examples that only the candidate answers rightly.
        lost: examples that only the baseline answers rightly.
        n: all examples.

    Source: Tango 1998, Statistics in Medicine 17, 891–908, equations for z(λ) and q21.
    """
    d, b, c, n = (np.asarray(x, dtype=np.float64) for x in (difference, gained, lost, n))
    linear = (2 * n - b + c) * d - b - c
    root = np.sqrt(np.maximum(linear**2 + 8 * n * c * d * (1 - d), 0))
    with np.errstate(divide="ignore", invalid="ignore"):
        q = np.where(linear > 0, 2 * c * d * (1 - d) / (linear + root), (root - linear) / (4 * n))
        variance = np.maximum(n * (2 * q + d * (1 - d)), 0)
        z = (b - c - n * d) / np.sqrt(variance)
    return np.where(variance > 0, z, np.sign(np.round(b - c - n * d, 9)) * np.inf)


def _bound(gained: ArrayLike, lost: ArrayLike, n: ArrayLike, z: float) -> Array:
    """The d at which the score equals z > 0 (lower bound), by bisection."""
    b, c, n = np.broadcast_arrays(*(np.asarray(x, dtype=np.float64) for x in (gained, lost, n)))
    low, high = np.full(b.shape, -1.0), (b - c) / n
    for _ in range(60):
        middle = (low + high) / 2
        rejected = tango_score(middle, b, c, n) > z
        low, high = np.where(rejected, middle, low), np.where(rejected, high, middle)
    return low


def tango_lower(gained: ArrayLike, lost: ArrayLike, n: ArrayLike, level: float = 0.99) -> Any:
    """One-sided lower bound of P(gained) − P(lost), the difference of two paired proportions.

    It is asymptotic. Simulated coverage of the 99 % bound is 99.0–99.2 % for 200 to 10,000 examples with at least twenty
    expected disagreements (`benchmarks/intervals.py`). With no disagreement at all it is −z²/(n + z²), not 0.

    Args:
        gained: examples that only the candidate answers rightly; a number or an array.
        lost: examples that only the baseline answers rightly.
        n: all examples.
        level: of the bound.

    Returns:
        A number for numbers, an array for arrays; a fraction, not points.

    Source: Tango 1998, Statistics in Medicine 17, 891–908.

    Example:
        >>> round(tango_lower(gained=300, lost=310, n=10_000), 5)
        -0.00677
    """
    low = _bound(gained, lost, n, float(stats.norm.ppf(level)))
    return low if low.ndim else float(low)


def tango(gained: ArrayLike, lost: ArrayLike, n: ArrayLike, level: float = 0.95) -> tuple[Any, Any]:
    """Two-sided score interval for the difference of paired proportions; arguments and source as `tango_lower`.

    Example: airway reactivity before and after transplantation, 1 against 7 of 21 pairs (Fagerland, Lydersen and
    Laake 2014, Statistics in Medicine 33, 2850–2875: −0.517 to −0.026).

        >>> [round(x, 3) for x in tango(1, 7, 21)]
        [-0.517, -0.026]
    """
    z = float(stats.norm.ppf((1 + level) / 2))
    low, high = _bound(gained, lost, n, z), -_bound(lost, gained, n, z)
    return (low, high) if low.ndim else (float(low), float(high))


def certificate(different: int, n: int, level: float = 0.99) -> float:
    """Without labels: at this confidence, no more than this fraction of accuracy is lost.

    An answer can only turn wrong where the prediction changed, so the accuracy lost is at most the rate at which
    predictions differ; its upper bound is exact (never covers less than `level`, so it covers somewhat more).

    Args:
        different: unlabelled inputs whose predictions differ.
        n: unlabelled inputs.
        level: of the one-sided bound.

    Source: Clopper and Pearson 1934, Biometrika 26, 404–413.

    Example:
        >>> round(certificate(0, 1000, level=0.95), 5)  # the rule of three
        0.00299
    """
    if not 0 <= different <= n or n < 1:
        raise ValueError(f"{different} of {n} predictions cannot differ")
    return 1.0 if different == n else float(stats.beta.ppf(level, different + 1, n - different))


def smallest_floor(n: int, disagreement: float, level: float = 0.99, power: float = 0.5) -> float:
    """The smallest loss of accuracy that n examples can exclude for a candidate that truly loses nothing.

    Args:
        n: examples in the test split.
        disagreement: assumed rate at which exactly one of the two models is right. Two trainings of one network
            differ by about their error rate; int8 against float by 0.2 to 1 %.
        level: of the bound.
        power: the chance that the equally good candidate passes: 0.5 is the least that may be called possible
            (a smaller margin fails more often than not); 0.8 is what one would plan for.

    Returns:
        The margin as a fraction; times 100 for points.

    Example:
        >>> [round(100 * smallest_floor(10_000, 0.04, level, power), 2) for level in (0.95, 0.99) for power in (0.5, 0.8)]
        [0.33, 0.5, 0.47, 0.64]
    """
    if n < 1 or not 0 <= disagreement <= 1:
        raise ValueError(f"n = {n} and disagreement = {disagreement} are not a count and a rate")
    changed = n * disagreement
    shortfall = min(float(stats.norm.ppf(power)) * math.sqrt(changed), changed)
    return -float(tango_lower((changed - shortfall) / 2, (changed + shortfall) / 2, n, level))


def divided(level: float, finalists: int) -> float:
    """The level for each of k named finalists so that all k statements hold together at `level` (Bonferroni).

    Raises:
        ValueError: not 1 to 3 finalists; the rule of the sealed split allows no more.

    Example:
        >>> round(divided(0.97, 3), 6)
        0.99
    """
    if not 1 <= finalists <= 3:
        raise ValueError(f"{finalists} finalists; one to three may be named before the test split is opened")
    return 1 - (1 - level) / finalists
