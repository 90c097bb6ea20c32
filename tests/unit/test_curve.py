"""How far a candidate is expected to rise: by its own curve, by others', by a guess; and who is carried on for that."""

from __future__ import annotations

import math

import pytest

from quadriga.core.recipe import Recipe, step
from quadriga.search.allocate import Allocator, Bar, Candidate, Score
from quadriga.search.curve import FADES, LEAST, Curve

RUNGS = (1.0, 2.0, 4.0, 8.0)
BAR = Bar(margin=0.5, z=2.0, n_val=2000, n_test=10_000)


def scores(*differences, sd=20.0):
    return {rung: Score(d, sd) for rung, d in enumerate(differences)}


def test_its_own_curve_counts_before_that_of_others():
    curve = Curve(RUNGS, [scores(-9.0, -1.0), scores(-9.0, -1.0)], 2000)
    flat, steep = (curve.growth(scores(-5.0, d), 2)[0] for d in (-5.0, -3.0))
    assert flat == 0.0 and steep == pytest.approx(2.0 * FADES)
    assert curve.growth(scores(-5.0), 1)[0] == pytest.approx(8.0), "nothing is known of itself, so others count"


def test_a_curve_flattens():
    curve = Curve(RUNGS, [], 2000)
    steps = [curve.growth(scores(-5.0, -3.0), to)[0] for to in (1, 2, 3)]
    assert steps[0] == 0.0 and steps[2] - steps[1] < steps[1] - steps[0]


def test_curves_that_rise_ever_faster_are_believed():
    """A language model whose baseline was trained for one epoch: pruned, 61.8, 64.0, 67.3 and 71.9 at doubled lengths, and its
    rival, at 51.8, 58.4 and 61.8, was given up at three quarters of an epoch; by hand it came to 69.4 after three."""
    known, rival = scores(61.8, 64.0, 67.3, 71.9, sd=40.0), scores(51.8, 58.4, 61.8, sd=40.0)
    alone, taught = (Curve((*RUNGS, 16.0), tried, 2000).growth(rival, 4)[0] for tried in ([rival], [rival, known]))
    assert 61.8 + alone < 66.0 and 67.5 < 61.8 + taught < 71.5
    wild = Curve(RUNGS, [scores(0.0, 0.1, 5.0), scores(0.0, 9.0, 9.0)], 2000)
    assert wild.fades == (FADES + LEAST) / 2, (
        "of what is within chance nothing is learnt; one ratio alone counts half, and within bounds"
    )


def test_a_falling_curve_promises_nothing_and_is_doubted():
    mean, doubt = Curve(RUNGS, [], 2000).growth(scores(-3.0, -5.0), 3)
    assert mean == 0.0 and doubt > 0.0


def test_without_any_curve_it_is_a_guess_as_large_as_its_doubt():
    curve = Curve(RUNGS, [scores(-3.0)], 2500)
    mean, doubt = curve.growth(scores(-3.0), 1)
    assert mean == pytest.approx(2 * 20.0 / 50 * math.log(2)) and doubt >= mean


def candidate(name, gain, *differences):
    return Candidate(Recipe((step("shrink", name=name), step("train", epochs=8))), gain, scores(*differences))


def test_a_rising_candidate_is_carried_on_and_a_flat_one_is_not():
    allocator = Allocator(BAR, RUNGS)
    rising, flat = candidate("a", 1.0, -4.0, -2.0), candidate("b", 1.0, -2.05, -2.0)
    assert allocator.next([flat, rising])[:2] == (rising, 2)
    worth = [found[2] if (found := allocator.next([c])) else 0.0 for c in (rising, flat)]
    assert worth[0] > 3 * worth[1]


def test_nobody_is_trained_beyond_what_the_time_allows():
    """The same candidate is worth a training where there is time for a long one, and none where only a short one is left."""
    lengths = {"long": 3, "short": 1, "none": 0}
    found = {}
    for name, rung in lengths.items():
        allocator = Allocator(BAR, RUNGS, lambda c, rung=rung: rung)
        found[name] = allocator.next([candidate("a", 1.0, -6.0)])
    assert found["long"] is not None and found["none"] is None
    assert found["short"] is None or found["short"][2] < found["long"][2]


def test_the_incumbent_is_made_safer_while_there_is_time():
    doubtful = candidate("a", 1.0, 0.5)
    chance = Allocator(BAR, RUNGS).chance(doubtful)
    assert 0.8 < chance < 0.98
    assert Allocator(BAR, RUNGS).next([doubtful]) == (doubtful, 1, 0.0)
    assert Allocator(BAR, RUNGS, lambda c: 0).next([doubtful]) is None
