"""to_latency: the target is met on an injected clock, the program is optimal, and nothing is measured twice."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from quadriga.core.axes import AxisGraph
from quadriga.core.batch import call, evaluating
from quadriga.core.errors import BadInput, NotApplicable
from quadriga.core.recipe import Recipe, step
from quadriga.core.setup import Setup
from quadriga.core.slots import QuantSpec, RuntimeSpec
from quadriga.core.workload import Workload
from quadriga.engine.walk import walk
from quadriga.methods.structure._latency_pieces import pieces
from quadriga.methods.structure._latency_solve import approach, greedy, solve
from quadriga.methods.structure._latency_table import Meter, Table, candidates, fit, measure, points
from quadriga.methods.structure.to_latency import ToLatency, worth
from quadriga.testing import fingerprint, tiny_cnn, tiny_lstm

torch.set_num_threads(1)


def up(size, block):
    return -(-size // block) * block


class Count(TorchDispatchMode):
    """Adds up a made-up cost: products of sizes rounded up to the kernel's block, numbers written, and a price per call."""

    def __init__(self, block):
        super().__init__()
        self.block, self.cost = block, 0.0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name, b = func.__name__.split(".")[0], self.block
        if name in ("mm", "addmm", "bmm", "baddbmm"):
            x, w = args[-2:]
            self.cost += x.shape[:-1].numel() * up(w.shape[-2], b) * up(w.shape[-1], b)
        elif name == "convolution":
            w = args[1]
            self.cost += out.shape[2:].numel() * len(out) * up(w.shape[0], b) * up(w.shape[1], b) * w.shape[2:].numel()
        elif name in ("mkldnn_rnn_layer", "lstm"):
            self.cost += args[0].shape[0] * (args[1].numel() + args[2].numel())
        first = out[0] if isinstance(out, tuple | list) else out
        self.cost += 0.1 * first.numel()
        return out


class Clock:
    """`Context.time` without time: counted costs, and a fixed overhead for whole networks that no layer alone has."""

    def __init__(self, whole=lambda model: True, overhead=0.0, block=8):
        self.whole, self.overhead, self.block, self.calls = whole, overhead, block, 0

    def one(self, model, inputs):
        with evaluating(model), torch.no_grad(), Count(self.block) as count:
            call(model, inputs)
        return 1e-9 * (count.cost + 50 + (self.overhead if self.whole(model) else 0.0))

    def __call__(self, arms, spec):
        self.calls += 1
        return [self.one(model, inputs) for model, inputs in arms]


class Block(nn.Module):
    """Attention whose code names the width of a head, not their number, and an MLP."""

    def __init__(self, width, head):
        super().__init__()
        self.head = head
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        h = self.norm1(x)
        q, k, v = (f(h).unflatten(-1, (-1, self.head)).transpose(1, 2) for f in (self.q, self.k, self.v))
        x = x + self.out(functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.down(functional.gelu(self.up(self.norm2(x))))


class Gpt(nn.Module):
    """Two blocks and a head tied to the embedding."""

    def __init__(self, vocabulary=20, width=32):
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.blocks = nn.Sequential(*(Block(width, 8) for _ in range(2)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens):
        return self.head(self.norm(self.blocks(self.embed(tokens))))


class Cnn(nn.Module):
    """A stem, a residual block and a depthwise-separable one, with batch norms."""

    def __init__(self, width=24):
        super().__init__()
        norm = nn.BatchNorm2d
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, padding=1), norm(width), nn.ReLU())
        self.a, self.b = nn.Conv2d(width, 32, 3, padding=1), nn.Conv2d(32, width, 3, padding=1)
        self.na, self.nb = norm(32), norm(width)
        self.wide = nn.Sequential(nn.Conv2d(width, 64, 1), norm(64), nn.ReLU())
        self.deep = nn.Sequential(nn.Conv2d(64, 64, 3, padding=1, groups=64), norm(64), nn.ReLU())
        self.thin, self.fc = nn.Conv2d(64, 40, 1), nn.Linear(40, 4)

    def forward(self, x):
        x = self.stem(x)
        x = functional.relu(x + self.nb(self.b(functional.relu(self.na(self.a(x))))))
        return self.fc(self.thin(self.deep(self.wide(x))).mean((2, 3)))


def workload(kind):
    torch.manual_seed(0)
    if kind == "lstm":
        return tiny_lstm(trained=True)
    images, tokens = torch.randn(24, 3, 8, 8), torch.randint(20, (24, 6))
    x, y = (images, torch.arange(24) % 4) if kind == "cnn" else (tokens, tokens)
    net = Cnn() if kind == "cnn" else Gpt()
    return Workload(model=net, train=(x, y), val=(x, y), test=(x, y), batch_size=8, trained=True)


def ready(kind, clock, **fields):
    made = Setup.of(workload(kind))
    types = type(made.model)
    clock.whole = lambda model: isinstance(model, types)
    return replace(made, context=replace(made.context, time=clock, **fields))


OVERHEAD = {"cnn": 5e4, "gpt": 2e4, "lstm": 1e3}


@pytest.mark.parametrize("kind", OVERHEAD)
@pytest.mark.parametrize("target", [0.7, 0.5, 0.35])
def test_the_whole_network_meets_the_target_on_the_injected_clock(kind, target):
    """A staircase of 8 channels and an overhead of the whole that the table cannot know: corrected within 10 %."""
    clock = Clock(overhead=OVERHEAD[kind])
    setup = ready(kind, clock)
    before, told = clock.one(setup.model, setup.context.example), {}
    context = replace(setup.context, decide=lambda key, compute: told.setdefault("found", compute()))
    after = ToLatency(target=target, batch=2)(replace(setup, context=context))
    ratio = clock.one(after.model, setup.context.example) / before
    assert abs(ratio / target - 1) <= 0.1 and told["found"]["ratio"] == pytest.approx(ratio)
    rounds = told["found"]["rounds"]
    assert rounds and all(set(r) == {"budget", "table", "predicted", "measured"} for r in rounds) and len(rounds) <= 8
    if kind == "gpt":
        assert after.model.head.weight is after.model.embed.weight


def test_heads_streams_hidden_and_depthwise_widths_all_take_part():
    for kind, names in (("cnn", {"stem.0", "a", "wide.0", "thin"}), ("gpt", {"embed", "blocks.0.q", "blocks.1.up"})):
        told = {}
        setup = ready(kind, Clock(), decide=lambda key, compute, told=told: told.setdefault("found", compute()))
        ToLatency(target=0.4)(setup)
        assert names <= set(told["found"]["widths"])


def test_what_cannot_be_met_is_refused_with_the_nearest_and_leaves_the_model_alone():
    """Nine tenths are overhead: the smallest network is above the target. Then a step in the latency jumps over it."""
    clock = Clock()
    setup = ready("cnn", clock)
    clock.overhead = 9e9 * clock.one(setup.model, setup.context.example)
    mark = fingerprint(setup.model)
    with pytest.raises(NotApplicable, match=r"smallest network.*nearest reachable is 0\.9\d×"):
        ToLatency(target=0.5)(setup)

    class Jump(Clock):
        def one(self, model, inputs):
            count = sum(p.numel() for p in model.parameters())
            return 1.0 if count > 8000 else 0.1 if self.whole(model) else 1e-6 * count

    with pytest.raises(NotApplicable, match=r"after \d rounds; nearest reachable is (1\.0|0\.1)0×"):
        ToLatency(target=0.5)(ready("cnn", Jump()))
    assert fingerprint(setup.model) == mark


def test_without_a_clock_it_is_refused_and_bad_fields_are_bad_input():
    with pytest.raises(NotApplicable, match="no clock here"):
        ToLatency()(Setup.of(tiny_cnn()))
    for bad in ({"target": 1.0}, {"tolerance": 0.0}, {"batch": 0}, {"steps": 1}, {"round_to": 0}, {"widths": {"a": 0}}):
        with pytest.raises(BadInput, match=f"to_latency.{next(iter(bad))}"):
            ToLatency(**bad)


def test_given_widths_are_cut_and_nothing_is_timed():
    """A layer names its group; kept units are the strongest; a layer that has no such width is refused."""
    setup = Setup.of(tiny_cnn(trained=True))
    with torch.no_grad():
        setup.model.conv2.weight[[1, 4, 6]] *= 9
    strong = setup.model.conv2.weight[[1, 4, 6]].clone()
    after = ToLatency(widths={"conv2": 3, "fc1": 5})(setup).model
    assert torch.equal(after.conv2.weight, strong) and after.fc1.weight.shape == (5, 12)
    for widths, words in (
        ({"conv3": 1}, "conv3 has no width"),
        ({"fc2": 2}, "fc2 has no width"),
        ({"fc1": 99}, "16 units, not 99"),
    ):
        with pytest.raises(NotApplicable, match=words):
            ToLatency(widths=widths)(Setup.of(tiny_cnn(trained=True)))


def test_a_decision_is_kept_and_another_walk_rebuilds_the_same_network(tmp_path):
    """The same folder: no call of the clock, equal weights. Another final runtime: measured anew."""
    recipe = Recipe((step("to_latency", target=0.5, round_to=1), step("onnxruntime")))
    clock, seen = Clock(overhead=100.0, block=1), []

    def time(arms, spec):
        seen.append(spec)
        return clock(arms, spec)

    def go(recipe, **more):
        return walk(tiny_cnn(trained=True), recipe, seed=0, store=None, services={"time": time, **more}, decisions=tmp_path)

    one = go(recipe)
    calls = len(seen)
    other = go(recipe, time=None)
    assert calls > 2 and fingerprint(one.setup.model) == fingerprint(other.setup.model) and one.decisions == other.decisions
    assert {s.name for s in seen} == {"onnxruntime"}
    go(Recipe((recipe.steps[0], step("openvino"))))
    assert seen[-1].name == "openvino" and len(list(tmp_path.glob("*.json"))) == 2
    widths = one.decisions[0]["value"]["widths"]
    given = go(Recipe((step("to_latency", widths=widths),)), time=None)
    assert fingerprint(given.setup.model) == fingerprint(one.setup.model)


def random_table(rng, groups=4, count=4):
    widths = [list(range(1, count + 1)) for _ in range(groups)]
    single = [np.sort(rng.random(count)) for _ in range(groups)]
    pair = {(g, g + 1): rng.random() * np.outer(np.arange(1, count + 1), np.arange(1, count + 1)) for g in range(groups - 1)}
    return Table(widths, single, pair, 0.3)


def test_the_program_finds_what_brute_force_finds_and_greedy_does_not_beat_it():
    rng = np.random.default_rng(0)
    better = 0
    for _ in range(12):
        table = random_table(rng)
        values = [np.sort(-rng.random(4)) for _ in range(4)]
        budget = rng.uniform(table.cost((0,) * 4), table.cost((3,) * 4))

        def value(choice, values=values):
            return sum(v[i] for v, i in zip(values, choice, strict=True))

        fits = [c for c in itertools.product(range(4), repeat=4) if table.cost(c) <= budget + 1e-9]
        choice, how = solve(values, table, budget)
        assert how == "milp" and table.cost(choice) <= budget + 1e-6
        assert value(choice) == pytest.approx(max(map(value, fits)), rel=2e-3)
        rough = greedy(values, table, budget)
        assert table.cost(rough) <= budget + 1e-9 and value(rough) <= value(choice) + 2e-3
        better += value(choice) > value(rough) + 1e-3
    assert better >= 3


def test_a_budget_below_everything_gives_the_smallest_and_says_how():
    table = random_table(np.random.default_rng(1))
    choice, how = solve([np.arange(4.0)] * 4, table, 0.0)
    assert choice == (0, 0, 0, 0) and how.startswith("greedy: ")


@pytest.mark.parametrize("block", [1, 8, 16])
def test_the_fit_finds_the_staircase(block):
    """From the measured points alone, the cost of every width of two groups within 3 %."""
    widths = [candidates(64, 8), candidates(96, 8)]

    def cost(kept):
        return 0.2 + up(kept[0], block) * up(kept[1], block) / 6144

    mine = points(widths)
    law = fit(mine, [cost(k) for k in mine], [(64, 1), (96, 1)])
    wrong = [abs(law(k) / cost(k) - 1) for k in itertools.product(*widths)]
    assert len(mine) <= 8 and np.quantile(wrong, 0.9) < 0.03 and max(wrong) < 0.35


@pytest.mark.parametrize("kind", ["cnn", "gpt"])
def test_pieces_alone_cost_what_they_cost_in_the_whole(kind):
    """With a clock that adds up operators, the table predicts whole networks at any widths, overhead apart."""
    clock = Clock(block=1)
    setup = ready(kind, clock)
    graph = AxisGraph.trace(setup.model, setup.context.example)
    groups = [g for g in graph.groups() if not g.fixed]
    widths = [candidates(g.size, 8) for g in groups]
    meter = Meter(clock, RuntimeSpec(), setup.model, setup.context.example, 2)
    table = measure(pieces(graph, groups), widths, meter)
    rng = np.random.default_rng(0)
    for _ in range(5):
        choice = [int(rng.integers(len(w) // 3, len(w))) for w in widths]
        kept = {g: torch.arange(w[i]) for g, w, i in zip(groups, widths, choice, strict=True) if w[i] < g.size}
        patch = graph.cut_all(kept)
        real = clock.one(setup.model, setup.context.example)
        patch.undo()
        assert table.cost(choice) == pytest.approx(real / clock.one(setup.model, setup.context.example), abs=0.04)
    same = Counter(p.key for p in pieces(graph, groups))
    if kind == "gpt":
        assert max(same.values()) >= 4  # two blocks, and q, k and v of each, are one geometry


def test_quantized_layers_are_timed_quantized_and_what_compiles_slowly_is_not_compiled():
    setup = ready("gpt", Clock())
    graph = AxisGraph.trace(setup.model, setup.context.example)
    found = pieces(graph, [g for g in graph.groups() if not g.fixed], keep_float=("blocks.0",))
    asked = []

    def time(arms, spec):
        asked.append((spec, len(arms)))
        return [1.0] * len(arms)

    for quant, name in (
        (QuantSpec(keep_float=("blocks.0",)), "openvino"),
        (QuantSpec(activations="none"), "openvino"),
        (None, "inductor"),
    ):
        asked.clear()
        meter = Meter(time, RuntimeSpec(name, quant=quant), setup.model, setup.context.example, 2)
        meter.shares([(p, dict(enumerate(p.shapes.full))) for p in found])
        specs = {(spec.name, spec.quant is not None) for spec, _ in asked}
        expected = {("openvino", True), ("openvino", False)} if quant and quant.activations == "static" else {(name, False)}
        assert specs == (expected if name != "inductor" else {("eager", False)})
    linear = {p.name for p in found if p.quantized}
    assert "blocks.1.up" in linear and "head" in linear and not any(n.startswith("blocks.0") for n in linear)


def test_a_piece_that_no_runtime_takes_is_overhead():
    """One arm alone is refused; the others are measured all the same."""
    setup = ready("cnn", Clock())
    graph = AxisGraph.trace(setup.model, setup.context.example)
    found = pieces(graph, [g for g in graph.groups() if not g.fixed])

    def time(arms, spec):
        if any(not isinstance(m, Cnn) and x[0].shape[1] == 3 for m, x in arms):
            raise NotApplicable("no images here")
        return [2.0 if isinstance(m, Cnn) else 1.0 for m, _ in arms]

    full = dict(enumerate(found[0].shapes.full))
    shares = Meter(time, RuntimeSpec(), setup.model, setup.context.example, 2).shares([(p, full) for p in found])
    assert math.isnan(shares[0]) and shares[1:] == [0.5] * (len(found) - 1)


@pytest.mark.parametrize("target", [0.2, 0.5, 0.9])
@pytest.mark.parametrize("power", [0.5, 1.0, 2.0])
def test_the_correction_finds_the_target_on_any_rising_curve(target, power):
    """A table that is wrong by a power, and overhead: at most six measurements."""
    line = np.linspace(0.01, 1, 400)

    def real(c):
        return 0.02 + 0.98 * line[c[0]] ** power

    known = [(float(line[k]), real((k,)), (k,)) for k in (0, 399)]
    log = approach(
        target,
        0.1,
        known,
        lambda b: (int(np.searchsorted(line, b, side="right").clip(1, 400)) - 1,),
        lambda c: float(line[c[0]]),
        real,
    )
    assert abs(log[-1].measured / target - 1) <= 0.05 and len(log) <= 6


def test_worth_is_layers_times_the_log_of_the_kept_share():
    scores = torch.tensor([1.0, 4.0, 3.0])
    assert worth(scores, [1, 2, 3], 2).tolist() == pytest.approx([2 * math.log(0.5), 2 * math.log(7 / 8), 0.0])
    assert worth(torch.zeros(4), [1, 4], 1).tolist() == pytest.approx([math.log(0.25), 0.0])
