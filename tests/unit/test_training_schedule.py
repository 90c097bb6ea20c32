"""Schedules against closed forms, and torch's own schedulers where there is one."""

import math
from itertools import pairwise

import pytest
import torch

from quadriga.core.errors import BadInput
from quadriga.core.recipe import Recipe, step
from quadriga.core.setup import Setup
from quadriga.core.slots import Factors
from quadriga.methods.training.schedule import Schedule
from quadriga.search.space import at_rung
from quadriga.testing import tiny_mlp
from quadriga.train.factors import group_bases, set_factors

torch.set_num_threads(1)
GRID = [i / 200 for i in range(200)]


def torch_factors(make):
    """200 steps of a torch scheduler over a rate of 1."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    scheduler = make(optimizer)
    rates = []
    for _ in GRID:
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


sched = torch.optim.lr_scheduler
TORCH = {
    "step": lambda o: sched.MultiStepLR(o, [100, 150], gamma=0.1),
    "exponential": lambda o: sched.ExponentialLR(o, 0.1 ** (1 / 200)),
    "cosine": lambda o: sched.CosineAnnealingLR(o, 200, eta_min=0.25),
    "linear": lambda o: sched.LinearLR(o, 1.0, 0.25, 200),
    "polynomial": lambda o: sched.PolynomialLR(o, 200, power=2.0),
    "constant": lambda o: sched.ConstantLR(o, 1.0),
}


@pytest.mark.parametrize("kind", TORCH)
def test_equals_torch(kind):
    ours = [Schedule(kind=kind, final=0.0 if kind == "polynomial" else 0.25).factors(p) for p in GRID]
    assert [f.lr for f in ours] == pytest.approx(torch_factors(TORCH[kind]), abs=1e-9)
    assert all(f == Factors(lr=f.lr) for f in ours)  # the rate only


CLOSED = {  # with gamma = 0.1, milestones at 1/2 and 3/4, power = 2, decay = 0.2, final = 0.25, rise = 0.3, div = 25
    "step": lambda t: 1.0 if t < 0.5 else 0.1 if t < 0.75 else 0.01,
    "exponential": lambda t: math.exp(t * math.log(0.1)),
    "polynomial": lambda t: 0.25 + 0.75 * (1 - t) * (1 - t),
    "cosine": lambda t: 0.25 + 0.75 * math.cos(math.pi * t / 2) ** 2,
    "linear": lambda t: 0.25 * t + (1 - t),
    "one_cycle": lambda t: (
        1 - 0.96 * math.cos(math.pi * t / 0.6) ** 2 if t < 0.3 else 1 - 0.75 * math.sin(math.pi * (t - 0.3) / 1.4) ** 2
    ),
    "wsd": lambda t: min(1.0, 1 - 0.75 * (t - 0.8) / 0.2),
    "constant": lambda t: 1.0,
}


@pytest.mark.parametrize("kind", CLOSED)
def test_equals_its_closed_form(kind):
    schedule = Schedule(kind=kind, final=0.25)
    for t in (*GRID, 1.0):
        assert schedule.factors(t).lr == pytest.approx(CLOSED[kind](t), abs=1e-12)


@pytest.mark.parametrize("warmup", [0.0, 0.2])
@pytest.mark.parametrize("make", ["sgd", "adam"])
def test_one_cycle_equals_torch(make, warmup):
    """Rate and momentum (or first beta) of every step, where the optimizer's own values are the largest ones.

    Torch's peak is at step pct·T - 1 and its end at step T - 1, so those are our `rise` and t = 1.
    """
    steps = 200
    rise = (0.3 * steps - 1) / (steps - 1)
    optimizers = []
    for _ in range(2):
        parameters = [torch.zeros(1, requires_grad=True)]
        kinds = {"sgd": {"momentum": 0.95}, "adam": {"betas": (0.95, 0.99)}}
        optimizers.append({"sgd": torch.optim.SGD, "adam": torch.optim.Adam}[make](parameters, lr=0.2, **kinds[make]))
    ours, theirs = optimizers
    bases = group_bases(ours)
    scheduler = sched.OneCycleLR(theirs, max_lr=0.2, total_steps=steps, base_momentum=0.85, max_momentum=0.95)
    one = Schedule(kind="one_cycle", rise=rise, final=1 / 25e4, momentum_low=0.85 / 0.95, warmup=warmup)
    for k in range(steps):
        set_factors(ours, bases, one.factors(warmup + (1 - warmup) * k / (steps - 1)))
        mine, other = ours.param_groups[0], theirs.param_groups[0]
        assert mine["lr"] == pytest.approx(other["lr"], abs=1e-9)
        key = {"sgd": "momentum", "adam": "betas"}[make]
        assert mine[key] == pytest.approx(other[key], abs=1e-9)
        theirs.step()
        if k + 1 < steps:
            scheduler.step()


def test_one_cycle_rises_from_a_warmup_without_a_jump():
    """The warm-up ends where the cycle begins, at 1 / div, with the momentum at its largest."""
    warm = Schedule(kind="one_cycle", warmup=0.25, div=10.0)
    assert [warm.factors(p).lr for p in (0, 0.125, 0.25)] == pytest.approx([0, 0.05, 0.1])
    assert all(warm.factors(p).momentum == 1 for p in (0, 0.125, 0.25))
    assert warm.factors(0.25 + 0.75 * 0.3).momentum == pytest.approx(0.895)


def test_a_search_still_branches_from_wsd_and_scales_the_others():
    for kind, trains in (("wsd", 2), ("one_cycle", 1)):
        recipe = at_rung(Recipe((step("schedule", kind=kind), step("train", epochs=8))), (2.0, 4.0), 0)
        assert sum(s.is_train for s in recipe.steps) == trains
        assert [s.fields["kind"] for s in recipe.steps if s.method == "schedule"] == (
            ["constant", "linear"] if kind == "wsd" else [kind]
        )
    assert {"wsd", "one_cycle"} <= set(Schedule.search["kind"])


@pytest.mark.parametrize("kind", ["step", "exponential", "polynomial", "cosine", "linear", "wsd", "constant"])
def test_with_warmup(kind):
    """A line from 0 to 1 over the warm-up, then the plain schedule, squeezed into what is left; it never rises again."""
    plain, warm = Schedule(kind=kind), Schedule(kind=kind, warmup=0.25)
    assert [warm.factors(p).lr for p in (0, 0.125, 0.2)] == [0, 0.5, 0.8]
    for t in GRID:
        assert warm.factors(0.25 + 0.75 * t).lr == pytest.approx(plain.factors(t).lr, abs=1e-6) or kind == "step"
    after = [warm.factors(p).lr for p in GRID if p >= 0.25]
    assert all(a >= b for a, b in pairwise(after)) and after[0] == 1


def test_wsd():
    """1 until the decay begins, then a line to `final`; with decay = 1 it is the linear schedule."""
    wsd = Schedule(kind="wsd", decay=0.2, final=0.1)
    assert [wsd.factors(p).lr for p in (0.0, 0.5, 0.8)] == [1, 1, 1]
    assert wsd.factors(0.9).lr == pytest.approx(0.55) and wsd.factors(1.0).lr == pytest.approx(0.1)
    for p in GRID:
        assert Schedule(kind="wsd", decay=1.0).factors(p).lr == pytest.approx(Schedule(kind="linear").factors(p).lr)


def test_a_branch_equals_the_whole():
    """WSD is a constant prefix and a linear branch: the factors of `constant`, then `linear`, are those of `wsd`."""
    whole = Schedule(kind="wsd", decay=0.25)
    for p in GRID:
        part = Schedule(kind="constant").factors(p) if p < 0.75 else Schedule(kind="linear").factors((p - 0.75) / 0.25)
        assert whole.factors(p).lr == pytest.approx(part.lr)


def test_ends():
    assert Schedule(kind="linear").factors(1.0).lr == 0
    assert Schedule(kind="cosine").factors(1.0).lr == pytest.approx(0, abs=1e-12)
    assert Schedule(kind="exponential", gamma=0.01).factors(0.5).lr == pytest.approx(0.1)
    assert Schedule(kind="step", milestones=(0.3,), gamma=0.5).factors(math.nextafter(0.3, 0)).lr == 1


def test_joins_what_is_there():
    """Two schedules stay two, and the loop multiplies them."""
    once = Schedule(kind="linear")(Setup.of(tiny_mlp()))
    twice = Schedule(kind="cosine")(once)
    assert len(twice.training.schedules) == 2 and twice.training.schedules[:1] == once.training.schedules


@pytest.mark.parametrize(
    "fields",
    [
        {"warmup": 1.0},
        {"gamma": 0.0},
        {"milestones": [0.5, 0.2]},
        {"milestones": [1.5]},
        {"decay": 0},
        {"final": 2.0},
        {"kind": "poly"},
        {"power": 0.0},
        {"rise": 1.0},
        {"div": 0.5},
        {"momentum_low": 0.0},
    ],
)
def test_bad_values(fields):
    with pytest.raises(BadInput, match=next(iter(fields))):
        Schedule.parse(fields)
