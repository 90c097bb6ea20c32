"""Bounds on differences of quality: references and simulated coverage."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
from scipy import optimize, stats

from quadriga.measure.stats import (
    bootstrap_lower,
    certificate,
    divided,
    paired_bootstrap_lower,
    smallest_floor,
    tango,
    tango_lower,
)

SPEC = importlib.util.spec_from_file_location("intervals", Path(__file__).parents[2] / "benchmarks" / "intervals.py")
intervals = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(intervals)


def naive_score(d, gained, lost, n):
    """The score test written out: the trinomial likelihood is maximised under p(gained) − p(lost) = d by brute force."""
    low, high = max(0.0, -d), (1 - d) / 2

    def minus_likelihood(q):
        cells = ((gained, q + d), (lost, q), (n - gained - lost, 1 - 2 * q - d))
        return -sum(count * np.log(max(p, 1e-300)) for count, p in cells if count)

    q = optimize.minimize_scalar(minus_likelihood, bounds=(low, high), method="bounded", options={"xatol": 1e-13}).x
    return (gained - lost - n * d) / np.sqrt(n * (2 * q + d - d * d))


@pytest.mark.parametrize("gained, lost, n", [(1, 7, 21), (40, 20, 160), (3, 9, 500), (30, 45, 1000), (0, 4, 60), (5, 0, 80)])
@pytest.mark.parametrize("level", [0.9, 0.95, 0.99])
def test_tango_inverts_the_score_test(gained, lost, n, level):
    """At both ends the brute-force score is at the critical value."""
    z = stats.norm.ppf((1 + level) / 2)
    low, high = tango(gained, lost, n, level)
    assert naive_score(low, gained, lost, n) == pytest.approx(z, abs=2e-3)
    assert naive_score(high, gained, lost, n) == pytest.approx(-z, abs=2e-3)


def test_tango_agrees_with_the_closed_form():
    """Its ends are roots of a quartic (Yang, Sun and Hardin 2013, Statistics in Medicine 32, 1336-1342)."""
    b, c, n, g = 40, 20, 160, stats.norm.ppf(0.975) ** 2
    d = b - c
    quartic = [
        n**2 * (n / g + 1) ** 2,
        -n * d * (n / g + 1) * (4 * n / g + 1),
        2 * n * d**2 * (3 * n / g + 2) / g - n**2 * ((b + c) / g + 1),
        n * d * (2 * (b + c) / g + 1) - d**3 * (4 * n / g + 1) / g,
        d**2 * (d**2 / g - (b + c)) / g,
    ]
    roots = [r.real for r in np.roots(quartic) if abs(r.imag) < 1e-9]
    for end in tango(b, c, n):
        assert min(abs(end - r) for r in roots) < 1e-8


def test_tango_of_published_data():
    """Airway reactivity, 21 pairs (Fagerland, Lydersen and Laake 2014): −0.517 to −0.026."""
    assert tango(1, 7, 21) == pytest.approx((-0.517, -0.026), abs=5e-4)


def test_tango_symmetry_and_edges():
    low, high = tango(12, 30, 400)
    assert tango(30, 12, 400) == pytest.approx((-high, -low))
    z2 = stats.norm.ppf(0.99) ** 2
    assert tango_lower(0, 0, 1000, 0.99) == pytest.approx(-z2 / (1000 + z2))  # no disagreement is no proof of equality
    assert tango_lower(5, 5, 5 + 5) <= tango_lower(50, 50, 100) < 0
    many = tango_lower(np.array([3, 12]), np.array([9, 30]), np.array([500, 400]))
    assert many.tolist() == [tango_lower(3, 9, 500), tango_lower(12, 30, 400)]


@pytest.mark.parametrize("case", intervals.TANGO_CASES)
@pytest.mark.parametrize("level", [0.95, 0.99])
def test_tango_covers_what_it_says(case, level):
    assert abs(intervals.tango_coverage(level, *case, tests=20_000) - level) <= 0.01
    assert abs(intervals.tango_coverage(level, *case, tests=20_000, sides=2) - level) <= 0.01


@pytest.mark.parametrize("kind", ["skewed", "weighted", "reweighted"])
def test_paired_bootstrap_covers_what_it_says(kind):
    """Within 1 % and three standard errors of the simulation (0.6 %); `benchmarks/intervals.py` is sharper."""
    covered = intervals.bootstrap_coverage(0.95, kind, n=300, tests=1200, resamples=99)
    assert abs(covered - 0.95) <= 0.01 + 3 * (0.95 * 0.05 / 1200) ** 0.5


def test_paired_bootstrap_tends_to_students_bound():
    """For many examples without skew both are the same bound."""
    rng = np.random.default_rng(1)
    base = rng.normal(size=4000)
    change = rng.normal(0.1, 1.0, 4000)
    bound = paired_bootstrap_lower(base, base + change, level=0.95, resamples=1999)
    error = change.std(ddof=1) / 4000**0.5
    assert bound.value == pytest.approx(change.mean())
    assert bound.low == pytest.approx(change.mean() - stats.t.ppf(0.95, 3999) * error, abs=0.1 * error)


def test_paired_bootstrap_with_weights_is_scale_free_and_paired():
    rng = np.random.default_rng(2)
    base, weights = rng.gamma(2, 1, 300), rng.integers(1, 9, 300)
    change = rng.normal(size=300)
    one = paired_bootstrap_lower(base, base + change, weights, level=0.95, resamples=199)
    assert paired_bootstrap_lower(base, base + change, 7.0 * weights, level=0.95, resamples=199).low == pytest.approx(one.low)
    assert paired_bootstrap_lower(base + 5, base + 5 + change, weights, level=0.95, resamples=199).low == pytest.approx(one.low)
    same = paired_bootstrap_lower(base, base + change, weights, candidate_weights=weights * 1.0, level=0.95, resamples=199)
    assert same == one
    assert one.value == pytest.approx(np.average(change, weights=weights))


def test_paired_bootstrap_of_few_differing_examples_stays_finite_and_wide():
    base = np.zeros(1000)
    candidate = base.copy()
    candidate[[10, 20]] = -1.0
    bound = paired_bootstrap_lower(base, candidate, level=0.99)
    assert -0.05 < bound.low < bound.value - 3 * 0.002**0.5 / 1000**0.5
    assert paired_bootstrap_lower(base, base).low == 0.0
    with pytest.raises(ValueError):
        paired_bootstrap_lower(base, base[:5])


def test_set_bootstrap_covers_what_it_says():
    covered = intervals.set_coverage(0.95, n=300, tests=120)
    assert covered >= stats.binom.ppf(0.002, 120, 0.94) / 120


def test_set_bootstrap_agrees_with_scipy():
    """scipy's BCa on a skewed sample; its jackknife leaves out one at a time."""
    x = np.random.default_rng(3).exponential(size=200)
    ours = bootstrap_lower(lambda i: x[i].mean(), 200, level=0.95, resamples=1999, groups=200)
    theirs = stats.bootstrap((x,), np.mean, confidence_level=0.9, method="BCa", n_resamples=1999, rng=0)
    assert ours.low == pytest.approx(theirs.confidence_interval.low, abs=0.2 * stats.sem(x))


def test_certificate_is_clopper_pearson():
    for k, n, level in ((0, 10, 0.95), (7, 200, 0.99), (120, 10_000, 0.95), (10, 10, 0.99)):
        reference = stats.binomtest(k, n, alternative="less").proportion_ci(level, method="exact").high
        assert certificate(k, n, level) == pytest.approx(reference)
    with pytest.raises(ValueError):
        certificate(3, 2)


def test_certificate_bounds_the_accuracy_lost():
    """Whatever the labels are: the accuracy lost is at most the rate at which predictions differ."""
    rng = np.random.default_rng(4)
    for _ in range(50):
        labels, a, b = rng.integers(0, 4, (3, 100))
        lost = (a == labels).mean() - (b == labels).mean()
        assert lost <= (a != b).mean() <= certificate(int((a != b).sum()), 100)


def test_certificate_covers_what_it_says():
    for level in (0.95, 0.99):
        assert -0.001 <= intervals.certificate_coverage(level, 2000, 0.05) - level <= 0.01


@pytest.mark.parametrize("power", [0.5, 0.8])
@pytest.mark.parametrize("n, disagreement", [(1000, 0.1), (10_000, 0.05)])
def test_the_smallest_floor_is_proved_as_often_as_it_says(power, n, disagreement):
    assert abs(intervals.floor_power(n, disagreement, 0.95, power) - power) <= 0.025


def test_the_smallest_floor_shrinks_with_data_and_agreement():
    assert smallest_floor(10_000, 0.05) < smallest_floor(1000, 0.05) < smallest_floor(1000, 0.1)
    assert 0 < smallest_floor(10_000, 0.0) < 0.001
    rough = stats.norm.ppf(0.99) * (0.05 / 10_000) ** 0.5
    assert smallest_floor(10_000, 0.05) == pytest.approx(rough, rel=0.02)


def test_error_rate_is_divided_among_finalists():
    """Three bounds at the divided level hold together at least as often as promised, dependent as they are."""
    assert divided(0.99, 1) == 0.99
    level, rng = 0.95, np.random.default_rng(5)
    shared, own = rng.normal(size=(20_000, 1)), rng.normal(size=(20_000, 3))
    errors = (shared + own) / 2**0.5
    assert (errors <= stats.norm.ppf(divided(level, 3))).all(1).mean() >= level
    for count in (0, 4):
        with pytest.raises(ValueError):
            divided(0.99, count)
