"""The plots' geometry: what is drawn is where the numbers say."""

from __future__ import annotations

import math
import re
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as some

from quadriga.report import plots
from quadriga.report.roofline import BOTTOM, LEFT, RIGHT, TOP, roofline
from quadriga.report.svg import Scale, linear_scale, ratio_scale

RATIOS = some.lists(some.floats(0.01, 500), min_size=1, max_size=8)


def numbers(svg: str, tag: str, kind: str, *keys: str) -> list[tuple[float, ...]]:
    """The attributes `keys` of every element `tag` whose class begins with `kind`."""
    found = re.findall(rf'<{tag} [^>]*class="{kind}[^>]*>|<{tag} class="{kind}[^>]*>', svg)
    return [tuple(float(re.search(rf'\b{k}="([-\d.]+)"', e)[1]) for k in keys) for e in found]


@given(RATIOS)
def test_a_ratio_scale_keeps_order_and_holds_one(values):
    scale = ratio_scale(values, 0, 100)
    spots = [scale(v) for v in sorted({*values, 1.0})]
    assert spots == sorted(spots) and spots[0] >= 0 and spots[-1] <= 100
    assert all(scale.low <= t <= scale.high for t in scale.ticks())


@given(some.lists(some.floats(-1e6, 1e6), min_size=1, max_size=8))
def test_linear_ticks_are_even_and_few(values):
    scale = linear_scale(values, 0, 100)
    ticks = scale.ticks()
    steps = [b - a for a, b in pairwise(ticks)]
    assert len(ticks) <= 8 and all(math.isclose(s, steps[0], rel_tol=1e-6) for s in steps)


def test_a_log_scale_puts_equal_factors_at_equal_distances():
    scale = Scale(1, 16, 0, 400, log=True)
    assert [scale(v) for v in (1, 2, 4, 8, 16)] == pytest.approx([0, 100, 200, 300, 400])


@given(
    some.lists(some.tuples(some.floats(0.2, 8), some.floats(-3, 3)), min_size=1, max_size=6),
    some.floats(0.3, 20),
    some.floats(-3, 3),
)
def test_the_waterfall_ends_where_the_winner_stands(parts, latency, quality):
    """Bars hang end to end, and "acting together" fills exactly what the single steps leave."""
    speeds = [math.log(speed) for speed, _ in parts]
    spans = plots._spans([*speeds, math.log(latency) - sum(speeds)], math.log(latency))
    assert all(math.isclose(a[1], b[0]) for a, b in pairwise(spans[:-1]))
    assert math.isclose(spans[-2][1], spans[-1][1], abs_tol=1e-9) and spans[-1][0] == 0
    bars = [("step", "structure", speed, gain) for speed, gain in parts]
    drawn = plots.waterfall(bars, latency, quality, "pt")
    assert len(numbers(drawn, "rect", "bar", "x")) == 2 * (len(bars) + 2)


def test_every_candidate_is_drawn_inside_and_those_below_the_range_as_triangles(records):
    svg = plots.pareto(records["pareto"], 0.5, "pt")
    discs = re.findall(r'<circle cx="([\d.]+)" cy="([\d.]+)"', svg)
    assert len(discs) + svg.count("h10l-5 8z") == len(records["pareto"]) + 1  # and the baseline
    assert all(76 <= float(x) <= 760 and 0 <= float(y) <= 430 for x, y in discs)


def test_whiskers_hold_their_estimates(records):
    svg = plots.forest([o for o in records["opponents"] if o["latency"]])
    whiskers = [
        (float(a), float(b)) for a, b in re.findall(r'<line x1="([\d.]+)" y1="[\d.]+" x2="([\d.]+)"[^>]*class="whisker', svg)
    ]
    dots = [float(x) for x in re.findall(r'<circle cx="([\d.]+)"', svg)]
    assert len(whiskers) == len(dots) == 6
    assert all(a <= x <= b for (a, b), x in zip(whiskers, dots, strict=True))


def test_phases_follow_one_another(records):
    phases = records["budget"]["phases"]
    bars = [
        tuple(map(float, b)) for b in re.findall(r'<rect x="([\d.]+)" y="[\d.]+" width="([\d.]+)"', plots.budget(phases, 540))
    ]
    assert len(bars) == len(phases)
    assert all(b[0] >= a[0] for a, b in pairwise(bars))
    longest = max(range(len(phases)), key=lambda i: phases[i]["seconds"])
    assert max(range(len(bars)), key=lambda i: bars[i][1]) == longest


LIMITS = {"flops": 1e11, "bytes": 1e10, "products": {"default": 1e11, "fp32": 1e11, "bf16": 1e12, "int8": None}}
LAYERS = some.lists(
    some.builds(
        lambda name, flops, moved, fraction, share: {
            "layer": name, "flops": flops, "bytes": moved, "share": share, "fraction": fraction,
            "seconds": max(flops / 1e11, moved / 1e10) / fraction,
        },
        some.text(max_size=40), some.integers(1, 10**12), some.integers(1, 10**9), some.floats(1e-4, 1.0), some.floats(0, 1),
    ),
    max_size=12,
)  # fmt: skip


@given(LAYERS)
def test_no_layer_stands_above_the_roof_that_it_is_measured_by(layers):
    """A disc's middle lies on or below the lower of the memory slope and the float32 line."""
    svg = roofline(layers, LIMITS)
    ((_, level, right, _),) = numbers(svg, "line", "roof fp32", "x1", "y1", "x2", "y2")
    ((x1, y1, x2, y2),) = numbers(svg, "line", "roof memory", "x1", "y1", "x2", "y2")
    discs = numbers(svg, "circle", "dot", "cx", "cy")
    assert len(discs) == len(layers) and right == RIGHT
    for x, y in discs:
        assert LEFT <= x <= RIGHT and TOP <= y <= BOTTOM and y >= level - 0.1
        assert x > x2 or y >= y1 + (x - x1) / (x2 - x1) * (y2 - y1) - 0.1


@given(LAYERS)
def test_names_in_the_roofline_lie_on_no_other_name(layers):
    rows = [{**row, "layer": f"layer {place}"} for place, row in enumerate(layers)]
    svg = roofline(rows, LIMITS)
    spots = re.findall(r'<text x="([-\d.]+)" y="([-\d.]+)" text-anchor="start" class="tick"><title>[^<]*</title>([^<]*)', svg)
    assert len(spots) <= 8
    for (a, b, one), (c, d, _) in ((s, t) for s in spots for t in spots if s is not t and float(s[0]) <= float(t[0])):
        assert abs(float(b) - float(d)) >= 12.9 or float(c) - float(a) >= 6.4 * len(one) - 0.1


def test_few_decades_have_ticks_between():
    assert Scale(2, 50, 0, 1, log=True).decades() == [3, 10, 30]
    assert Scale(2, 5000, 0, 1, log=True).decades() == [10, 100, 1000]
