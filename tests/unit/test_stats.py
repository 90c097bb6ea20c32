"""Ratios of timings: verdicts and coverage on simulated machines."""

import importlib.util
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from quadriga.measure.stats import EQUIVALENT, ratio, student

SPEC = importlib.util.spec_from_file_location("intervals", Path(__file__).parents[2] / "benchmarks" / "intervals.py")
intervals = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(intervals)


def test_equal_arms_are_rarely_called_unequal():
    """10,000 A/A pairs at 99 %: at most 1.2 % wrong verdicts in total, and not far fewer, which would cost power."""
    found = intervals.quick_verdicts(10_000, 1.0)
    assert 0.006 <= (found["faster"] + found["slower"]) / 10_000 <= 0.012
    assert abs(found["faster"] - found["slower"]) < 50  # no side is favoured


def test_equal_arms_through_the_protocol_with_an_injected_clock():
    found = intervals.verdicts(500, 1.0, seed=3)
    assert found["faster"] + found["slower"] <= stats.binom.ppf(0.999, 500, 0.01)
    assert found["equivalent"] > 0


@pytest.mark.parametrize("restarts", [6, 8, 12])
def test_a_planted_gain_is_found(restarts):
    """10 % in at least 95 % of the comparisons, from six restarts on; and never called slower."""
    found = intervals.quick_verdicts(1500, 1.10, restarts=restarts, seed=restarts)
    assert found["faster"] >= 0.95 * 1500
    assert found["slower"] == 0


def test_a_planted_gain_is_found_through_the_protocol():
    found = intervals.verdicts(200, 1.10, seed=4)
    assert found["faster"] >= 190


@pytest.mark.parametrize("level", [0.95, 0.99])
@pytest.mark.parametrize("restarts", [4, 6, 12])
@pytest.mark.parametrize("heavy", [False, True])
def test_intervals_cover_what_they_say(level, restarts, heavy):
    assert abs(intervals.ratio_coverage(level, restarts, heavy=heavy) - level) <= 0.01


def test_the_percentile_bootstrap_over_restarts_does_not():
    """Why it is not used: with n restarts it cannot even reach past the smallest and the largest."""
    assert intervals.percentile_coverage(0.99, 6, pairs=400) < 1 - 2 * 0.5**6 < 0.98


def test_student_agrees_with_scipy():
    x = np.random.default_rng(0).normal(size=(3, 7))
    low, high = student(x, 0.9)
    for row, a, b in zip(x, low, high, strict=True):
        assert (a, b) == pytest.approx(stats.t.interval(0.9, 6, loc=row.mean(), scale=stats.sem(row)))


times = st.lists(st.lists(st.floats(1e-4, 1e2), min_size=3, max_size=3), min_size=4, max_size=4)


@given(times, times)
@settings(max_examples=60, deadline=None)
def test_swapping_the_arms_swaps_the_verdict(a, b):
    one, other = ratio(a, b), ratio(b, a)
    assert one.value == pytest.approx(1 / other.value)
    if 0 < other.high < math.inf and 0 < other.low:
        assert one.low == pytest.approx(1 / other.high, rel=1e-6)
    names = {"faster": "slower", "slower": "faster"}
    assert other.verdict == names.get(one.verdict, one.verdict)


@given(times, st.floats(0.01, 100))
@settings(max_examples=30, deadline=None)
def test_a_common_slow_down_changes_nothing(a, factor):
    """What slows both arms of a restart alike, such as another process, leaves the ratio alone."""
    b = [[1.01 * t for t in blocks] for blocks in a]
    slowed = [[factor * t for t in blocks] for blocks in a], [[factor * t for t in blocks] for blocks in b]
    assert ratio(*slowed).value == pytest.approx(ratio(a, b).value)


def test_verdicts_follow_the_interval():
    exact = [[1.0, 1.0]] * 4
    assert ratio(exact, exact).verdict == "equivalent"
    assert ratio([[2.0, 2.0]] * 4, exact).verdict == "faster"
    assert ratio(exact, [[2.0, 2.0]] * 4).verdict == "slower"
    assert ratio([[2.0]], [[1.0]]).verdict == "unmeasured"  # one restart proves nothing
    assert ratio([[2.0]], [[1.0]]).plain()["high"] is None
    wide = ratio([[1.0], [2.0], [0.5], [1.0]], exact[:1] * 0 + [[1.0]] * 4)
    assert wide.verdict == "unmeasured"
    assert wide.low < 1 / EQUIVALENT
    unclear = ratio([[1.0], [1.1], [0.95], [1.02]], [[1.0]] * 4)
    assert unclear.verdict == "undecided"
    far_above_but_wide = ratio([[4.0], [30.0], [6.0], [90.0]], [[1.0]] * 4, level=0.8)
    assert far_above_but_wide.low > 1
    assert far_above_but_wide.verdict == "unmeasured", "4.7 to 87,775 times as fast is no result"


def test_one_spike_in_a_restart_hardly_moves_it():
    quiet, spiked = [[1.0] * 9] * 6, [[1.0] * 8 + [50.0]] * 6
    assert ratio(spiked, quiet).value == 1.0


@pytest.mark.parametrize("a, b", [([], []), ([[1.0]], [[1.0, 2.0]]), ([[1.0]], [[0.0]]), ([[math.nan]], [[1.0]]), ([[]], [[]])])
def test_unpaired_or_impossible_times_are_refused(a, b):
    with pytest.raises(ValueError):
        ratio(a, b)
