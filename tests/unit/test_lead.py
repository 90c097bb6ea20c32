"""The ending that the unchanged network runs fastest with is that of every recipe that changes it."""

from __future__ import annotations

from quadriga import methods
from quadriga.core.recipe import Recipe, step
from quadriga.search.allocate import Allocator, Bar, Candidate, Score
from quadriga.search.lead import Lead, parts
from quadriga.search.space import Space
from quadriga.stages.opening import _for_search

BASELINE = Recipe((step("optimizer", kind="adamw", lr=0.0002), step("train", epochs=3)))
INT8, BF16 = step("quantize_int8", activations="static"), step("half_weights", kind="bf16")
ONE, ORT, OV = step("threads", count=1), step("onnxruntime"), step("openvino")
PRUNED = Recipe((*BASELINE.steps, step("prune_channels"), step("train", epochs=5), INT8, ONE, ORT), "pruned")


def space():
    cards = {c["name"]: {**_for_search(c, ()), "unsearched": ""} for c in methods.cards()}
    families = frozenset(("structure", "training", "optimizer", "hardware"))
    return Space(cards, frozenset({"TRAIN_DATA", "FLOAT_WEIGHTS"}), BASELINE, families)


def unchanged(gain, *ending, difference=0.0, scored=True):
    top = {0: Score(difference, 10.0)} if scored else {}
    return Candidate(Recipe((*BASELINE.steps, *ending)), gain, top, trains=False)


def lead():
    return Lead(space(), Allocator(Bar(0.5, 2.0, 2000, 10_000), (1.0,)))


def test_a_recipe_gets_the_fastest_ending_that_holds_the_floor():
    known = [unchanged(1.0, INT8, ONE, OV, difference=-9.0), unchanged(0.7, BF16, ONE, OV), unchanged(0.4, ONE, ORT)]
    made, other = lead().ended(PRUNED, known)
    assert parts(space(), made)[1] == (BF16, ONE, OV) and made.name == "pruned"
    assert parts(space(), made)[0] == parts(space(), PRUNED)[0]
    assert parts(space(), other)[1] == (ONE, ORT), "the other runtime is near"
    known[2].gain = 0.2
    assert lead().ended(PRUNED, known) == [made]


def test_what_was_not_scored_or_changes_the_network_is_no_lead():
    other = Candidate(PRUNED, 3.0, {0: Score(0.0, 10.0)}, trains=False)
    assert lead().ended(PRUNED, [other, unchanged(1.0, INT8, ONE, OV, scored=False)]) == [PRUNED]
    assert lead().changes(PRUNED) and not lead().changes(Recipe((*BASELINE.steps, INT8, ONE, OV)))


def test_it_is_open_while_a_faster_one_is_not_scored():
    slow, fast = unchanged(0.4, ONE, ORT), unchanged(0.7, BF16, ONE, OV, scored=False)
    assert lead().open([slow, fast], []) and not lead().open([slow], [PRUNED])
    assert lead().open([slow], [Recipe((ONE, OV))]), "its cost is being measured"
    fast.dead = "no gain in the objective"
    assert not lead().open([slow, fast], [])


def test_who_goes_on_from_the_baseline_goes_on_with_its_optimizer():
    recipe = Recipe((*BASELINE.steps, step("prune_channels"), step("optimizer", kind="adamw", lr=0.003), step("train")))
    assert space().tuned(recipe).steps[3] == BASELINE.steps[0]
    fresh = Recipe(recipe.steps[2:])
    assert space().tuned(fresh) == fresh
