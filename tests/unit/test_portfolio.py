"""Recipes are adapted, not lost: what a workload cannot carry is left out of them, told of, and the rest is tried."""

from __future__ import annotations

from dataclasses import replace

import pytest
from made_up import FLOOR, Engine

from quadriga import methods
from quadriga.core.recipe import Recipe, step
from quadriga.core.setup import Setup
from quadriga.core.trial import Status, Trial
from quadriga.engine.store import Store
from quadriga.engine.walk import walk
from quadriga.search.space import Space
from quadriga.stages.explore import Explorer, load_portfolio
from quadriga.stages.opening import _for_search
from quadriga.stages.portfolio import adapted, left_out, refused_step
from quadriga.stages.state import Options, Study
from quadriga.testing import tiny_cnn, tiny_lstm

ALL = ("structure", "training", "optimizer", "hardware")
KERNELS, FEATURES = step("shrink", kernel=3), step("shrink", filters=0.5, features=0.25)
FLIP, ADAMW, TRAIN = step("flip"), step("optimizer", kind="adamw", lr=0.01), step("train", epochs=4.0)
ENDING = (step("threads", count=1), step("onnxruntime"))


class Picky(Engine):
    """An engine on which some steps are refused: in probes those that shape the network, in trainings all."""

    def __init__(self, *refused):
        super().__init__(workers=1)
        self.refused = list(refused)

    def wait(self, timeout):
        if not self.queue:
            return None
        order = self.queue.pop(0)
        recipe = Recipe.from_plain(order.args["recipe"])
        self.done.append((order.task, recipe))
        for place, one in enumerate(recipe.steps):
            if one in self.refused:
                told = {"step": one.method, "place": place, "reason": f"there is nothing for {one}"}
                return order.number, {"status": "refused", **told}
        speed = {f"speed/{b}": 2.0 for b in order.args["batches"]}
        values = {"bytes": 100.0, "parameters": 10.0, "quality": 90.0, "samples": 96.0, "seconds": 1.0, **speed}
        left = [[str(one), "shrink.features: no width"] for one in recipe.steps if one == FEATURES]
        return order.number, {"status": "complete", "values": values, "info": {"left": left} if left else {}}


def study_of(folder, store, engine, workload=None, baseline=Recipe()):  # noqa: B008
    task = tiny_cnn(trained=not baseline.steps) if workload is None else workload
    cards = {c["name"]: {**_for_search(c, ()), "unsearched": ""} for c in methods.cards()}
    space = Space(cards, Setup.of(task).traits | {"TEACHER"}, baseline, frozenset(ALL))
    study = Study(task, Options(FLOOR, budget=600.0), folder, store, engine, space, lambda event: None)
    if not study.trials:
        known = {"quality": 90.0, "bytes": 400.0, "seconds": 1.0, "samples": 96.0, "parameters": 10.0}
        study.add(Trial(0, "baseline", baseline, 0, Status.COMPLETE, "", known))
        study.add(Trial(1, "tuned_eager", Recipe(), 0, Status.COMPLETE, "", {f"speed/{b}": 1.0 for b in study.batches}))
    return study


@pytest.fixture
def searched(tmp_path, monkeypatch):
    """Search a portfolio to its end on an engine that refuses some steps; gives study, explorer and what was asked for."""
    stores = []

    def made(portfolio, *refused, baseline=Recipe()):  # noqa: B008
        while stores:
            stores.pop().close()
        stores.append(store := Store(tmp_path))
        study = study_of(tmp_path, store, Picky(*refused), baseline=baseline)
        study.portfolio = portfolio
        monkeypatch.setattr(study, "paired", lambda trial: (0.0, 1.0))
        explorer = Explorer(study, 0.0)
        monkeypatch.setattr(explorer, "_propose", lambda: False)
        explorer.run()
        return study, explorer, study.engine.done

    yield made
    while stores:
        stores.pop().close()


def trained(done):
    return [recipe for task, recipe in done if task == "train"]


def test_the_step_that_was_refused_goes_and_not_its_namesake(searched):
    """Of two `shrink` steps the first is refused: until now the last of that name went first."""
    whole = Recipe((KERNELS, FEATURES, ADAMW, TRAIN, *ENDING), "half")
    study, explorer, done = searched([whole], KERNELS)
    assert [c.recipe.steps for c in explorer.candidates.values() if not c.dead] == [(FEATURES, ADAMW, TRAIN, *ENDING)]
    assert {r.steps[0].method: r.steps[0] for r in trained(done)} == {"shrink": FEATURES}
    gone, part = left_out(study)
    assert gone == f'left out of "half": {KERNELS}, since there is nothing for {KERNELS}'
    assert part == f'left out of "half": part of {FEATURES}, since shrink.features: no width'


def test_steps_are_left_out_until_nothing_is_refused(searched):
    """Two by the cost probe, one by the training; a resumed study does not ask again, and notes the same."""
    whole = Recipe((KERNELS, FEATURES, FLIP, step("distill"), ADAMW, TRAIN, *ENDING), "half")
    study, explorer, done = searched([whole], KERNELS, FEATURES, FLIP)
    best = [c.recipe.steps for c in explorer.candidates.values() if c.scores]
    assert best == [(step("distill"), ADAMW, TRAIN, *ENDING)]
    first, *others = trained(done)
    assert FLIP in first.steps and others and not any(FLIP in r.steps for r in others)
    told = left_out(study)
    assert [line.split(": ")[1].split(", since")[0] for line in told] == [str(KERNELS), str(FEATURES), str(FLIP)]
    again, _, asked = searched([whole], KERNELS, FEATURES, FLIP)
    assert sorted(left_out(again)) == sorted(told) and not asked


def test_what_is_left_behind_the_baselines_own_training_is_adapted_too(searched):
    baseline = Recipe((step("optimizer", kind="sgd", lr=0.1), TRAIN))
    whole = Recipe((*baseline.steps, KERNELS, step("optimizer", kind="sgd", lr=0.1), TRAIN, *ENDING), "half")
    _, explorer, _ = searched([whole], KERNELS, baseline=baseline)
    assert [c.recipe.steps for c in explorer.candidates.values() if c.scores] == [(*baseline.steps, *whole.steps[3:])]


def test_two_recipes_that_become_equal_are_one(searched):
    both = [Recipe((one, ADAMW, TRAIN, *ENDING), name) for one, name in ((KERNELS, "kernels"), (FEATURES, "features"))]
    study, explorer, _ = searched(both, KERNELS, FEATURES)
    assert [c.recipe.steps for c in explorer.candidates.values() if c.scores] == [(ADAMW, TRAIN, *ENDING)]
    assert len(left_out(study)) == 2


def test_a_train_step_is_never_left_out():
    recipe = Recipe((ADAMW, TRAIN, *ENDING))
    for info in ({"step": "train", "place": 1}, {}, {"step": None}, {"step": "erase"}):
        assert refused_step(recipe, Trial(0, "search", recipe, info=info), 0) is None


def test_a_refused_step_is_found_in_a_recipe_of_another_length_and_after_a_resume():
    recipe = Recipe((step("shrink", filters=0.5), ADAMW, TRAIN, step("shrink", only=["a", "b"]), TRAIN, *ENDING))
    part = Recipe((recipe.steps[0], step("train"), step("shrink", only=("a", "b")), *ENDING))
    trial = Trial(0, "cost", part, info={"step": "shrink", "place": 2})
    assert refused_step(recipe, trial, 0) == refused_step(recipe, Trial.from_plain(trial.plain()), 0) == 3
    assert refused_step(recipe, replace(trial, info={"step": "shrink", "place": 0}), 0) == 0
    assert refused_step(recipe, replace(trial, info={"step": "shrink"}), 0) == 3


def test_the_shipped_recipes_lose_what_the_workload_does_not_declare(tmp_path):
    """No recipe is lost for `flip`; what is left out is a line a step, whatever the number of recipes."""
    with Store(tmp_path) as store:
        task = replace(tiny_cnn(trained=True), invariances=frozenset())
        study = study_of(tmp_path, store, Picky(), task)
        shipped = load_portfolio()
        found = adapted(study, shipped)
        assert len(found) == len({r.hash for r in found}) and all(study.space.illegal(r) is None for r in found)
        assert not any(s.method == "flip" for r in found for s in r.steps)
        assert any(s.method == "distill" for r in found for s in r.steps)
        (line,) = left_out(study)
        assert line.startswith('left out of "few blocks, half of their channels", ') and "more: flip()" in line
        assert "the workload does not say that a mirrored image keeps its label" in line


def test_text_loses_what_is_for_images_and_keeps_the_rest(tmp_path):
    with Store(tmp_path) as store:
        study = study_of(tmp_path, store, Picky(), tiny_lstm(trained=True))
        found = adapted(study, [Recipe((FLIP, *rest), "r") for rest in ((ADAMW, TRAIN), (ADAMW, TRAIN), (TRAIN,))])
        assert [r.steps for r in found] == [(ADAMW, TRAIN), (TRAIN,)]
        assert left_out(study)[0].startswith('left out of "r": flip(), since IMAGES is lacking: it needs inputs of shape')


def test_a_field_that_finds_nothing_is_told_of_and_the_rest_of_the_step_acts():
    """A convolutional network without hidden Linear layers: `features` is passed over, `filters` acts."""
    from quadriga.testing.workloads import tiny_pooled

    task = tiny_pooled(trained=True)
    walked = walk(task, Recipe((step("shrink", filters=0.5, features=0.5, round_to=1),)), seed=0, store=None)
    ((said, why),) = walked.left
    assert said == "shrink(filters=0.5, features=0.5, round_to=1)" and why == "shrink.features: fc: it is the model's output"
    assert walked.setup.model.conv1.out_channels == 3
