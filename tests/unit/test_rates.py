"""The learning-rate range test: on curves whose answer is known, and against trainings at the rates that it suggests."""

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as some

from quadriga.core.errors import BadInput, Diverged
from quadriga.core.recipe import Recipe, step
from quadriga.engine.walk import walk
from quadriga.stages.rates import BLOWN, HIGHEST, LOWEST, learning_rates, smooth, suggest
from quadriga.testing import TINY, fingerprint, tiny_mlp
from quadriga.train.loop import fit

torch.set_num_threads(1)
RATES = [1e-6 * 10 ** (k / 20) for k in range(160)]


def curve(falls_at, blows_at, noise=0.0):
    """A loss that falls from 2 to 1 around one rate, in a decade, and grows with the rate beyond another."""
    generator = torch.Generator().manual_seed(0)
    shaken = (noise * torch.randn(len(RATES), generator=generator)).tolist()
    fall = [1 / (1 + math.exp(-6 * math.log10(r / falls_at))) for r in RATES]
    return [2 - f + s + max(0.0, r / blows_at - 1) for f, s, r in zip(fall, shaken, RATES, strict=True)]


@pytest.mark.parametrize("noise", [0.0, 0.03])
@pytest.mark.parametrize(("falls_at", "blows_at"), [(1e-3, 1e-1), (1e-2, 1.0), (1e-4, 1e-2)])
def test_known_curves(falls_at, blows_at, noise):
    """The steepest fall is where the curve has it; the loss is four times its smallest at four times `blows_at`."""
    found = suggest(RATES, curve(falls_at, blows_at, noise))
    assert falls_at / 2 < found.steepest < falls_at * 2
    assert blows_at < found.blown < 10 * blows_at
    assert found.largest == found.blown / 10


@given(some.floats(0.1, 10), some.floats(0.01, 100))
def test_units_of_loss_and_rate_do_not_matter(loss_unit, rate_unit):
    losses = curve(1e-3, 1e-1)
    plain, scaled = suggest(RATES, losses), suggest([rate_unit * r for r in RATES], [loss_unit * x for x in losses])
    assert scaled.steepest == pytest.approx(rate_unit * plain.steepest)
    assert scaled.blown == pytest.approx(rate_unit * plain.blown)


def test_a_loss_that_never_falls_or_never_grows():
    generator = torch.Generator().manual_seed(1)
    flat = suggest(RATES, (2 + 0.05 * torch.randn(160, generator=generator)).tolist())
    assert flat.steepest is None and flat.blown is None and flat.largest == RATES[-1] / 10
    assert suggest(RATES[:30], [2.0] * 29 + [math.nan]).blown == RATES[29]
    assert suggest(RATES[:1], [math.inf]).blown == RATES[0]


def test_losses_below_zero():
    """Four times the smallest says nothing of them: they are measured by how far they fell."""
    found = suggest(RATES, [x - 2 for x in curve(1e-3, 1e-1)])
    assert found.blown is not None and 1e-1 < found.blown < 1


@given(some.lists(some.floats(-10, 10), min_size=1, max_size=30), some.floats(0.0, 0.99))
def test_smoothing_is_a_weighted_mean(losses, memory):
    """The closed form: weights memory^(age), normalised."""
    weights = [memory**age for age in range(len(losses))][::-1]
    mean = sum(w * x for w, x in zip(weights, losses, strict=True)) / sum(weights)
    assert smooth(losses, memory)[-1] == pytest.approx(mean, rel=1e-9, abs=1e-9)


def workload_of(name, kind="sgd", **fields):
    recipe = Recipe((step("optimizer", kind=kind, lr=0.05, **fields), step("train", epochs=5)), "baseline")
    return replace(TINY[name]((480, 48, 48)), baseline=recipe)


def loss_at(workload, kind, rate):
    """After five epochs at a constant rate, over the last hundred steps."""
    recipe = Recipe((step("optimizer", kind=kind, lr=rate), step("train", epochs=5)))
    setup = walk(workload, recipe, seed=0, store=None, until=1).setup
    try:
        return fit(setup, workload.train, epochs=5, seed=0).loss
    except Diverged:
        return math.inf


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
@pytest.mark.parametrize("name", ["cnn", "mlp", "attention"])
def test_the_suggested_rate_trains_well(name, kind):
    """A hundred times less or more ends at more than twice the loss."""
    workload = workload_of(name, kind)
    rate = learning_rates(workload)["steepest_descent"]
    mine = loss_at(workload, kind, rate)
    assert 2 * mine < min(loss_at(workload, kind, rate / 100), loss_at(workload, kind, 100 * rate))


def test_rates_rise_by_a_constant_factor_whatever_the_recipe_says():
    """The baseline's rate is only a unit; its series ends where the loss blew up. The same seed gives the same series."""
    one, other = learning_rates(workload_of("mlp")), learning_rates(replace(workload_of("mlp"), batch_size=16))
    assert one["series"] == other["series"]
    rates = [row["rate"] for row in one["series"]]
    assert rates[0] == pytest.approx(LOWEST) and max(rates) < HIGHEST
    assert [b / a for a, b in pairwise(rates)] == pytest.approx([10 ** (1 / 20)] * (len(rates) - 1))
    smoothed = [row["smoothed"] for row in one["series"]]
    assert one["blew_up_at"] == rates[-1]
    assert max(smoothed[:-1]) <= BLOWN * min(smoothed) < smoothed[-1]


def test_a_loss_that_is_not_finite_ends_the_test():
    """The loop raises before anybody sees such a loss; it does not begin again, and the rate is that of the step."""
    workload = workload_of("mlp")
    seen = []

    def loss(output, batch):
        seen.append(len(batch))
        value = torch.nn.functional.cross_entropy(output, batch.target, reduction="none")
        return value * math.inf if len(seen) == 60 else value

    before = fingerprint(workload.model)
    found = learning_rates(replace(workload, loss=loss))
    assert found["blew_up_at"] == found["series"][-1]["rate"] and math.isinf(found["series"][-1]["loss"])
    assert len(seen) == 60 and fingerprint(workload.model) == before


def test_nothing_to_learn_from():
    tiny = tiny_mlp(trained=True)
    with pytest.raises(BadInput, match="training data"):
        learning_rates(replace(tiny, train=None, baseline=None))
    with pytest.raises(BadInput, match="at least 10 steps"):
        learning_rates(tiny, steps=3)
