"""A transformer that static int8 ruins: caught by its quality, and repaired in two ways, through the very runtime."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

from quadriga.core.recipe import Recipe, step
from quadriga.core.setup import Setup
from quadriga.core.trial import Status
from quadriga.engine.tasks import Desk
from quadriga.measure.quality import Scores, score
from quadriga.methods.optimizer.optimizer import Optimizer
from quadriga.testing import tiny_transformer
from quadriga.train.loop import fit
from quadriga.verify.quality import standard_error

torch.set_num_threads(1)
OUTLIER = 1000.0


@pytest.fixture(scope="module")
def ruined():
    """A trained transformer with one channel of a normalization a thousand times the others, and the same outputs as before."""
    torch.manual_seed(0)
    task = tiny_transformer((512, 96, 96))
    setup = Optimizer(kind="adamw", lr=0.01)(Setup.of(task, seed=0))
    fit(setup, task.train, epochs=6, seed=0)
    model = setup.model.eval()
    inputs = task.inputs(4)
    with torch.no_grad():
        before = model(inputs)
        for block in model.blocks:
            block.norm2.weight[5] *= OUTLIER
            block.norm2.bias[5] *= OUTLIER
            block.up.weight[:, 5] /= OUTLIER
        torch.testing.assert_close(model(inputs), before, rtol=1e-3, atol=1e-3)
    return replace(task, model=model, trained=True, baseline=Recipe())


def quality(folder, workload, *steps, floor=None):
    recipe = Recipe((*steps, step("onnxruntime")))
    args = {"recipe": recipe.plain(), "hash": recipe.hash, "batches": (1,), "name": "x", "floor": floor}
    return Desk(workload, folder, 0).do("train", args)


def test_static_int8_is_caught_and_repaired(tmp_path, ruined):
    plain = quality(tmp_path, ruined)["values"]["quality"]
    floor = {"quality": plain, "margin": 0.02 * plain}
    static = quality(tmp_path, ruined, step("quantize_int8"), floor=floor)["values"]["quality"]
    assert static > plain + 5 * floor["margin"]  # bits per byte: what a search sees, and leaves behind
    left_out = quality(tmp_path, ruined, step("quantize_int8", sensitive="float"), floor=floor)
    assert left_out["values"]["quality"] <= plain + floor["margin"]
    (decided,) = left_out["info"]["decisions"]
    names = {name for name, _ in ruined.model.named_modules()}
    assert {"blocks.0.up", "blocks.1.up"} & set(decided["value"]) and set(decided["value"]) < names
    assert len(decided["value"]) <= 3  # of nine linear layers
    smoothed = quality(tmp_path, ruined, step("smooth_quant", alpha=0.85), step("quantize_int8"), floor=floor)
    assert smoothed["values"]["quality"] <= plain + floor["margin"]


def test_a_loss_within_chance_leaves_no_layer_out(tmp_path, ruined):
    """A model that misses the floor by less than a standard error of the paired difference is good enough, and no worse one."""
    scores = quality(tmp_path, ruined)["info"]["scores"]
    desk, model = Desk(ruined, tmp_path, 0), copy.deepcopy(ruined.model)
    with torch.no_grad():
        model.head.weight += 0.002 * torch.randn_like(model.head.weight)
    found = score(model, ruined.val, ruined.metric)
    error = standard_error(Scores.load(tmp_path / scores), found, ruined.metric)
    assert error > 0
    for past, kept, enough in (
        (0.5, scores, True),
        (1.5, scores, False),
        (0.5, None, False),
        (0.5, "scores/gone.npz", False),
        (-0.1, None, True),
    ):
        desk._floor = {"quality": found.value - past * error, "margin": 0.0, "scores": kept}
        assert desk._enough(model) is enough


def test_a_network_below_the_floor_is_held_to_itself(tmp_path, ruined):
    """At an early training length no layer is left in float for what the network itself is short of; the margin still holds."""
    desk, model = Desk(ruined, tmp_path, 0), copy.deepcopy(ruined.model)
    own = score(model, ruined.val, ruined.metric).value
    desk._floor = {"quality": own - 0.5, "margin": 0.05, "scores": None}  # bits per byte: half a bit short of it
    assert not desk._enough(model) and desk._enough(model, own)
    assert desk._enough(model, own - 0.04) and not desk._enough(model, own - 0.06)
    desk._floor["quality"] = own + 0.5  # above the floor the floor is what counts
    assert desk._enough(model, own - 0.06)


def test_where_the_float_network_misses_the_floor_int8_may_lose_no_more(tmp_path, ruined):
    """Layers are left in float until it is as good as the float network, not until it holds a floor that nothing holds."""
    plain = quality(tmp_path, ruined)["values"]["quality"]
    floor = {"quality": plain - 1.0, "margin": 0.0}
    found = quality(tmp_path, ruined, step("quantize_int8", sensitive="float"), floor=floor)
    (decided,) = found["info"]["decisions"]
    assert found["status"] == Status.COMPLETE and decided["value"] and found["values"]["quality"] <= plain + 1e-3
