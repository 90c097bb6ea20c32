"""The search's plain parts: legality, edits, training lengths, allocation, proposals, the front."""

from __future__ import annotations

import math
import random

import pytest

from quadriga.core.recipe import Recipe, step
from quadriga.search.allocate import Allocator, Bar, Candidate, Score
from quadriga.search.pareto import front
from quadriga.search.propose import Proposer
from quadriga.search.space import Space, at_rung, trained_epochs


def card(family: str, requires=(), adds=(), removes=(), writes=(), shapes=True, search=None, fields=None):
    return {
        "family": family,
        "numerics": "changed",
        "requires": list(requires),
        "adds": list(adds),
        "removes": list(removes),
        "writes": list(writes),
        "shapes": shapes,
        "trains": False,
        "control": {},
        "search": search or {},
        "fields": fields or {},
    }


CARDS = {
    "shrink": card("structure", search={"filters": (0.5, 0.75, 1.0)}, fields={"filters": 1.0}),
    "distil": card("structure", requires=("TEACHER",), writes=("training",), shapes=False),
    "fade": card("structure", writes=("training",)),
    "optimizer": card("optimizer", search={"lr": (0.001, 0.003, 0.01)}, fields={"lr": 0.001}),
    "schedule": card("training", search={"kind": ("wsd", "cosine")}, fields={"kind": "wsd"}),
    "quantize": card("hardware", requires=("TRAINED", "FLOAT_WEIGHTS"), removes=("FLOAT_WEIGHTS",)),
    "onnx": card("hardware"),
}
BASELINE = Recipe((step("optimizer", lr=0.1), step("train", epochs=5)))
ALL = frozenset(("structure", "training", "optimizer", "hardware"))


def space(traits=("TRAIN_DATA", "FLOAT_WEIGHTS"), families=ALL) -> Space:
    return Space(CARDS, frozenset(traits), BASELINE, families)


def test_legality_follows_from_facts():
    train, quantize = step("train", epochs=1), step("quantize")
    assert space().illegal(Recipe((train, quantize))) is None
    assert "TRAINED" in (space().illegal(Recipe((quantize,))) or "")
    assert "FLOAT_WEIGHTS" in (space().illegal(Recipe((train, quantize, quantize))) or "")
    assert "TRAIN_DATA" in (space(("TRAINED",)).illegal(Recipe((train,))) or "")
    assert "not searched" in (space(families=frozenset(["hardware"])).illegal(Recipe((step("shrink"),))) or "")


def test_a_recipe_that_starts_from_a_trained_model_gets_the_baselines_training():
    assert space().complete(Recipe((step("quantize"),))).steps == (*BASELINE.steps, step("quantize"))
    own = Recipe((step("shrink"), step("train", epochs=1)))
    assert space().complete(own) == own
    assert space(("TRAINED",)).complete(Recipe((step("quantize"),))).steps == (step("quantize"),)


def test_steps_that_can_never_apply_are_left_out():
    recipe = Recipe((step("distil"), step("quantize"), step("train", epochs=1)))
    assert space().lacking(recipe) == {0: "TEACHER"}
    assert [s.method for s in space().adapt(recipe).steps] == ["quantize", "train"]
    assert space(("TEACHER", "FLOAT_WEIGHTS")).adapt(recipe) == recipe


def test_recipes_go_without_hardware_where_it_is_not_searched():
    recipe = Recipe((step("shrink"), step("train", epochs=1), step("quantize"), step("onnx")))
    searched = space(families=frozenset(("structure", "training")))
    assert searched.adapt(recipe).steps == recipe.steps[:2] and searched.illegal(searched.adapt(recipe)) is None
    assert space().adapt(recipe) == recipe


def test_what_needed_a_step_that_went_goes_too():
    cards = {**CARDS, "device": card("hardware", adds=("DEVICE",)), "graphs": card("hardware", requires=("DEVICE",))}
    whole = Recipe((step("device"), step("graphs"), step("shrink"), step("onnx")))
    it = Space(cards, frozenset(("FLOAT_WEIGHTS",)), BASELINE, ALL)
    assert it.mended(whole) == whole and it.lacking(whole) == {}
    assert it.mended(whole.without(0)) == Recipe((step("shrink"), step("onnx")))
    assert it.mended(Recipe((step("shrink"), step("train", epochs=1)))) is None, "there is nothing to train on"


def test_cost_probes_are_shared_by_recipes_that_differ_in_training_only():
    one = Recipe((step("shrink", filters=0.5), step("optimizer", lr=0.1), step("train", epochs=1), step("onnx")))
    other = Recipe((step("shrink", filters=0.5), step("distil"), step("train", epochs=9), step("onnx")))
    third = Recipe((step("shrink", filters=0.75), step("train", epochs=1), step("onnx")))
    assert space().cost_part(one) == space().cost_part(other) != space().cost_part(third)


def test_a_changed_network_may_start_from_fresh_or_from_trained_weights():
    own = Recipe((step("shrink", filters=0.5), step("train", epochs=1), step("onnx")))
    trained = Recipe((*BASELINE.steps, *own.steps))
    assert trained in space().edits(own) and own in space().edits(trained)
    assert space().complete(Recipe((step("train", baseline=True), *own.steps))) == trained
    assert space(("TRAINED",)).complete(Recipe((step("train", baseline=True), step("shrink")))).steps[-1] == step("shrink")
    only_trains = Recipe((step("optimizer", lr=0.003), step("train", epochs=1)))
    assert not any(e.steps[: len(BASELINE.steps)] == BASELINE.steps for e in space().edits(only_trains))


def test_what_may_cut_in_the_course_of_training_is_costed_with_a_train_step_behind_it():
    one = Recipe((step("fade"), step("optimizer", lr=0.1), step("train", epochs=3), step("distil"), step("onnx")))
    assert [s.method for s in space().cost_part(one).steps] == ["fade", "train", "onnx"]


def test_what_changes_a_trained_network_is_costed_on_its_weights():
    """The baseline's training stands in front of the probe; where no structure step follows, it does not matter."""
    changed = Recipe((*BASELINE.steps, step("shrink", filters=0.5), step("optimizer", lr=0.1), step("train", epochs=1)))
    assert space().cost_part(changed) == Recipe((*BASELINE.steps, step("shrink", filters=0.5), step("train")))
    plain = Recipe((*BASELINE.steps, step("quantize"), step("onnx")))
    assert space().cost_part(plain) == Recipe((step("train"), step("quantize"), step("onnx")))
    assert space().cost_part(Recipe((*BASELINE.steps, step("onnx")))) == Recipe((step("onnx"),))


def test_every_edit_is_one_step_away_and_new():
    recipe = Recipe((step("shrink", filters=0.75), step("optimizer", lr=0.003), step("train", epochs=1), step("onnx")))
    edits = [e for e in space().edits(recipe) if "trained baseline" not in e.name]
    assert all(e != recipe and abs(len(e.steps) - len(recipe.steps)) <= 1 for e in edits)
    assert {e.steps[0].fields.get("filters") for e in edits if e.steps[0].method == "shrink"} == {0.5, 0.75, 1.0}
    assert all(sum(s.is_train for s in e.steps) == 1 for e in edits)


@pytest.mark.parametrize("rung", [0, 1, 2])
def test_wsd_rungs_share_a_prefix_and_last_as_long_as_they_say(rung):
    rungs = (1.0, 3.0, 9.0)
    template = Recipe(
        (step("shrink"), step("schedule", kind="wsd", warmup=0.1, decay=0.4), step("train", epochs=7), step("onnx"))
    )
    exact = at_rung(template, rungs, rung)
    assert trained_epochs(exact) == pytest.approx(rungs[rung])
    assert exact.steps[-1] == step("onnx") and exact.steps[-2].fields["continue"] is True
    assert exact.steps[-2].fields["epochs"] == pytest.approx(0.4 * rungs[rung])
    if rung:
        before = at_rung(template, rungs, rung - 1)
        shared = next(i for i, (a, b) in enumerate(zip(before.steps, exact.steps, strict=False)) if a != b)
        assert before.steps[shared].method == "schedule"  # they part where the shorter one decays


def test_other_schedules_are_scaled_and_the_baselines_part_is_not():
    template = Recipe((*BASELINE.steps, step("schedule", kind="cosine"), step("train", epochs=4), step("train", epochs=4)))
    exact = at_rung(template, (1.0, 2.0), 1, fixed=2)
    assert [s.fields["epochs"] for s in exact.steps if s.is_train] == [5, 1.0, 1.0]


def search(cost_quality, required=0.0, seed=0):
    """Run the allocator on a made-up landscape; returns the winner's index and the epochs that were trained."""
    rng = random.Random(seed)
    bar = Bar(margin=-required, z=0.0, n_val=2000, n_test=10_000)
    allocator = Allocator(bar, (1.0, 3.0, 9.0))
    candidates = [Candidate(Recipe((step("m", i=i),)), gain) for i, (gain, _) in enumerate(cost_quality)]
    spent = 0.0
    while (found := allocator.next(candidates)) is not None:
        candidate, rung, _ = found
        spent += allocator.rungs[rung] - (0.7 * allocator.rungs[rung - 1] if rung else 0)
        quality = cost_quality[candidates.index(candidate)][1] - 0.5 * (2 - rung)
        candidate.scores[rung] = Score(quality + rng.gauss(0, 0.2), 10.0)
    best = allocator.qualified(candidates)
    return candidates.index(best[0]) if best else None, spent


def test_the_allocator_finds_the_fastest_that_passes_for_less_than_training_all():
    landscape = [(0.1 * i, 3.0 - 0.5 * i) for i in range(1, 12)]  # faster is worse; passes up to i = 5
    hits, spent = zip(*(search(landscape, seed=s) for s in range(20)), strict=True)
    assert all(h is not None and 0.0 <= landscape[h][1] <= 1.5 for h in hits)  # the noise is 0.2, a step 0.5
    assert sum(landscape[h][1] in (0.5, 1.0) for h in hits) >= 14
    assert sum(spent) / len(spent) < 0.6 * 9.0 * len(landscape)


def test_what_cannot_win_is_not_trained():
    bar = Bar(margin=0.5, z=2.0, n_val=2000, n_test=10_000)
    allocator = Allocator(bar, (1.0, 3.0))
    winner = Candidate(Recipe((step("a"),)), 1.0, {1: Score(2.0, 10.0)})
    slower = Candidate(Recipe((step("b"),)), 0.9)
    hopeless = Candidate(Recipe((step("c"),)), 1.5, {0: Score(-30.0, 10.0)})
    assert allocator.next([winner, slower, hopeless]) is None
    assert allocator.qualified([winner, slower, hopeless])[0] is winner


def test_chance_grows_with_quality_and_examples():
    few, many = Bar(0.5, 2.0, 500, 1000), Bar(0.5, 2.0, 50_000, 100_000)
    chances = [few.chance(Score(d, 30.0)) for d in (-2.0, 0.0, 2.0)]
    assert chances == sorted(chances)
    assert many.chance(Score(0.3, 30.0)) > few.chance(Score(0.3, 30.0))


def test_tpe_proposes_known_choices_and_leans_to_what_was_good():
    base = Recipe((step("shrink", filters=0.75), step("optimizer", lr=0.001), step("train", epochs=1)))
    told = []
    for filters in (0.5, 0.75, 1.0):
        for lr in (0.001, 0.003, 0.01):
            recipe = Recipe((step("shrink", filters=filters), step("optimizer", lr=lr), step("train", epochs=1)))
            told.append((recipe, -math.log(lr / 0.001)))
    seen = [Proposer(space(), seed).fields(base, told, set()) for seed in range(30)]
    rates = [r.steps[1].fields["lr"] for r in seen if r is not None]
    assert len(rates) == 30 and set(rates) <= {0.001, 0.003, 0.01}
    assert rates.count(0.001) > rates.count(0.01)


def test_the_front_has_no_beaten_row():
    rng = random.Random(0)
    rows = [{"a": rng.random(), "b": rng.random()} for _ in range(50)]
    best = front(rows, ("a", "b"))
    for row, on in zip(rows, best, strict=True):
        beaten = any(o["a"] >= row["a"] and o["b"] >= row["b"] and o != row for o in rows)
        assert on == (not beaten)


def cheap() -> Space:
    """The space where what training costs is the objective; `half` acts on train steps."""
    cards = {**CARDS, "half": {**card("hardware"), "trains": True}}
    return Space(cards, frozenset(("TRAIN_DATA", "FLOAT_WEIGHTS")), BASELINE, ALL, training=True)


def test_where_training_is_the_objective_every_step_decides_the_cost_but_not_its_length():
    one = Recipe((step("optimizer", lr=0.01), step("train", epochs=1), step("onnx")))
    other = Recipe((step("optimizer", lr=0.01), step("train", epochs=9), step("onnx")))
    third = Recipe((step("optimizer", lr=0.003), step("train", epochs=1), step("onnx")))
    assert cheap().cost_part(one) == cheap().cost_part(other) != cheap().cost_part(third)
    two = Recipe((step("train", epochs=1), step("schedule"), step("train", epochs=3)))
    assert cheap().cost_part(two) == two  # which of them is longer decides it


def test_where_training_is_the_objective_its_length_is_edited():
    lengths = [trained_epochs(r) for r in cheap().edits(Recipe((step("optimizer", lr=0.01), step("train", epochs=4))))]
    assert {3.0, 5.33} <= set(lengths)
    assert {trained_epochs(r) for r in space().edits(Recipe((step("optimizer"), step("train", epochs=4))))} == {4.0}


def test_hardware_that_acts_on_training_is_put_before_it():
    recipe = Recipe((step("optimizer", lr=0.01), step("train", epochs=4)))
    added = [[s.method for s in r.steps] for r in cheap().edits(recipe)]
    assert ["optimizer", "half", "train"] in added and ["optimizer", "train", "onnx"] in added


def test_a_candidate_is_priced_by_what_it_costs():
    allocator = Allocator(Bar(0.5, 2.0, 2000, 10_000), (10.0,))
    dear, cheaper = (Candidate(Recipe((step("train", epochs=e),)), g, price=math.exp(-g)) for e, g in ((9, 1.0), (1, 1.2)))
    assert allocator.next([dear, cheaper])[0] is cheaper
    assert allocator._price(cheaper, 0) == pytest.approx(math.exp(-1.2))


def test_what_acts_on_training_alone_is_not_proposed_without_a_train_step():
    trained = Recipe((*BASELINE.steps, step("quantize")))
    added = {s.method for r in space().edits(trained) for s in r.steps[len(BASELINE.steps) :]}
    assert "onnx" in added and not added & {"optimizer", "schedule", "distil"}
    followed = Recipe((*BASELINE.steps, step("shrink", filters=0.5), step("train", epochs=2)))
    assert "schedule" in {s.method for r in space().edits(followed) for s in r.steps[len(BASELINE.steps) :]}


def test_a_longer_training_of_what_was_tried_is_judged_by_it():
    """Two lengths of one plan tell how quality rises with length; another plan at a third length is judged by that."""
    allocator = Allocator(Bar(0.0, 2.0, 2000, 10_000), (10.0,))

    def tried(kind, epochs, difference):
        recipe = Recipe((step("optimizer", kind=kind), step("train", epochs=epochs)))
        return Candidate(recipe, 0.5, {0: Score(difference, 20.0)} if difference is not None else {})

    known = [tried("a", 2, -3.0), tried("a", 4, -1.0), tried("b", 2, -3.0)]
    assert allocator._rise(known) == pytest.approx(2.0 / math.log(2))
    chances = [allocator._at_another_length(tried("b", e, None), known) for e in (2.1, 4, 8, 16)]
    assert chances == sorted(chances) and chances[0] < 0.01 and chances[-1] > 0.8
    assert allocator._at_another_length(tried("c", 4, None), known) is None
