"""A model that comes trained teaches, and so does a baseline: the same teacher in walk, study, workers and after a resume."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from quadriga.core.errors import NotApplicable
from quadriga.core.metric import Floor
from quadriga.core.recipe import Recipe, step
from quadriga.engine import walk as walking
from quadriga.engine.tasks import Desk
from quadriga.engine.teacher import can_teach, pupils
from quadriga.engine.walk import prefix_key, walk, workload_key
from quadriga.methods import available
from quadriga.stages.opening import open_study
from quadriga.stages.state import Options
from quadriga.testing import tiny_cnn, tiny_mlp
from quadriga.workloads import load

torch.set_num_threads(1)
SGD, ADAMW = step("optimizer", kind="sgd", lr=0.1), step("optimizer", kind="adamw", lr=0.01)
BASELINE = Recipe((ADAMW, step("train", epochs=2)))
PUPILS = sorted(name for name, method in available().items() if "TEACHER" in method.requires)
MINE = """
from quadriga.testing import tiny_mlp

def workload():
    return tiny_mlp((96, 32, 32), trained=True, seed=5)
"""


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def recipe_of(name, epochs=1):
    return Recipe((step("prune_channels", ratio=0.5), step(name), ADAMW, step("train", epochs=epochs)))


def teacher_of(walked):
    found = walked.setup.context.teacher
    assert not found.training and not any(p.requires_grad for p in found.parameters())
    return weights(found)


def untrained(**changes):
    return replace(tiny_mlp((96, 32, 32)), baseline=BASELINE, **changes)


def test_the_distilling_methods_are_here():
    assert {"distill", "distill_attention", "distill_features"} <= set(PUPILS)


@pytest.mark.parametrize("name", PUPILS)
def test_who_comes_trained_teaches_in_a_walk(name, tmp_path):
    task = tiny_cnn(trained=True, seed=5)
    walked = walk(task, recipe_of(name), seed=3, store=tmp_path)
    assert torch.equal(teacher_of(walked), weights(task.build(3))) and walked.samples == 96
    assert torch.equal(weights(walked.setup.model), weights(walk(task, recipe_of(name), seed=3, store=tmp_path).setup.model))


@pytest.mark.parametrize("name", PUPILS)
def test_who_comes_trained_teaches_in_a_study_and_after_a_resume(name, tmp_path):
    options = Options(Floor.parse("-50pt"), budget=600.0)
    for epochs in (1, 2):  # the second study takes up the first one
        with open_study(tiny_cnn(trained=True), options, tmp_path, lambda event: None) as study:
            assert study.space.illegal(recipe_of(name, epochs)) is None
            orders = [("baseline", Recipe())] if epochs == 1 else []
            for stage, recipe in [*orders, ("search", recipe_of(name, epochs))]:
                study.submit(stage, "train", recipe)
                while (trial := study.collect(60.0)) is None:
                    pass
                assert trial.ok, trial.reason
    assert trial.values["samples"] == 192


def test_who_is_like_its_teacher_learns_nothing(tmp_path):
    """The divergence's gradient is zero where both answers are equal: with alpha = 1 the weights stay, to rounding."""
    task = tiny_mlp((96, 32, 32), trained=True, seed=5)
    alone = walk(task, Recipe((step("distill", alpha=1.0), SGD, step("train", epochs=2))), seed=0, store=tmp_path)
    torch.testing.assert_close(weights(alone.setup.model), weights(task.build(0)), rtol=0, atol=1e-6)
    moved = walk(task, Recipe((step("distill", alpha=0.5), SGD, step("train", epochs=2))), seed=0, store=tmp_path)
    assert (weights(moved.setup.model) - weights(task.build(0))).abs().max() > 1e-3


def test_a_baseline_is_trained_first_and_once(tmp_path):
    """A recipe from fresh weights has it trained for its teacher; one that begins with it shares the training."""
    fresh = Recipe((step("distill"), ADAMW, step("train", epochs=1)))
    walked = walk(untrained(), fresh, seed=0, store=tmp_path)
    kept = tmp_path / prefix_key(untrained(), BASELINE, 1, 0)
    assert kept.is_dir() and walked.samples == 96, "what the teacher saw is no cost of the recipe"
    times = {p: p.stat().st_mtime_ns for p in kept.iterdir()}
    begun = walk(untrained(), Recipe((*BASELINE.steps, *fresh.steps)), seed=0, store=tmp_path)
    assert {p: p.stat().st_mtime_ns for p in kept.iterdir()} == times and begun.samples == 3 * 96
    baseline = weights(walk(untrained(), BASELINE, seed=0, store=tmp_path).setup.model)
    assert torch.equal(teacher_of(walked), baseline) and torch.equal(teacher_of(begun), baseline)
    assert pupils(untrained(), fresh) == ["distill"] and pupils(untrained(), Recipe((*BASELINE.steps, *fresh.steps))) == []


def test_a_probe_trains_no_teacher(tmp_path):
    fresh = Recipe((step("distill"), ADAMW, step("train", epochs=1)))
    probe = walk(untrained(), fresh, seed=0, store=None, ready=tmp_path)
    assert not list(tmp_path.iterdir()) and probe.samples == 0
    assert torch.equal(teacher_of(probe), weights(untrained().build(0)))


def test_a_baseline_that_trains_nothing_teaches_nobody(tmp_path):
    idle = untrained()
    idle = replace(idle, baseline=Recipe((step("threads", count=1),)))
    assert not can_teach(idle)
    with pytest.raises(NotApplicable, match=r"requires TEACHER.*give it a train step"):
        walk(idle, Recipe((step("distill"), ADAMW, step("train", epochs=1))), seed=0, store=tmp_path)


def test_a_baseline_that_asks_for_a_teacher_has_none(tmp_path):
    odd = untrained()
    odd = replace(odd, baseline=Recipe((step("distill"), ADAMW, step("train", epochs=1))))
    with pytest.raises(NotApplicable, match="requires TEACHER"):
        walk(odd, odd.baseline, seed=0, store=tmp_path)


@pytest.mark.parametrize("trained", [True, False])
def test_workers_of_a_train_step_come_to_the_same_teacher(trained, tmp_path):
    """What a Hogwild worker does: it makes the setup of the train step anew, from the workload's reference."""
    text = MINE if trained else MINE.replace(", trained=True", "") + BASELINED
    (tmp_path / "mine.py").write_text(text)
    reference = f"{tmp_path / 'mine.py'}:{'workload' if trained else 'baselined'}"
    task, recipe = load(reference), Recipe((step("distill"), ADAMW, step("train", epochs=1)))
    whole = walk(task, recipe, seed=0, store=tmp_path / "store", decisions=tmp_path / "decided")
    places = {"store": tmp_path / "store", "decisions": tmp_path / "decided"}
    setup, data = walking.rebuilt(reference, recipe, 2, 0, (), places, workload_key(task))
    assert torch.equal(weights(setup.context.teacher), teacher_of(whole)) and len(data) == 96
    assert setup.training.loss is not None and "TEACHER" in setup.traits


BASELINED = """

def baselined():
    from dataclasses import replace
    from quadriga import Recipe, step
    steps = step("optimizer", kind="adamw", lr=0.01), step("train", epochs=2)
    return replace(workload(), baseline=Recipe(steps))
"""


def test_every_task_of_a_worker_has_it(tmp_path):
    """In a desk as local workers and those of Ray have, in one that comes after it too; nothing is handed over."""
    (tmp_path / "mine.py").write_text(MINE)
    recipe = Recipe((step("shrink", features=0.5), step("distill"), ADAMW, step("train", epochs=1)))
    args = {"recipe": recipe.plain(), "hash": recipe.hash, "name": "one", "split": "val"}
    done = {}
    for task in ("train", "score"):
        desk = Desk(load(f"{tmp_path / 'mine.py'}:workload"), tmp_path / "out", 0)
        done[task] = desk.do(task, args)
    assert [found.get("reason", "") for found in done.values()] == ["", ""]
    assert done["train"]["values"]["quality"] == done["score"]["values"]["quality"]
