"""Widening keeps the function and breaks the symmetry; what grew can teach what is cut out of it."""

import pytest
import torch
from test_axes import NETS, check_fields, make
from torch import nn

from quadriga.core.axes import AxisGraph
from quadriga.core.axes.grow import added, grow
from quadriga.core.batch import call, primary
from quadriga.core.errors import BadInput, NotApplicable
from quadriga.core.recipe import Recipe, step
from quadriga.core.setup import Setup
from quadriga.engine.walk import walk
from quadriga.methods.structure.widen import Widen
from quadriga.testing.workloads import TINY

torch.set_num_threads(1)
SAME = [name for name in NETS if name not in ("bare", "windows")]  # a tied matrix makes and reads its units; heads alone


@pytest.mark.parametrize("name", SAME)
@pytest.mark.parametrize("times", [1, 2])
def test_outputs_stay_when_every_unit_is_copied_equally_often(name, times):
    net, x = make(name)
    before, graph = net(x).detach(), AxisGraph.trace(net, x)
    free = [g for g in graph.groups() if not g.fixed and not g.split]
    count = sum(p.numel() for p in net.parameters())
    grow(graph, {g: torch.arange(g.size).repeat(times) for g in free}, torch.Generator().manual_seed(0))
    torch.testing.assert_close(net(x), before)
    assert sum(p.numel() for p in net.parameters()) > count
    check_fields(net)


def test_copies_learn_different_things():
    net, x = nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 1)), torch.randn(8, 3)
    graph = AxisGraph.trace(net, x)
    grow(graph, {graph.group("0"): torch.arange(2)}, torch.Generator().manual_seed(0))
    assert torch.equal(net[0].weight[::2], net[0].weight[1::2])
    net(x).square().sum().backward()
    assert not torch.allclose(net[0].weight.grad[::2], net[0].weight.grad[1::2])


def test_copies_stand_behind_what_they_copy():
    gates = added(torch.tensor([0, 1, 2, 0, 1, 2]), torch.tensor([2, 0, 2]))
    assert gates == [(0, 0, 4), (2, 2, 3), (2, 2, 5), (3, 3, 4), (5, 5, 3), (5, 5, 5)]
    channels = added(torch.tensor([-1, 0, 0, 1, 1, -1]), torch.tensor([1]))  # two features of each channel, between others
    assert channels == [(4, 3, 2), (4, 4, 2)]


def test_a_refused_network_is_as_it_was():
    class Rigid(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 2)

        def forward(self, x):
            assert self.a.weight.shape[0] == 6, "six of them"
            return self.b(torch.relu(self.a(x)))

    net, x = Rigid(), torch.randn(2, 4)
    graph, before = AxisGraph.trace(net, x), {k: v.clone() for k, v in net.state_dict().items()}
    with pytest.raises(NotApplicable, match="six of them"):
        grow(graph, {graph.group("a"): torch.tensor([0])}, torch.Generator())
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


@pytest.mark.parametrize("kind", ["mlp", "cnn", "lstm"])
def test_the_method_grows_as_asked(kind):
    workload = TINY[kind]()
    setup = Setup.of(workload)
    x = workload.val.batch(torch.arange(8)).inputs
    before, sizes = primary(call(setup.model.eval(), x)), {n: p.shape for n, p in setup.model.named_parameters()}
    model = Widen(factor=1.5, round_to=1)(setup).model
    assert any(p.shape[0] == round(1.5 * sizes[n][0]) for n, p in model.named_parameters())
    torch.testing.assert_close(primary(call(model.eval(), x)), before)


def test_a_larger_network_that_the_recipe_trains_teaches_a_small_one(tmp_path):
    workload = TINY["cnn"]()
    steps = [
        step("widen"),
        step("train", epochs=1),
        step("distill", teacher="present"),
        step("prune_channels", ratio=0.7, round_to=1),
    ]
    walked = walk(workload, Recipe((*steps, step("train", epochs=1))), seed=0, store=tmp_path)
    assert walked.samples == 2 * len(workload.train)
    wide = walk(workload, Recipe(tuple(steps[:2])), seed=0, store=tmp_path).setup.model
    small, plain, large = (sum(p.numel() for p in m.parameters()) for m in (walked.setup.model, workload.build(0), wide))
    assert small < plain < large


@pytest.mark.parametrize("factor", [1.0, 0.5, 17.0])
def test_a_factor_that_does_not_widen_is_bad_input(factor):
    with pytest.raises(BadInput, match=r"widen\.factor"):
        Widen(factor=factor)


class Gained(nn.Linear):
    """A weight with a learned factor."""

    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.gain = nn.Parameter(torch.tensor(0.7))

    def forward(self, x):
        return nn.functional.linear(x, self.gain * self.weight, self.bias)


@pytest.mark.parametrize(
    ("reader", "widened"), [(Gained(8, 4), True), (nn.utils.parametrizations.spectral_norm(nn.Linear(8, 4)), False)]
)
def test_units_are_shared_out_among_scaled_readers_and_left_where_a_weight_is_computed_otherwise(reader, widened):
    net, x = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), reader, nn.ReLU(), nn.Linear(4, 2)).eval(), torch.randn(5, 6)
    before, graph = net(x).detach(), AxisGraph.trace(net, x)
    copies = {graph.group("0"): torch.arange(8)}
    if widened:
        grow(graph, copies, torch.Generator().manual_seed(0))
        torch.testing.assert_close(net(x), before)
    else:
        with pytest.raises(NotApplicable, match=r"0 is read through 2\..*from which a layer computes its weight"):
            grow(graph, copies, torch.Generator().manual_seed(0))
    assert net[0].out_features == (16 if widened else 8)
