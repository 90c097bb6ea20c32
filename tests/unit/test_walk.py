"""A recipe and a seed rebuild the variant; train steps with a common prefix are trained once."""

from __future__ import annotations

import json
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from quadriga.core.errors import BadInput, NotApplicable
from quadriga.core.method import Family, Method, Numerics
from quadriga.core.recipe import Recipe, Step, step
from quadriga.core.slots import RuntimeSpec
from quadriga.core.workload import Workload
from quadriga.engine import walk as walking
from quadriga.engine.decisions import Decisions
from quadriga.engine.walk import prefix_key, walk, workload_key
from quadriga.search.space import at_rung

torch.set_num_threads(1)
G = torch.Generator().manual_seed(0)
X, Y = torch.randn(300, 6, generator=G), torch.randint(3, (300,), generator=G)


def workload(**changes) -> Workload:
    splits = {"train": (X[:200], Y[:200]), "val": (X[200:250], Y[200:250]), "test": (X[250:], Y[250:])}
    return Workload(**{"model": lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)), **splits, **changes})


def weights(walked):
    return torch.cat([p.flatten() for p in walked.setup.model.parameters()])


TEMPLATE = Recipe((step("optimizer", kind="adamw", lr=0.01), step("schedule", kind="wsd", decay=0.5), step("train", epochs=4)))


def test_the_same_recipe_and_seed_give_the_same_bits(tmp_path):
    one, other = (walk(workload(), TEMPLATE, seed=3, store=tmp_path / name) for name in "ab")
    assert torch.equal(weights(one), weights(other))
    assert not torch.equal(weights(one), weights(walk(workload(), TEMPLATE, seed=4, store=tmp_path / "c")))


def test_a_longer_rung_goes_on_from_the_shorter_one_and_ends_as_if_alone(tmp_path):
    rungs = (2.0, 4.0)
    short, long = (at_rung(TEMPLATE, rungs, k) for k in (0, 1))
    walk(workload(), short, seed=0, store=tmp_path / "shared")
    before = {p.name for p in (tmp_path / "shared").iterdir()}
    shared = walk(workload(), long, seed=0, store=tmp_path / "shared")
    assert prefix_key(workload(), long, 2, 0) in before  # the stable start was taken over
    alone = walk(workload(), long, seed=0, store=tmp_path / "alone")
    assert torch.equal(weights(shared), weights(alone)) and shared.samples == alone.samples


def test_a_finished_recipe_is_loaded_not_trained(tmp_path):
    first = walk(workload(), TEMPLATE, seed=0, store=tmp_path)
    seen = []
    again = walk(workload(), TEMPLATE, seed=0, store=tmp_path, progress=seen.append)
    assert torch.equal(weights(first), weights(again)) and again.samples == first.samples
    assert 0 < again.seconds <= first.seconds  # kept with the checkpoint, before that was written


def test_a_cost_probe_takes_trained_weights_where_there_are_finished_ones(tmp_path):
    trained = walk(workload(), TEMPLATE, seed=0, store=tmp_path)
    probe = walk(workload(), Recipe((*TEMPLATE.steps, step("threads"))), seed=0, store=None, ready=tmp_path)
    assert torch.equal(weights(probe), weights(trained)) and probe.samples == 0
    other = walk(workload(), Recipe((step("train", epochs=9),)), seed=0, store=None, ready=tmp_path)
    assert torch.equal(weights(other), torch.cat([p.flatten() for p in workload().build(0).parameters()]))


def test_a_recipe_may_begin_with_the_workloads_own_training(tmp_path):
    one = workload(baseline=Recipe((step("optimizer", kind="adamw", lr=0.01), step("train", epochs=2))))
    begun = Recipe((step("train", baseline=True), step("l2"), step("train", epochs=1)))
    written = Recipe((*one.baseline.steps, *begun.steps[1:]))
    first = walk(one, begun, seed=0, store=tmp_path)
    assert torch.equal(weights(first), weights(walk(one, written, seed=0, store=tmp_path)))
    assert len(list(tmp_path.iterdir())) == 2
    with pytest.raises(BadInput, match="stands alone, in the first step"):
        Recipe.from_plain([{"method": "l2"}, {"method": "train", "baseline": True}])


def test_a_cost_probe_trains_nothing_and_passes_what_needs_training():
    probe = walk(workload(), TEMPLATE, seed=0, store=None)
    assert probe.samples == 0 and "TRAINED" in probe.setup.traits
    assert torch.equal(weights(probe), torch.cat([p.flatten() for p in workload().build(0).parameters()]))


def test_slots_go_back_to_the_workloads_own_after_training_unless_it_continues(tmp_path):
    ended = walk(workload(), TEMPLATE, seed=0, store=tmp_path).setup
    assert not ended.training.schedules and not ended.optimizer.schedules


def test_training_without_data_and_continuing_nothing_are_refused(tmp_path):
    model = nn.Linear(6, 3)
    with pytest.raises(NotApplicable, match="TRAIN_DATA"):
        walk(workload(model=model, train=None, trained=True), TEMPLATE, seed=0, store=tmp_path)
    with pytest.raises(NotApplicable, match="continue"):
        walk(workload(), Recipe((step("train", epochs=1, continue_=True),)), seed=0, store=tmp_path)


def test_the_key_tells_workloads_apart():
    assert workload_key(workload()) == workload_key(workload())
    assert workload_key(workload()) != workload_key(workload(train=(X[:199], Y[:199])))
    assert workload_key(workload()) != workload_key(workload(batch_size=32))


@dataclass(frozen=True, kw_only=True)
class Ask(Method):
    """Narrows the hidden layer to a width that is decided by a service, and notes what it saw.

    Args:
        key: of the decision.

    Source: a test.
    """

    family = Family.STRUCTURE
    numerics = Numerics.CHANGED
    source = "a test"
    key: str = "width"
    seen = []  # noqa: RUF012

    def apply(self, setup):
        width = setup.context.decide(self.key, setup.context.time)
        self.seen.append((setup.context.runtime, width))
        setup.model[0], setup.model[2] = nn.Linear(6, width), nn.Linear(width, 3)
        for p in setup.model.parameters():
            nn.init.constant_(p, 0.1)
        return setup


@pytest.fixture
def ask(monkeypatch):
    known = walking.build
    monkeypatch.setattr(walking, "build", lambda s: Ask(**s.fields) if s.method == "ask" else known(s))
    Ask.seen.clear()

    class Counter:
        def __init__(self, width):
            self.width, self.calls = width, 0

        def __call__(self):
            self.calls += 1
            return self.width

    return Counter


def test_the_context_knows_the_runtime_that_the_recipe_ends_in(ask):
    """Later hardware steps are looked at, what they require is granted, and one that refuses is left out."""
    steps = (step("ask"), step("quantize_int8", activations="weights"), step("onnxruntime"), step("openvino"), step("threads"))
    time = ask(4)
    with pytest.raises(NotApplicable, match="requires TRAINED"):
        walk(workload(), Recipe(steps), seed=0, store=None, services={"time": time})
    spec = Ask.seen[0][0]
    assert (spec.name, spec.threads, spec.quant.activations) == ("onnxruntime", 1, "none")
    end = walk(workload(), Recipe((steps[0], steps[2])), seed=0, store=None, services={"time": time}).setup
    assert end.context.runtime == end.runtime == RuntimeSpec("onnxruntime")
    part = walk(workload(), Recipe((steps[0], steps[2])), seed=0, store=None, services={"time": time}, until=1).setup
    assert part.runtime == RuntimeSpec() and part.context.runtime.name == "onnxruntime"


def test_a_decision_is_made_once_and_belongs_to_prefix_seed_key_and_final_runtime(tmp_path, ask):
    recipe = Recipe((step("ask"), step("train", epochs=1), step("onnxruntime")))
    first, later = ask(4), ask(5)

    def go(recipe, time, seed=0):
        services = {"time": time}
        return (
            walk(workload(), recipe, seed=seed, store=None, services=services, decisions=tmp_path).setup.model[0].out_features
        )

    same = (recipe, recipe.replaced(1, step("train", epochs=2)), Recipe((step("l2"), *recipe.steps)))
    assert go(recipe, first) == 4 and [go(other, later) for other in same] == [4, 4, 4]  # how it is trained does not shape it
    assert (first.calls, later.calls) == (1, 0)
    others = (recipe.without(2), Recipe((step("threads"), *recipe.steps)), recipe.replaced(0, step("ask", key="other")))
    assert [go(other, later) for other in others] == [5, 5, 5] and go(recipe, later, seed=1) == 5
    trained = [Recipe((step("l2"), step("train", epochs=e), *recipe.steps)) for e in (1, 2)]  # another start: trained weights
    assert [go(other, time) for other, time in zip(trained, (ask(6), later), strict=True)] == [6, 6]
    rows = [json.loads(p.read_text()) for p in tmp_path.glob("*.json")]
    assert len(rows) == 6 and all(row["steps"][-1]["method"] == "ask" for row in rows)


def test_without_a_folder_a_decision_holds_for_the_walk(ask):
    recipe, time = Recipe((step("ask"), step("ask"))), ask(4)
    walk(workload(), recipe, seed=0, store=None, services={"time": time})
    assert time.calls == 2  # two steps, two prefixes
    decide, asked = Decisions(None, lambda: [], RuntimeSpec()), []
    assert [decide("a", lambda: asked.append(1) or {"b": (1, 2)}) for _ in range(2)] == [{"b": [1, 2]}] * 2  # as JSON reads it
    assert len(asked) == 1


def test_weights_trained_behind_a_decision_are_kept_by_what_was_decided(tmp_path, ask):
    """The same prefix before two runtimes may have two shapes: neither loads the other's checkpoint; equal ones share."""
    before, train = step("ask"), step("train", epochs=1)

    def go(width, *after):
        services = {"time": ask(width)}
        recipe = Recipe((before, train, *after))
        return walk(workload(), recipe, seed=0, store=tmp_path / "c", services=services, decisions=tmp_path / "d")

    wide, narrow = go(8, step("onnxruntime")), go(4, step("eager"))
    assert wide.checkpoint != narrow.checkpoint
    assert (wide.setup.model[0].out_features, narrow.setup.model[0].out_features) == (8, 4)
    again = go(99, step("onnxruntime"))
    assert again.checkpoint == wide.checkpoint and torch.equal(weights(again), weights(wide))
    assert [row["value"] for row in again.decisions] == [8] and again.decisions[0]["step"] == Step("ask").plain()
