"""What a worker finds: the profile, the training cost, and compression that does not compress."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from quadriga.core.errors import NotApplicable
from quadriga.core.recipe import Recipe, step
from quadriga.core.slots import QuantSpec, RuntimeSpec
from quadriga.core.trial import Status
from quadriga.engine import timing
from quadriga.engine.base import Resources
from quadriga.engine.store import Store
from quadriga.engine.tasks import Desk
from quadriga.engine.timing import in_turn
from quadriga.measure.flops import flops
from quadriga.measure.machine import facts
from quadriga.measure.timings import Timings
from quadriga.search.space import Space
from quadriga.stages.conclude import Conclusion, Finalist
from quadriga.stages.profile import order_profile, profile_of
from quadriga.stages.records import _memory, _over
from quadriga.stages.state import Options, Study
from quadriga.testing.setups import fake_time
from quadriga.testing.workloads import tiny_mlp

torch.set_num_threads(1)


def desk(folder: Path) -> Desk:
    return Desk(tiny_mlp(), folder, 0)


def test_a_profile_accounts_for_the_whole_model_at_each_batch(tmp_path):
    workload = tiny_mlp()
    found = desk(tmp_path).do("profile", {"batches": (1, 16)})
    model, given = workload.build(0), found["info"]["profile"]
    assert found["status"] == Status.COMPLETE and given["threads"] == 1 and given["ceilings"]["flops"] > 1e6
    for row, batch in zip(given["batches"], (1, 16), strict=True):
        assert row["batch"] == batch and sum(r["share"] for r in row["layers"]) == pytest.approx(1)
        assert sum(r["flops"] for r in row["layers"]) == flops(model, workload.inputs(batch), batch=None)
        assert sum(r["parameters"] for r in row["layers"]) == sum(p.numel() for p in model.parameters())
        assert found["values"][f"latency/{batch}"] == row["seconds"] > 0


def test_training_and_realising_cost_the_same_and_three_forward_passes_a_sample(tmp_path):
    recipe = Recipe((step("train", epochs=2),))
    args = {"recipe": recipe.plain(), "hash": recipe.hash, "batches": (1, 16), "name": "x", "baseline_bytes": 1}
    trained, realized = (desk(tmp_path).do(task, args) for task in ("train", "realize"))
    workload = tiny_mlp()
    forward = flops(workload.build(0), workload.inputs(1))
    assert trained["values"]["train_flops"] == 3 * 2 * len(workload.train) * forward
    for key in ("samples", "seconds", "train_flops", "bytes", "parameters"):
        assert trained["values"][key] == realized["values"][key]
    assert [row["kind"] for row in realized["info"]["fakes"]] == ["bytes"]  # more than the one byte that was claimed


class Inline:
    """Does an order when it is asked for, and counts."""

    def __init__(self, folder):
        self.desk, self.orders, self.done = desk(folder), [], 0

    def resources(self):
        return Resources(1, facts())

    def submit(self, order):
        self.orders.append(order)

    def wait(self, timeout):
        order, self.done = self.orders.pop(0), self.done + 1
        return order.number, self.desk.do(order.task, order.args)


def test_a_resumed_study_is_not_profiled_again(tmp_path):
    engine, options = Inline(tmp_path), Options(floor="-1pt")
    found = []
    for _ in range(2):
        with Store(tmp_path) as store:
            space = Space({}, frozenset(), Recipe(), frozenset())
            study = Study(tiny_mlp(), options, tmp_path, store, engine, space, lambda event: None)
            order_profile(study)
            study.collect_all(0.0)
            found.append(profile_of(study))
    assert engine.done == 1 and found[0]["batches"][0]["batch"] == found[1]["batches"][0]["batch"] == 1


@pytest.mark.parametrize(("mine", "base", "ratio"), [(1.0, 2.0, 0.5), (0.0, 0.0, 0.0), (1.0, 0.0, None), (None, 2.0, None)])
def test_a_ratio_to_nothing_is_unknown(mine, base, ratio):
    assert _over(mine, base) == ratio


def test_memory_is_what_the_arm_grew_by():
    timings = Timings.empty([1], ["eager", "final-0"], 1)
    timings.add("eager", {}, {"peak": 500, "growth": 100})
    timings.add("eager", {}, {"peak": 450, "growth": 120})
    finalist = Finalist(Recipe(), None, "work/built/x")
    conclusion = Conclusion([finalist], finalist, timings, {})
    assert _memory(conclusion, "eager") == 120 and _memory(conclusion, "final-0") is None and _memory(None, "eager") is None


@pytest.mark.parametrize(("unit", "calls", "busy"), [(0.02, 2, (61, 90)), (1.0, 1, (13, 16))], ids=["quick", "slow"])
def test_arms_are_timed_in_turn_in_an_order_that_turns_round(unit, calls, busy):
    """On a clock that the calls move: each arm's own seconds, whatever a whole round is slowed down by.

    Of calls as slow as a large network's one is a block: a round of several took a probe beyond its limit.
    """
    now, order, slow = [0.0], [], [1.0]

    def arm(name, seconds):
        def go():
            order.append(name)
            slow[0] = 3.0 if busy[0] <= len(order) < busy[1] else 1.0
            now[0] += seconds * unit * slow[0]

        return go

    found = in_turn([arm(n, s) for n, s in zip("abc", (0.5, 1.0, 2.0), strict=True)], rounds=9, rest=0, clock=lambda: now[0])
    assert [x / found[1] for x in found] == pytest.approx([0.5, 1.0, 2.0]) and found[1] == pytest.approx(unit)
    blocks = [name for k, name in enumerate(order) if not k or order[k - 1] != name]
    text = "".join(blocks)
    assert text.startswith("abc") and "abcba" in text[3:] and all(9 * calls <= order.count(n) - 2 for n in "abc")
    assert calls > 1 or len(order) == 3 * (2 + 9)


def test_the_time_service_realises_arms_leaves_no_scrap_and_puts_settings_back(tmp_path, monkeypatch):
    """Whole networks and layers alone, eager and built; a layer's own inputs calibrate it."""
    monkeypatch.setattr(timing, "CAREFUL", 2)
    place, workload = desk(tmp_path), tiny_mlp()
    model, layer = workload.build(0).train(), nn.Linear(40, 200)
    threads = torch.get_num_threads()
    arms = [(model, workload.inputs(1)), (layer, torch.randn(1, 7, 40)), (layer, torch.randn(64, 40))]
    for spec in (RuntimeSpec(threads=1), RuntimeSpec("onnxruntime", threads=1, quant=QuantSpec())):
        if spec.quant:
            pytest.importorskip("onnxruntime")
        found = place._time(arms, spec)
        assert len(found) == 3 and all(0 < seconds < 1 for seconds in found)
    assert model.training and torch.get_num_threads() == threads and not list((tmp_path / "work/built").iterdir())
    with pytest.raises(NotApplicable):
        place._time([(nn.ReLU(), torch.randn(2, 3))], RuntimeSpec("onnxruntime", quant=QuantSpec()))
    assert not list((tmp_path / "work/built").iterdir())


def test_a_probe_a_training_and_a_pace_see_the_same_decision(tmp_path):
    """Measured by the cost probe; the other tasks and another desk only read it."""
    recipe = Recipe((step("to_latency", target=0.5), step("train", epochs=1)))
    args = {"recipe": recipe.plain(), "hash": recipe.hash, "batches": (1,), "name": "x"}
    calls, found = [], []
    for task in ("cost", "train", "realize", "pace", "build"):
        place = desk(tmp_path)
        place._time = lambda arms, spec: calls.append(spec) or fake_time(arms, spec)
        done = place.do(task, args)
        assert done["status"] == Status.COMPLETE, done
        found.append((len(calls), done["values"].get("parameters")))
    assert calls and {count for count, _ in found} == {len(calls)} and len({size for _, size in found[:3]}) == 1
    assert len(list((tmp_path / "decisions").glob("*.json"))) == 1
