"""Simulated error rates of every interval and verdict: `python benchmarks/intervals.py`, ends in one line of JSON.

It takes one to two minutes. Nothing is timed: clocks and answers are drawn from known distributions, so that what an
interval says can be compared with the truth. `tests/unit/test_stats.py` runs smaller versions of the same functions.
(Not called statistics.py: beside other scripts that would hide Python's own module of this name from PyTorch.)
"""

from __future__ import annotations

import json
import math
import tempfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from quadriga.measure.latency import paired
from quadriga.measure.machine import Busy
from quadriga.measure.stats import (
    bootstrap_lower,
    certificate,
    paired_bootstrap_lower,
    ratio,
    smallest_floor,
    student,
    tango,
    tango_lower,
)

GAIN = 1.10
BLOCK, RESTART, SPIKES = 0.03, 0.015, 0.03  # log-normal noise of a block, of a restart, share of blocks with a spike


def noise(rng: np.random.Generator, shape: tuple[int, ...], heavy: bool = False) -> np.ndarray:
    """Logs of times [..., restarts, blocks]: restart effect, block noise, and now and then a spike of about 2×."""
    effect = rng.standard_t(3, shape[:-1]) if heavy else rng.normal(size=shape[:-1])
    spikes = (rng.random(shape) < SPIKES) * rng.exponential(0.7, shape)
    return RESTART * effect[..., None] + BLOCK * rng.normal(size=shape) + spikes


class SimulatedArm:
    """An arm without a process: it answers from drawn times and moves the injected clock on."""

    def __init__(self, times: np.ndarray, clock: list[float]) -> None:
        self.times, self.clock = iter(times.tolist()), clock

    def ask(self, command: Mapping[str, Any], timeout: float) -> Mapping[str, Any]:
        """The protocol of `quadriga.measure.arm`."""
        if command["do"] == "block":
            wall = next(self.times)
            self.clock[0] += wall * command["calls"]
            return {"wall": wall, "cpu": wall}
        return {"calls": 10}

    def close(self) -> None:
        """Nothing to end."""


def verdicts(pairs: int, gain: float, restarts: int = 8, blocks: int = 10, seed: int = 0) -> Counter[str]:
    """Verdicts of `paired` on simulated arms, the second `gain` times faster than the first."""
    rng, found, clock = np.random.default_rng(seed), Counter[str](), [0.0]
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(pairs):
            logs = noise(rng, (2, restarts, blocks))
            times = dict(zip("ab", np.exp(logs) * np.array([gain, 1.0])[:, None, None] / 1000, strict=True))
            starts = {name: iter(times[name]) for name in times}
            timings = paired(
                {"a": {}, "b": {}},
                {1: torch.zeros(1)},
                restarts=restarts,
                blocks=blocks,
                folder=Path(folder),
                launch=lambda name, spec, place, starts=starts: SimulatedArm(next(starts[name]), clock),
                clock=lambda: clock[0],
                look=lambda: Busy(0.0, 0.0),
            )
            result = timings.ratio("a", "b", 1)
            assert result is not None
            found[result.verdict] += 1
    return found


def quick_verdicts(pairs: int, gain: float, restarts: int = 8, blocks: int = 10, seed: int = 0) -> Counter[str]:
    """As `verdicts`, from the same distribution, without the protocol."""
    rng, found = np.random.default_rng(seed), Counter[str]()
    for _ in range(pairs):
        a, b = np.exp(noise(rng, (2, restarts, blocks)))
        found[ratio(gain * a, b).verdict] += 1  # type: ignore[arg-type]
    return found


def ratio_coverage(level: float, restarts: int, pairs: int = 20_000, blocks: int = 10, heavy: bool = False) -> float:
    """Share of intervals that hold the true ratio."""
    a, b = noise(np.random.default_rng(restarts), (2, pairs, restarts, blocks), heavy)
    low, high = student(np.median(a - b, -1), level)
    return float(((low <= 0) & (high >= 0)).mean())


def percentile_coverage(level: float, restarts: int, pairs: int = 1500, studentized: bool = False) -> float:
    """The rejected alternatives: percentile bootstrap and bootstrap-t over restarts."""
    rng = np.random.default_rng(restarts)
    a, b = noise(rng, (2, pairs, restarts, 10))
    logs, draws, held = np.median(a - b, -1), rng.integers(0, restarts, (2000, restarts)), 0
    for row in logs:
        means = row[draws].mean(1)
        if studentized:
            t = (means - row.mean()) / np.maximum(row[draws].std(1, ddof=1), 1e-12)
            low, high = row.mean() - np.quantile(t, [(1 + level) / 2, (1 - level) / 2]) * row.std(ddof=1)
        else:
            low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
        held += low <= 0 <= high
    return held / pairs


def tango_coverage(level: float, n: int, gain: float, loss: float, tests: int = 40_000, sides: int = 1) -> float:
    """Share of Tango's bounds (or two-sided intervals) that hold gain − loss."""
    counts = np.random.default_rng(n).multinomial(n, [gain, loss, 1 - gain - loss], tests)
    if sides == 1:
        return float((tango_lower(counts[:, 0], counts[:, 1], n, level) <= gain - loss).mean())
    low, high = tango(counts[:, 0], counts[:, 1], n, level)
    return float(((low <= gain - loss) & (high >= gain - loss)).mean())


def bootstrap_coverage(level: float, kind: str, n: int = 400, tests: int = 1500, resamples: int = 199) -> float:
    """Share of paired bootstrap bounds below the truth. Changes per example have mean 0 and a tail of losses.

    Kinds: "skewed" (skewness −2), "weighted" (by tokens, correlated with the values), "reweighted" (weights of the
    candidate differ), and "heavy" (skewness −2.3, kurtosis 21), where few examples decide and every method is too bold.
    """
    rng, held = np.random.default_rng(n), 0
    for number in range(tests):
        base = rng.gamma(2.0, 1.0, n)
        change = 0.3 * (1 - rng.exponential(1.0, n))
        if kind == "heavy":
            change *= rng.choice([-1.0, 3.0], n, p=[0.75, 0.25])
        weights = 1.0 + rng.poisson(base * 3) if "weighted" in kind else np.ones(n)
        other = weights + rng.integers(0, 2, n) if kind == "reweighted" else None
        bound = paired_bootstrap_lower(
            base, base + change, weights, candidate_weights=other, level=level, resamples=resamples, seed=number
        )
        held += bound.low <= _truth(kind)
    return held / tests


def _truth(kind: str) -> float:
    """Differences of the populations: base ~ gamma(2), mean 2, square 6; E[w] = 1 + 3·2 = 7, E[w·base] = 2 + 3·6 = 20."""
    return (20 + 2 * 0.5) / (7 + 0.5) - 20 / 7 if kind == "reweighted" else 0.0


def f1(truth: np.ndarray, guess: np.ndarray) -> float:
    """F1 of the positive class."""
    return 2 * float(truth @ guess) / max(float(truth.sum() + guess.sum()), 1.0)


def set_coverage(level: float, n: int = 400, tests: int = 1000) -> float:
    """Share of BCa bounds of a difference of F1 below the truth; two guessers of equal quality, 30 % positives."""
    rng, held = np.random.default_rng(n), 0
    for number in range(tests):
        truth = (rng.random(n) < 0.3).astype(float)
        a, b = (np.abs(truth - (rng.random(n) < 0.1)) for _ in range(2))
        bound = bootstrap_lower(lambda i: f1(truth[i], b[i]) - f1(truth[i], a[i]), n, level=level, seed=number)  # noqa: B023
        held += bound.low <= 0
    return held / tests


def certificate_coverage(level: float, n: int, rate: float, tests: int = 20_000) -> float:
    """Share of Clopper-Pearson bounds above the true rate."""
    counts = np.random.default_rng(n).binomial(n, rate, tests)
    bounds = {int(k): certificate(int(k), n, level) for k in np.unique(counts)}
    return float(np.mean([bounds[int(k)] >= rate for k in counts]))


def floor_power(n: int, disagreement: float, level: float, power: float, tests: int = 40_000) -> float:
    """How often an equally good candidate proves the floor that `smallest_floor` names; to be near `power`."""
    half = disagreement / 2
    counts = np.random.default_rng(n).multinomial(n, [half, half, 1 - disagreement], tests)
    margin = smallest_floor(n, disagreement, level, power)
    return float((tango_lower(counts[:, 0], counts[:, 1], n, level) >= -margin).mean())


TANGO_CASES = ((200, 0.05, 0.05), (500, 0.02, 0.03), (1000, 0.01, 0.03), (10_000, 0.001, 0.001), (10_000, 0.04, 0.045))


def _name(case: tuple[float, ...]) -> str:
    return "n{}+{:g}-{:g}".format(*case)


def main() -> None:
    """Print progress in lines, and at the end one JSON object."""
    pairs = 10_000
    same, better = verdicts(pairs, 1.0), verdicts(pairs // 5, GAIN, seed=1)
    out: dict[str, Any] = {
        "a_a_pairs": pairs,
        "a_a_wrong": (same["faster"] + same["slower"]) / pairs,
        "gain_found": better["faster"] / (pairs // 5),
        "gain_found_6_restarts": quick_verdicts(5000, GAIN, restarts=6, seed=2)["faster"] / 5000,
        "gain_found_4_restarts": quick_verdicts(5000, GAIN, restarts=4, seed=3)["faster"] / 5000,
    }
    print(out, flush=True)
    for level in (0.95, 0.99):
        for restarts in (4, 6, 8, 12):
            for heavy in (False, True):
                key = f"ratio/{level}/{restarts}{'/heavy' if heavy else ''}"
                out[key] = ratio_coverage(level, restarts, heavy=heavy)
        for case in TANGO_CASES:
            out[f"tango_lower/{level}/{_name(case)}"] = tango_coverage(level, *case)
            out[f"tango/{level}/{_name(case)}"] = tango_coverage(level, *case, sides=2)
        for kind in ("skewed", "weighted", "reweighted"):
            out[f"paired_bootstrap/{level}/{kind}"] = bootstrap_coverage(level, kind)
        out[f"bootstrap_set/{level}"] = set_coverage(level)
        out[f"certificate/{level}"] = certificate_coverage(level, 2000, 0.05)
    print({k: v for k, v in out.items() if "/" in k}, flush=True)
    for restarts in (6, 8, 12):
        out[f"rejected/percentile/0.99/{restarts}"] = percentile_coverage(0.99, restarts)
        out[f"rejected/bootstrap_t/0.99/{restarts}"] = percentile_coverage(0.99, restarts, studentized=True)
    for power in (0.5, 0.8):
        out[f"floor_power/{power}"] = floor_power(10_000, 0.05, 0.99, power)
    out["limits/paired_bootstrap/0.99/heavy_200"] = bootstrap_coverage(0.99, "heavy", n=200)
    kept = {
        k: abs(v - float(k.split("/")[1]))
        for k, v in out.items()
        if k.split("/")[0] not in ("rejected", "floor_power", "limits") and "/" in k
    }
    out["worst_coverage_error"] = max(kept.values())
    assert math.isfinite(out["worst_coverage_error"])
    print(json.dumps(out))


if __name__ == "__main__":
    main()
