"""Schedules against closed forms, and torch's own schedulers where there is one."""

import math
from itertools import pairwise

import pytest
import torch

from quadriga.core.errors import BadInput
from quadriga.core.setup import Setup
from quadriga.methods.training.schedule import Schedule
from quadriga.testing import tiny_mlp

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
    "constant": lambda o: sched.ConstantLR(o, 1.0),
}


@pytest.mark.parametrize("kind", TORCH)
def test_equals_torch(kind):
    ours = [Schedule(kind=kind, final=0.25).factors(p).lr for p in GRID]
    assert ours == pytest.approx(torch_factors(TORCH[kind]), abs=1e-9)


@pytest.mark.parametrize("kind", ["step", "exponential", "cosine", "linear", "wsd", "constant"])
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
    ],
)
def test_bad_values(fields):
    with pytest.raises(BadInput, match=next(iter(fields))):
        Schedule.parse(fields)
