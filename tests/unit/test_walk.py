"""A recipe and a seed rebuild the variant; train steps with a common prefix are trained once."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from quadriga.core.errors import NotApplicable
from quadriga.core.recipe import Recipe, step
from quadriga.core.workload import Workload
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
