"""Granules: found on made-up staircases, measured once, kept for every rebuild; and widths that are whole granules."""

from __future__ import annotations

import json
import random
import threading
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from quadriga import methods
from quadriga.core.axes import AxisGraph
from quadriga.core.errors import BadInput, NotApplicable
from quadriga.core.granules import HALVES, LADDER, LEASTS, SIDES, WIDTHS, default, found, least
from quadriga.core.recipe import Recipe, step
from quadriga.core.setup import Setup
from quadriga.core.slots import QuantSpec, RuntimeSpec
from quadriga.core.workload import Workload
from quadriga.engine import staircases as module
from quadriga.engine.decisions import settled
from quadriga.engine.granules import GIVEN, Granules, precision
from quadriga.engine.staircases import branch, staircases
from quadriga.engine.walk import walk
from quadriga.methods.structure._granules import Grain, granules, of_groups
from quadriga.methods.structure._scores import nonzero, widths
from quadriga.methods.structure.to_latency import ToLatency
from quadriga.runtime._branches import calls
from quadriga.testing import fingerprint
from quadriga.train.loop import fit

torch.set_num_threads(1)
ORT = RuntimeSpec("onnxruntime")


def up(width, granule):
    return -(-width // granule) * granule


def stairs(granule, overhead=5.0, noise=0.0, seed=0):
    draw = random.Random(seed)
    return {w: (overhead + up(w, granule)) * draw.gauss(1, noise) for w in WIDTHS}


@pytest.fixture
def measured(monkeypatch):
    """The services measure, as they do outside of tests."""
    monkeypatch.delenv(GIVEN, raising=False)


# -- what a staircase says


@pytest.mark.parametrize("granule", [8, 16, 32])
@pytest.mark.parametrize("overhead", [0.0, 10.0])
def test_the_step_of_a_staircase_is_found(granule, overhead):
    assert found(stairs(granule, overhead)) == granule


def test_without_steps_or_with_steps_that_cost_little_it_is_one():
    assert found(stairs(1)) == found(stairs(2)) == found(stairs(4)) == 1
    assert found(stairs(16, overhead=5000.0)) == 1
    assert found(dict.fromkeys(WIDTHS, 1.0)) == 1


@pytest.mark.parametrize("granule", [1, 8, 16, 32])
def test_noise_of_two_percent_seldom_matters(granule):
    """And where it does, a step of 8 is taken for one of 4, which costs 7 % at most."""
    right = [found(stairs(granule, noise=0.02, seed=seed)) == granule for seed in range(100)]
    assert sum(right) >= 80


def test_one_width_that_was_disturbed_changes_nothing():
    for w in (33, 36, 40, 49, 52, 56, 65, 68, 72):
        times = stairs(8)
        times[w] *= 3
        assert found(times) == 8


def test_a_runtime_that_is_slow_beside_its_blocks_and_pads_within_them():
    """As ONNX Runtime: off the multiples of 4 a kernel three times as slow; else blocks of 16. Wider is not always slower."""
    times = {w: 3.0 * w if w % 4 else 5.0 + up(w, 16) for w in WIDTHS}
    assert found(times) == 16 and times[33] > times[48]
    assert found({w: 3.0 * w if w % 4 else 5.0 + w for w in WIDTHS}) == 4


def test_the_least_width_is_the_last_half_that_pays():
    direct = {4: 0.23, 8: 0.35, 16: 0.43, 32: 1.0}  # ONNX Runtime, dense, float32: below a block without blocks
    assert least(direct) == 4
    assert least({4: 0.69, 8: 0.87, 16: 0.64, 32: 1.0}) == 16  # the same, pointwise: half a block is slower than one
    assert least(dict.fromkeys(HALVES, 1.0)) == 32


def test_defaults_are_those_of_the_device():
    gpu = {"name": "inductor", "device": "cuda"}
    assert (
        default("dense_in", RuntimeSpec(**gpu, weights="bf16"))
        == default("linear_out", RuntimeSpec(**gpu, weights="fp16"))
        == 8
    )
    assert default("linear_in", RuntimeSpec(**gpu, quant=QuantSpec(activations="dynamic"))) == 16
    assert default("linear_in", RuntimeSpec(**gpu)) == default("linear_in", ORT) == 1 and default("depthwise", ORT) == 8


# -- the service


class Bench:
    """Counts what it is asked to measure; its staircases have one granule."""

    def __init__(self, granule=8):
        self.granule, self.asked = granule, []

    def __call__(self, sides, spec):
        self.asked.append((tuple(sides), spec))
        return {side: stairs(self.granule) for side in sides}


def test_a_side_is_measured_once_and_kept_for_other_processes(measured, tmp_path):
    bench = Bench()
    one = Granules(tmp_path, bench)
    assert one(["dense_out"], ORT) == {"dense_out": 8} == one(["dense_out"], replace(ORT, threads=2, storage="entropy"))
    other = Granules(tmp_path, bench)
    assert other(["dense_out", "linear_in"], ORT) == {"dense_out": 8, "linear_in": 8}
    assert [sides for sides, _ in bench.asked] == [("dense_out",), ("linear_in",)]
    assert all(spec.threads == 1 for _, spec in bench.asked)
    (kept,) = tmp_path.glob("*.json")
    rows = json.loads(kept.read_text())
    assert set(rows["sides"]) == {"dense_out", "linear_in"} and rows["spec"]["name"] == "onnxruntime"
    assert {"processor", "instructions"} == set(rows["machine"]) and len(rows["sides"]["dense_out"]["times"]) == len(WIDTHS)


def test_another_precision_and_another_runtime_are_measured_apart(measured, tmp_path):
    bench = Bench()
    known = Granules(tmp_path, bench)
    for spec in (ORT, replace(ORT, quant=QuantSpec()), RuntimeSpec("openvino"), RuntimeSpec("openvino", weights="bf16")):
        known(["dense_out"], spec)
    known(["dense_out"], replace(ORT, quant=QuantSpec(activations="none")))  # stored in int8, computed in float32
    known(["dense_out"], replace(ORT, quant=QuantSpec(keep_float=("head",))))
    assert len(bench.asked) == 4 and len(list(tmp_path.glob("*.json"))) == 4


def test_a_damaged_file_is_measured_again_and_an_unwritable_folder_costs_no_more(measured, tmp_path):
    bench = Bench()
    Granules(tmp_path, bench)(["dense_out"], ORT)
    (kept,) = tmp_path.glob("*.json")
    kept.write_text('{"sides": {"dense_out": {"granule": "8"}}}')
    assert Granules(tmp_path, bench)(["dense_out"], ORT) == {"dense_out": 8} and len(bench.asked) == 2
    file = tmp_path / "file"
    file.write_text("")
    known = Granules(file / "below", bench)
    assert known(["dense_out"], ORT) == known(["dense_out"], ORT) == {"dense_out": 8} and len(bench.asked) == 3


def test_two_workers_do_not_measure_at_once(measured, tmp_path):
    inside, most, begun = [], [], threading.Barrier(2, timeout=10)

    def measure(sides, spec):
        inside.append(1)
        most.append(len(inside))
        threading.Event().wait(0.05)
        inside.pop()
        return {side: stairs(16) for side in sides}

    def work():
        begun.wait()
        answers.append(Granules(tmp_path, measure)(["dense_out"], ORT))

    answers = []
    workers = [threading.Thread(target=work) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert answers == [{"dense_out": 16}] * 2 and most == [1]


def test_what_cannot_be_measured_has_its_default(measured, tmp_path):
    def fails(sides, spec):
        if "grouped_in" in sides:
            raise RuntimeError("no such layer")
        return {side: stairs(16) for side in sides}

    known = Granules(tmp_path, fails)
    assert known(["dense_out", "grouped_in"], ORT) == {"dense_out": 16, "grouped_in": 8}
    assert "grouped_in" not in json.loads(next(tmp_path.glob("*.json")).read_text())["sides"]
    gpu = RuntimeSpec("inductor", device="cuda", weights="bf16")
    assert Granules(tmp_path, fails)(["grouped_in"], gpu) == {"grouped_in": 8}
    assert Granules(tmp_path, fails)(["linear_in"], RuntimeSpec("another")) == {"linear_in": 1}


def test_a_number_may_be_given_for_all(monkeypatch, tmp_path):
    bench = Bench()
    monkeypatch.setenv(GIVEN, "4")
    assert Granules(tmp_path, bench)(["dense_out", "linear_in"], ORT) == {"dense_out": 4, "linear_in": 4} and not bench.asked
    monkeypatch.setenv(GIVEN, "four")
    with pytest.raises(BadInput, match="QUADRIGA_GRANULE is 'four'"):
        Granules(tmp_path, bench)(["dense_out"], ORT)


def test_layers_are_timed_by_the_clock_that_is_given(monkeypatch):
    """Calls that only move a made-up clock: the staircase that moved it, without what every call costs."""
    now, asked = [0.0], []

    def fake(branches, spec, folder):
        def call(cost):
            def one():
                now[0] += cost

            return one

        asked.extend(x.shape for _, x in branches)
        return [call(1e-3 + 1e-5 * (up(x.shape[1], 16) if x.shape[-1] > 1 else 0)) for _, x in branches]

    monkeypatch.setattr(module, "calls", fake)
    monkeypatch.setattr(module, "REST", 0.0)
    times = staircases(["dense_in", "dense_least"], ORT, rounds=1, clock=lambda: now[0])
    assert found(times["dense_in"]) == 16 and set(times["dense_in"]) == set(WIDTHS)
    assert times["dense_in"] == pytest.approx({w: 1e-5 * up(w, 16) for w in WIDTHS})
    assert set(times["dense_least"]) == set(HALVES) and least(times["dense_least"]) == 16
    assert len(asked) == 1 + len(WIDTHS) + len(HALVES)


@pytest.mark.parametrize("name", ["eager", "onnxruntime", "openvino"])
@pytest.mark.parametrize("quant", [None, QuantSpec()])
def test_branches_of_one_file_compute_what_each_layer_computes(name, quant, tmp_path):
    spec = RuntimeSpec(name, threads=1, quant=quant)
    branches = [branch(side, width) for side in (*SIDES, *LEASTS) for width in (5, 16)]
    if name == "eager" and quant:
        with pytest.raises(NotApplicable):
            calls(branches, spec, tmp_path)
        return
    made = calls(branches, spec, tmp_path)
    for (model, x), run in zip(branches, made, strict=True):
        with torch.no_grad():
            expected, found_ = (y[0] if isinstance(y, tuple) else y for y in (model(x[:1]), run()))
        torch.testing.assert_close(
            found_, expected, rtol=0.2 if quant else 1e-3, atol=(0.1 if quant else 1e-4) * float(expected.max())
        )


def test_what_decides_is_the_kernel():
    assert precision(RuntimeSpec("inductor", quant=QuantSpec())).name == "inductor"
    assert precision(replace(ORT, weights="bf16")) == replace(ORT, threads=1)  # stored so, computed in float32
    assert precision(RuntimeSpec("openvino", weights="bf16")).weights == "bf16"
    assert precision(RuntimeSpec(channels_last=True)).channels_last


# -- what a width is made of


class Mixed(nn.Module):
    """A dense, a depthwise, a pointwise and a grouped convolution, and a Linear that reads a map of 2×2."""

    def __init__(self):
        super().__init__()
        self.dense, self.deep = nn.Conv2d(3, 32, 3, padding=1), nn.Conv2d(32, 32, 3, padding=1, groups=32)
        self.point, self.group = nn.Conv2d(32, 48, 1), nn.Conv2d(48, 64, 3, padding=1, groups=2)
        self.norm, self.hidden, self.head = nn.BatchNorm2d(64), nn.Linear(64 * 4, 40), nn.Linear(40, 3)

    def forward(self, x):
        x = self.norm(self.group(self.point(self.deep(self.dense(x)).relu()).relu())).relu()
        return self.head(self.hidden(nn.functional.adaptive_avg_pool2d(x, 2).flatten(1)).relu())


def images(model, **fields):
    torch.manual_seed(0)
    x, y = torch.randn(24, 3, 8, 8), torch.arange(24) % 3
    return Workload(model=model, train=(x, y), val=(x, y), test=(x, y), batch_size=8, **fields)


def setup_of(model, answer, **fields):
    """A setup on a machine whose granules are these: by side, or one for all convolutions."""
    all_ = (*SIDES, *LEASTS)
    table = (
        {s: answer.get(s, 32) for s in all_}
        if isinstance(answer, dict)
        else {s: 1 if s[:6] == "linear" else answer for s in all_}
    )
    return Setup.of(images(model, trained=True), granules=lambda sides, spec: {s: table[s] for s in sides}, **fields)


def test_a_width_takes_the_granule_of_all_that_write_and_read_it():
    table = {s: 1 for s in SIDES} | {"dense_out": 4, "depthwise": 8, "pointwise_in": 2, "grouped_in": 2, "grouped_out": 4}
    setup = setup_of(Mixed(), {**table, "linear_in": 16})
    graph = AxisGraph.trace(setup.model, setup.context.example)
    grain = {name: one.step for name, one in of_groups("auto", graph.model, graph.groups(), setup).items()}
    assert grain["dense"] == 8  # of the depthwise one, which shares it
    assert grain["point"] == 2  # a unit is one channel in each of two groups
    assert grain["group"] == 4  # 16 inputs of the Linear are 4 channels of 2×2
    assert grain["hidden"] == 16
    assert set(of_groups(5, graph.model, graph.groups(), setup).values()) == {Grain(5, 5)}


def test_the_least_width_of_a_group_is_that_of_all_its_layers():
    sixteen = {s: 16 for s in SIDES if not s.startswith("linear")} | {"linear_in": 1, "linear_out": 1}
    for deep, expected in ((4, Grain(16, 4)), (16, Grain(16, 16))):
        setup = setup_of(Mixed(), {**sixteen, "dense_least": 4, "depthwise_least": deep, "pointwise_least": 4})
        graph = AxisGraph.trace(setup.model, setup.context.example)
        assert of_groups("auto", graph.model, graph.groups(), setup)["dense"] == expected
    assert Grain(16, 4).widths(40) == [4, 8, 16, 32, 40]
    assert widths({"a": torch.ones(32)}, 0.9, "layer", {"a": Grain(16, 4)}) == {"a": 4}
    assert widths({"a": torch.ones(32)}, 0.9, "layer", {"a": Grain(16, 16)}) == {"a": 16}


def test_a_recurrent_and_a_packed_width():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.lstm, self.head = nn.Embedding(9, 24), nn.LSTM(24, 32, batch_first=True), nn.Linear(32, 2)

        def forward(self, tokens):
            return self.head(self.lstm(self.embed(tokens))[0][:, -1])

    table = {s: 1 for s in SIDES} | {"recurrent_in": 2, "recurrent_out": 4, "linear_in": 8}
    tokens = torch.randint(9, (24, 5))
    work = Workload(
        model=Net(), train=(tokens, tokens[:, 0] % 2), val=(tokens, tokens[:, 0] % 2), test=(tokens, tokens[:, 0] % 2)
    )
    setup = Setup.of(work, granules=lambda sides, spec: {s: table[s] for s in sides})
    graph = AxisGraph.trace(setup.model, setup.context.example)
    grain = of_groups("auto", graph.model, graph.groups(), setup)
    assert grain["embed"] == Grain(2, 2) and grain["lstm"] == Grain(8, 8)


def test_two_runtimes_of_one_recipe_are_both_suited_and_a_table_or_a_number_asks_nobody():
    alone = replace(RuntimeSpec("openvino"), alone=ORT)
    setup = setup_of(Mixed(), 1)
    service = lambda sides, spec: dict.fromkeys(sides, 4 if spec.name == "openvino" else 16)  # noqa: E731
    context = replace(setup.context, granules=service, runtime=alone)
    assert granules("auto", ["dense_out"], replace(setup, context=context)) == {"dense_out": Grain(16, 16)}
    silent = replace(setup, context=replace(setup.context, granules=None))
    assert granules({"dense_out": 4}, ["dense_out", "dense_in"], silent) == {"dense_out": Grain(4, 4), "dense_in": Grain()}
    assert granules(3, ["linear_in"], silent) == {"linear_in": Grain(3, 3)} and granules("auto", [], silent) == {}


@pytest.mark.parametrize("bad", [0, {"dense_out": 0}, {"dense": 8}, True])
def test_a_bad_granule_is_bad_input(bad):
    for name in ("prune_channels", "prune_hidden", "to_latency", "low_rank", "tucker", "grouped", "widen"):
        with pytest.raises(BadInput, match=f"{name}.round_to"):
            methods.build(step(name, round_to=bad))


# -- whole granules go


@given(
    st.lists(st.tuples(st.integers(1, 70), st.sampled_from(LADDER)), min_size=1, max_size=5),
    st.floats(0.05, 0.95), st.sampled_from(["layer", "global"]), st.integers(0, 99),
)  # fmt: skip
def test_what_stays_is_whole_and_the_budget_is_met(sizes, ratio, scope, seed):
    draw = torch.Generator().manual_seed(seed)
    scores = {n: torch.rand(size, generator=draw) for n, (size, _) in enumerate(sizes)}
    grain = {n: Grain(g, g) for n, (_, g) in enumerate(sizes)}
    kept = widths(scores, ratio, scope, grain)
    for n, (size, g) in enumerate(sizes):
        assert kept[n] == size or (kept[n] % g == 0 and kept[n] >= g), "a part of a granule went"
        assert kept[n] >= min(size, g)
    if max(g for _, g in sizes) > 1:
        more = widths(scores, min(0.99, ratio + 0.05), scope, grain)
        assert all(more[n] <= kept[n] for n in kept), "with a larger ratio something came back"
        gone, asked = sum(len(s) - kept[n] for n, s in scores.items()), ratio * sum(map(len, scores.values()))
        assert gone <= asked + max(max(g, size % g) for size, g in sizes) / 2


def test_the_budget_of_a_layer_scope_is_met_by_choosing_layers():
    """16, 32 and 64 wide by 8 at 0.3: nearest multiples would take half of all 16 and miss the share; here it is met."""
    scores = {f"{n}.{k}": torch.arange(1.0, n + 1) + k for n in (16, 32, 64) for k in range(4)}
    kept = widths(scores, 0.3, "layer", 8)
    gone = sum(len(s) - kept[g] for g, s in scores.items())
    assert abs(gone / (4 * (16 + 32 + 64)) - 0.3) < 0.01
    assert {kept[g] for g in kept if g.startswith("32")} == {24} and len({kept[g] for g in kept if g.startswith("64")}) == 2


def test_the_least_important_granules_go_first():
    strong, weak = torch.full((16,), 2.0), torch.cat([torch.ones(8), torch.full((8,), 3.0)])
    assert widths({"even": strong, "odd": weak}, 0.25, "global", 8) == {"even": 16, "odd": 8}
    assert widths({"even": strong, "odd": weak}, 0.25, "layer", 8) == {"even": 16, "odd": 8}
    assert nonzero({"a": torch.cat([torch.zeros(9), torch.ones(9)])}, 8) == {"a": 16}


def test_widths_are_whole_in_the_network_at_once_and_in_the_course_of_training():
    for scope in ("layer", "global"):
        at_once = methods.build(step("prune_channels", scope=scope))(setup_of(Mixed(), 8)).model
        sizes = [at_once.dense.out_channels, at_once.point.out_channels, at_once.group.out_channels]
        assert all(n % 8 == 0 for n in sizes) and sum(sizes) < 144
        setup = methods.build(step("prune_channels", scope=scope, gradual=0.7))(setup_of(Mixed(), 8))
        work = images(Mixed(), trained=True)
        fit(setup, work.train, epochs=4, seed=0)
        slow = setup.reset_training(work).model
        assert all(m.out_channels % 8 == 0 for m in (slow.dense, slow.point, slow.group))
        assert slow.dense.out_channels + slow.point.out_channels + slow.group.out_channels < 144


def test_what_fades_is_whole_granules_at_every_moment():
    setup = methods.build(step("prune_channels", gradual=1.0))(setup_of(Mixed(), 8))
    hook, seen = setup.training.make_hooks[0](setup.model), []
    for k in range(1, 13):
        hook.after_step(setup.model, k / 12)
        seen.append({name: int(alive.sum()) for name, alive in hook.alive.items()})
    assert all(n % 8 == 0 or n == len(hook.alive[name]) for row in seen for name, n in row.items() if name != "hidden")
    assert all(b[n] <= a[n] for a, b in pairwise(seen) for n in a) and seen[-1] != seen[0]


def test_a_layer_that_is_no_wider_than_a_granule_stays_and_the_refusal_says_so():
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3))
    with pytest.raises(NotApplicable, match=r"8 conv in steps of 16.*round_to = 1"):
        methods.build(step("prune_channels"))(setup_of(net, 16))
    assert methods.build(step("prune_channels", round_to=1))(setup_of(net, 16)).model[0].out_channels == 4


def test_shrink_rounds_shares_and_takes_an_absolute_width_as_it_is():
    assert methods.build(step("shrink", filters=0.67))(setup_of(Mixed(), 8)).model.dense.out_channels == 24
    assert methods.build(step("shrink", width=10, only="dense"))(setup_of(Mixed(), 8)).model.dense.out_channels == 10
    assert methods.build(step("shrink", width=10, only="dense", round_to=8))(setup_of(Mixed(), 1)).model.dense.out_channels == 8


def test_ranks_groups_and_wider_layers_are_whole():
    eight = {s: 8 for s in SIDES}
    for fields in ({"energy": 0.5}, {"ratio": 0.7}):
        after = methods.build(step("low_rank", only="point,hidden", **fields))(setup_of(Mixed(), eight)).model
        assert all(isinstance(m, nn.Sequential) and m[0].weight.shape[0] % 8 == 0 for m in (after.point, after.hidden))
    with pytest.raises(NotApplicable, match=r"needs rank \d+ in steps of 32, break-even is 19"):
        methods.build(step("low_rank", only="point"))(setup_of(Mixed(), {s: 32 for s in SIDES}))
    wide = methods.build(step("widen", factor=1.4))(setup_of(Mixed(), 16)).model
    assert (wide.dense.out_channels, wide.point.out_channels) == (48, 64)

    class Dense(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.head = nn.Conv2d(3, 24, 3), nn.Conv2d(24, 32, 3), nn.Linear(32, 3)

        def forward(self, x):
            return self.head(self.b(self.a(x).relu()).relu().mean((2, 3)))

    with pytest.raises(NotApplicable, match="b would have groups of 12 channels, off the step 8"):
        methods.build(step("grouped"))(setup_of(Dense(), eight))
    assert methods.build(step("grouped"))(setup_of(Dense(), {s: 4 for s in SIDES})).model.b.groups == 2


def test_the_ranks_of_a_tucker_core_are_whole():
    pytest.importorskip("tensorly")
    net = nn.Sequential(
        nn.Conv2d(3, 48, 3), nn.ReLU(), nn.Conv2d(48, 48, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(48, 3)
    )
    after = methods.build(step("tucker", ratio=0.45, only="2"))(setup_of(net, 16)).model
    assert [m.weight.shape[0] for m in after[2]] == [16, 16, 48]


# -- one network, wherever it is rebuilt


def machine(granule):
    return {"granules": lambda sides, spec: dict.fromkeys(sides, granule)}


def net():
    torch.manual_seed(1)
    return Mixed()


RECIPES = {
    "prune_channels": step("prune_channels", ratio=0.5), "prune_hidden": step("prune_hidden", ratio=0.5),
    "shrink": step("shrink", filters=0.6), "low_rank": step("low_rank", ratio=0.8), "widen": step("widen", factor=1.3),
}  # fmt: skip


@pytest.mark.parametrize("name", RECIPES)
def test_a_machine_with_other_granules_rebuilds_the_same_network(name, tmp_path):
    """From the study's decisions; and from the recipe alone, with what was decided written into it."""
    recipe = Recipe((RECIPES[name], step("onnxruntime")))
    work = images(net(), trained=True)
    go = lambda recipe, granule, folder: walk(work, recipe, seed=0, store=None, services=machine(granule), decisions=folder)  # noqa: E731
    here = go(recipe, 8, tmp_path)
    again, elsewhere = go(recipe, 2, tmp_path), go(recipe, 2, None)
    mark = fingerprint(here.setup.model)
    assert fingerprint(again.setup.model) == mark != fingerprint(elsewhere.setup.model)
    written = Recipe.from_toml(settled(recipe, here.decisions).to_toml())
    assert set(written.steps[0].fields["round_to"].values()) == {8}
    assert fingerprint(go(written, 2, None).setup.model) == mark and not go(written, 2, None).decisions


def test_recipes_for_two_runtimes_that_decide_alike_share_their_training(tmp_path):
    work = images(net(), trained=True)

    def go(runtime, granule):
        recipe = Recipe((step("prune_channels"), step("train", epochs=1), step(runtime)))
        return walk(
            work, recipe, seed=0, store=tmp_path, services=machine(granule), decisions=tmp_path / "decisions"
        ).checkpoint

    assert go("onnxruntime", 8) == go("openvino", 8)
    assert go("eager", 4) != go("onnxruntime", 8)


# -- to a latency


class Inverted(nn.Module):
    """Two inverted residuals between a stem and a head, as in a MobileNet."""

    def __init__(self, width=16, wide=96):
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, width, 3, padding=1), nn.Linear(width, 3)
        parts = [
            (nn.Conv2d(width, wide, 1), nn.Conv2d(wide, wide, 3, padding=1, groups=wide), nn.Conv2d(wide, width, 1))
            for _ in "ab"
        ]
        self.blocks = nn.ModuleList(nn.ModuleList(p) for p in parts)

    def forward(self, x):
        x = self.stem(x).relu()
        for expand, deep, project in self.blocks:
            x = x + project(deep(expand(x).relu()).relu())
        return self.head(x.mean((2, 3)))


def slow_beside_blocks(arms, spec):
    """Seconds as in ONNX Runtime, made up: a convolution off the multiples of 4 takes three times as long."""
    seconds = []
    for model, _ in arms:
        total = 1e-6
        for w in (p for p in model.parameters() if p.dim() == 4):
            odd = any(n % 4 for n in w.shape[:2] if n > 3)
            total += 1e-9 * w.shape[2:].numel() * w.shape[0] * w.shape[1] * (3 if odd else 1)
        seconds.append(total)
    return seconds


def test_to_latency_reaches_what_pruning_reaches():
    """Its lowest reachable latency is never above that of prune_channels, at any ratio and scope."""
    make = lambda: setup_of(Inverted(), 8, time=slow_beside_blocks)  # noqa: E731
    whole = slow_beside_blocks([(make().model, None)], None)[0]
    pruned = []
    for ratio in (0.3, 0.5, 0.7, 0.9):
        for scope in ("layer", "global"):
            model = methods.build(step("prune_channels", ratio=ratio, scope=scope))(make()).model
            pruned.append(slow_beside_blocks([(model, None)], None)[0] / whole)
    told = {}
    setup = make()
    keep = replace(setup.context, decide=lambda key, compute: told.setdefault(key, compute()))
    with pytest.raises(NotApplicable, match="nearest reachable"):
        ToLatency(target=0.01)(replace(setup, context=keep))
    lowest = next(row["ratio"] for key, row in told.items() if key.startswith("to_latency"))
    assert lowest <= min(pruned) + 1e-9
    ratio = min(r for r in pruned if r > 0.3)
    after = ToLatency(target=ratio)(make()).model
    assert abs(slow_beside_blocks([(after, None)], None)[0] / whole / ratio - 1) <= 0.1
    assert all(m.out_channels % 8 == 0 for m in after.modules() if isinstance(m, nn.Conv2d))
