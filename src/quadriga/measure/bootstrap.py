"""Bootstrap bounds over examples: for per-example values in pairs, and for metrics of a whole set. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Bound:
    """An estimate and its one-sided lower confidence bound."""

    value: float
    low: float
    level: float


def paired_bootstrap_lower(
    baseline: ArrayLike,
    candidate: ArrayLike,
    weights: ArrayLike | None = None,
    *,
    candidate_weights: ArrayLike | None = None,
    level: float = 0.99,
    resamples: int = 1999,
    seed: int = 0,
) -> Bound:
    """Lower bound of Σwc/Σw − Σwb/Σw, resampling whole examples, both models' values together (bootstrap-t).

    The percentile bootstrap misses skew, which one-sided bounds feel most; studentizing corrects it to second order.
    Simulated coverage of the 95 / 99 % bound with 400 examples whose changes have skewness −2, plain or weighted by
    tokens: 95.0–95.8 / 98.9–99.1 %. Where very few examples decide (kurtosis 21, 200 examples) it is 93.0 / 98.1 %, and
    Student's bound 92.6 / 98.1 %: no method sees losses that the sample does not hold.
    A resample that happens to hold none of few differing examples has no spread of its own: its standard error is kept
    at no less than a tenth of the sample's, so that the bound stays finite, and wide.

    Args:
        baseline, candidate: [n] values per example, higher is better.
        weights: [n] of both, or of the baseline; ones if None.
        candidate_weights: [n] of the candidate where they differ.
        level: of the bound.
        resamples: (resamples + 1)·level should be whole, then the simulated coverage does not depend on their number.
        seed: of the resampling.

    Raises:
        ValueError: lengths differ, or there are fewer than 2 examples.

    Source: Efron 1981; Davison and Hinkley 1997, Bootstrap Methods and their Application, sections 2.4 and 5.2.2.

    Example:
        >>> bound = paired_bootstrap_lower([0.5, 0.1, 0.4, 0.9] * 50, [0.6, 0.1, 0.3, 0.9] * 50)
        >>> abs(bound.value) < 1e-9, -0.02 < bound.low < -0.008
        (True, True)
    """
    columns = _columns(baseline, candidate, weights, candidate_weights)
    value, spread = (float(x[0]) for x in _differences(columns.sum(0)[None], _products(columns).sum(0)[None]))
    if spread == 0:
        return Bound(value, value, level)
    chunks = _chunks(len(columns), resamples, seed)
    t = np.concatenate([_studentized(columns, value, spread, size, rng) for size, rng in chunks])
    rank = min(math.ceil(round(level * (resamples + 1), 6)), resamples)
    return Bound(value, value - float(np.partition(t, rank - 1)[rank - 1]) * spread, level)


def _columns(
    baseline: ArrayLike, candidate: ArrayLike, weights: ArrayLike | None, candidate_weights: ArrayLike | None
) -> Array:
    """What is summed over examples: [n, 2] for one ratio, [n, 4] for the difference of two."""
    b, c = np.asarray(baseline, dtype=np.float64), np.asarray(candidate, dtype=np.float64)
    w = np.ones_like(b) if weights is None else np.asarray(weights, dtype=np.float64)
    u = w if candidate_weights is None else np.asarray(candidate_weights, dtype=np.float64)
    if b.ndim != 1 or not b.shape == c.shape == w.shape == u.shape or len(b) < 2:
        raise ValueError(f"values and weights have the shapes {b.shape}, {c.shape}, {w.shape}, {u.shape}")
    return np.stack([w * (c - b), w] if np.array_equal(u, w) else [u * c, u, w * b, w], 1)


def _products(columns: Array) -> Array:
    """All products of two columns, [n, k·k]."""
    return (columns[:, :, None] * columns[:, None, :]).reshape(len(columns), -1)


def _differences(sums: Array, products: Array) -> tuple[Array, Array]:
    """Estimate and linearised standard error, per row, from sums of the columns [rows, k] and of their products."""
    k = sums.shape[1]
    value, slopes = np.zeros(len(sums)), np.zeros_like(sums)
    for i, sign in ((0, 1.0), (2, -1.0))[: k // 2]:
        quality = sums[:, i] / sums[:, i + 1]
        value += sign * quality
        slopes[:, i], slopes[:, i + 1] = sign / sums[:, i + 1], -sign * quality / sums[:, i + 1]
    variance = np.einsum("ri,rij,rj->r", slopes, products.reshape(-1, k, k), slopes)
    return value, np.sqrt(np.maximum(variance, 0))


def _chunks(n: int, resamples: int, seed: int) -> list[tuple[int, np.random.Generator]]:
    """Resamples in portions that fit the cache, all from one generator."""
    rng, most = np.random.default_rng(seed), max(1, 200_000 // n)
    return [(min(most, resamples - start), rng) for start in range(0, resamples, most)]


def _studentized(columns: Array, value: float, spread: float, size: int, rng: np.random.Generator) -> Array:
    """(estimate* − estimate) / standard error*, for `size` resamples of the rows."""
    n = len(columns)
    draws = rng.integers(0, n, (size, n)) + n * np.arange(size)[:, None]
    counts = np.bincount(draws.ravel(), minlength=size * n).reshape(size, n).astype(np.float64)
    values, spreads = _differences(counts @ columns, counts @ _products(columns))
    return (values - value) / np.maximum(spreads, spread / 10)


def bootstrap_lower(
    statistic: Callable[[NDArray[np.int64]], float],
    n: int,
    *,
    level: float = 0.99,
    resamples: int = 999,
    groups: int = 50,
    seed: int = 0,
) -> Bound:
    """Lower bound of a statistic of a set of examples (F1's difference, …) by the BCa bootstrap.

    Bias is corrected by the share of resamples below the estimate, skew by a jackknife that leaves out one of
    `groups` random groups at a time, so that the statistic is called resamples + groups + 1 times.

    Args:
        statistic: index [m] int64 into the n examples (with repeats) → number, higher is better.
        n: examples.
        level: of the bound.
        resamples: at 99 % no fewer than 999.
        groups: of the jackknife.
        seed: of resampling and grouping.

    Raises:
        ValueError: the statistic is not finite on the examples, or on most resamples.

    Source: Efron 1987, Better Bootstrap Confidence Intervals, JASA 82, 171–185.

    Example:
        >>> x = np.arange(100.0)
        >>> bound = bootstrap_lower(lambda i: x[i].mean(), 100, level=0.95)
        >>> bound.value, 44 < bound.low < 46
        (49.5, True)
    """
    rng = np.random.default_rng(seed)
    value = float(statistic(np.arange(n)))
    draws = np.array([float(statistic(rng.integers(0, n, n))) for _ in range(resamples)])
    draws = draws[np.isfinite(draws)]
    if not math.isfinite(value) or len(draws) < resamples / 2:
        raise ValueError(f"the statistic is {value} and finite on only {len(draws)} of {resamples} resamples")
    if np.ptp(draws) == 0:
        return Bound(value, min(value, float(draws[0])), level)
    order = rng.permutation(n)
    left_out = [float(statistic(np.sort(np.delete(order, part)))) for part in np.array_split(np.arange(n), min(groups, n))]
    share = ((draws < value).mean() + (draws <= value).mean()) / 2  # ties count half
    bias = float(stats.norm.ppf(np.clip(share, 1 / (resamples + 1), resamples / (resamples + 1))))
    z = bias + float(stats.norm.ppf(1 - level))
    tail = float(stats.norm.cdf(bias + z / max(1 - _acceleration(np.array(left_out)) * z, 1e-3)))
    return Bound(value, float(np.quantile(draws, tail, method="inverted_cdf")), level)


def _acceleration(left_out: Array) -> float:
    """Skew of the jackknife's influences, / 6."""
    influence = left_out[np.isfinite(left_out)].mean() - left_out[np.isfinite(left_out)]
    scale = float((influence**2).sum()) ** 1.5
    return float((influence**3).sum()) / (6 * scale) if scale > 0 else 0.0
