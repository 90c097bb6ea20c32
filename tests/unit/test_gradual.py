"""Pruning in the course of a train step: what fades is gone at its end, and a kill in between changes nothing."""

from copy import deepcopy
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from quadriga import methods
from quadriga.core.axes import AxisGraph
from quadriga.core.batch import call, primary
from quadriga.core.errors import BadInput, NotApplicable
from quadriga.core.recipe import Recipe, step
from quadriga.core.setup import Setup
from quadriga.engine.walk import walk
from quadriga.methods.structure._gradual import BlockFade, share
from quadriga.testing.workloads import TINY
from quadriga.train.loop import fit

torch.set_num_threads(1)
UNITS = [
    ("prune_channels", "cnn", {"importance": "magnitude", "scope": "layer"}),
    ("prune_channels", "cnn", {"importance": "taylor"}),
    ("prune_channels", "cnn", {"importance": "hessian", "round_to": 2}),
    ("prune_channels", "lstm", {"scope": "layer"}),
    ("prune_hidden", "mlp", {"importance": "hessian"}),
    ("prune_hidden", "transformer", {"importance": "taylor"}),
    ("prune_heads", "attention", {"importance": "taylor"}),
]
ALL = [*UNITS, ("prune_blocks", "transformer", {"ratio": 0.5}), ("prune_weights", "cnn", {"ratio": 0.9})]


def start(method, kind, fields, gradual=0.7):
    workload = TINY[kind]()
    return workload, methods.build(step(method, gradual=gradual, **fields))(Setup.of(workload))


def answers(model, workload):
    with torch.no_grad():
        return primary(call(model.eval(), workload.val.batch(torch.arange(8)).inputs))


def shapes(model):
    return {name: tuple(p.shape) for name, p in model.named_parameters()}


def test_the_share_rises_fast_at_first():
    values = [share(i / 10) for i in range(11)]
    rises = [b - a for a, b in pairwise(values)]
    assert values[0] == 0 and values[-1] == 1 and rises == sorted(rises, reverse=True)


@pytest.mark.parametrize(("method", "kind", "fields"), ALL)
def test_nothing_is_cut_before_training_and_all_is_at_its_end(method, kind, fields):
    workload, setup = start(method, kind, fields)
    assert shapes(setup.model) == shapes(Setup.of(workload).model)
    fit(setup, workload.train, epochs=2, seed=0)
    faded = answers(setup.model, workload)
    small = setup.reset_training(workload).model
    if method == "prune_weights":
        zeros = sum(int((p == 0).sum()) for p in small.parameters() if p.dim() > 1)
        assert zeros == round(0.9 * sum(p.numel() for p in small.parameters() if p.dim() > 1))
        assert torch.equal(answers(small, workload), faded)
        return
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in workload.build(0).parameters())
    if method != "prune_blocks":  # its gates are open again outside of training
        torch.testing.assert_close(answers(small, workload), faded)


@pytest.mark.parametrize(("method", "kind", "fields"), [one for one in ALL if one[2].get("scope") == "layer"])
def test_the_widths_are_those_of_pruning_at_once_trained_or_not(method, kind, fields):
    workload, setup = start(method, kind, fields)
    at_once = shapes(start(method, kind, fields, gradual=0.0)[1].model)
    untrained = deepcopy(setup)
    assert shapes(untrained.reset_training(workload).model) == at_once
    fit(setup, workload.train, epochs=1, seed=0)
    assert shapes(setup.reset_training(workload).model) == at_once


@pytest.mark.parametrize(("method", "kind", "fields"), ALL)
def test_a_killed_training_ends_in_the_same_weights(method, kind, fields, tmp_path):
    workload, whole = start(method, kind, fields)
    fit(whole, workload.train, epochs=2, seed=0)
    with pytest.raises(KeyboardInterrupt):
        train_on(start(method, kind, fields)[1], workload, tmp_path, Killing(7))
    _, setup = start(method, kind, fields)
    train_on(setup, workload, tmp_path, Killing(None))
    for (name, a), b in zip(whole.model.named_parameters(), setup.model.parameters(), strict=True):
        assert torch.equal(a, b), name


def train_on(setup, workload, folder, clock):
    return fit(setup, workload.train, epochs=2, seed=0, checkpoint=folder, every=0.0, clock=clock)


class Killing:
    """A clock that ends the process when it is asked for the n-th time."""

    def __init__(self, calls):
        self.left, self.now = calls, 0.0

    def __call__(self):
        self.now += 1.0
        if self.left is not None:
            self.left -= 1
            if self.left == 0:
                raise KeyboardInterrupt
        return self.now


def test_units_fade_step_by_step_and_stay_gone():
    _, setup = start("prune_channels", "cnn", {"scope": "layer"}, gradual=1.0)
    (make,) = setup.training.make_hooks
    hook, seen = make(setup.model), []
    for i in range(1, 11):
        for p in setup.model.parameters():
            p.grad = torch.randn_like(p)
        hook.after_backward(setup.model, i / 10)
        hook.after_step(setup.model, i / 10)
        seen.append({name: alive.clone() for name, alive in hook.alive.items()})
    for before, after in pairwise(seen):
        assert all(not (after[n] & ~before[n]).any() for n in after)
    counts = [sum(int(a.sum()) for a in one.values()) for one in seen]
    assert len(set(counts)) > 3 and counts[-1] < counts[0]


def test_a_gate_turns_a_block_into_the_identity():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = nn.Linear(3, 3)

        def forward(self, x):
            return self.block(x)

    net, x = Net(), torch.randn(2, 3)
    hook = BlockFade(net, ["block"], 0.5)
    with hook.train(net, None):
        torch.testing.assert_close(net(x), nn.functional.linear(x, net.block.weight, net.block.bias))
        hook.after_step(net, 0.5)
        assert torch.equal(net(x), x)
    assert not torch.equal(net(x), x)


@pytest.mark.parametrize("method", ["prune_channels", "prune_weights"])
def test_without_a_train_step_behind_it_it_is_refused(method):
    with pytest.raises(NotApplicable, match="no train step follows"):
        walk(TINY["cnn"](), Recipe((step(method, gradual=0.5),)), seed=0, store=None)


@pytest.mark.parametrize(
    ("method", "kind"), [("prune_channels", "cnn"), ("prune_blocks", "transformer"), ("prune_weights", "cnn")]
)
def test_a_step_that_continues_keeps_what_is_gone_and_the_cut_comes_at_the_end(method, kind, tmp_path):
    workload, first = TINY[kind](), (step(method, gradual=0.7), step("train", epochs=1))
    going_on = Recipe((*first, step("train", epochs=1, continue_=True)))
    small, large = (walk(workload, Recipe(s), seed=0, store=tmp_path).setup for s in (going_on.steps, first))
    assert shapes(small.model) == shapes(large.model)
    assert not small.training.finish and not small.training.make_hooks
    held = walk(workload, Recipe((*going_on.steps, step("train", epochs=1))), seed=0, store=tmp_path).setup
    assert shapes(held.model) == shapes(small.model)
    if method == "prune_weights":
        assert sum(int((p == 0).sum()) for p in small.model.parameters() if p.dim() > 1) > 0


def test_a_walk_cuts_trains_on_and_is_rebuilt_from_its_checkpoints(tmp_path):
    steps = (step("train", epochs=1), step("prune_channels", gradual=0.7), step("train", epochs=1), step("train", epochs=1))
    one, two = (walk(TINY["cnn"](), Recipe(steps), seed=0, store=tmp_path) for _ in range(2))
    assert shapes(one.setup.model) == shapes(two.setup.model) != shapes(TINY["cnn"]().build(0))
    assert all(torch.equal(a, b) for a, b in zip(one.setup.model.parameters(), two.setup.model.parameters(), strict=True))


def test_a_part_beyond_the_train_step_is_bad_input():
    with pytest.raises(BadInput, match=r"prune_heads.gradual is 1\.5"):
        methods.build(step("prune_heads", gradual=1.5))


class Twice(nn.Module):
    def forward(self, weight):
        return weight * 2


@pytest.mark.parametrize("kind", ["weight_norm", "spectral_norm", "orthogonal", "custom"])
def test_a_parametrized_layer_is_cut_rightly_or_left(kind):
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1)]
    net = nn.Sequential(*layers, nn.Flatten(), nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 2))
    if kind == "custom":
        parametrize.register_parametrization(net[3], "weight", Twice())
    else:
        getattr(parametrizations, kind)(net[3])
    x = torch.randn(2, 3, 12, 12)
    graph = AxisGraph.trace(net, x)
    names = [g.name for g in graph.groups() if not g.fixed]
    for name in names:
        graph.cut(name, torch.arange(graph.group(name).size - 1))
    assert "7" in names and net.train()(x).shape == (2, 2)
    net(x).sum().backward()
    assert net.eval()(x).isfinite().all()


def test_a_refusal_names_the_parametrized_layer():
    workload = TINY["cnn"]()
    setup = Setup.of(workload)
    for module in [m for m in setup.model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]:
        parametrizations.spectral_norm(module)
    for method in ("prune_channels", "low_rank", "grouped", "to_latency"):
        with pytest.raises(NotApplicable, match="computes its weight at each call"):
            methods.build(step(method))(setup)
    with pytest.raises(NotApplicable, match="no matrix"):
        methods.build(step("prune_weights"))(setup)
