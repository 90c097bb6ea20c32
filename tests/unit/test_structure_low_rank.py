"""low_rank: Eckart–Young, the break-even rule, ties."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from quadriga.core.errors import BadInput, NotApplicable
from quadriga.core.setup import Setup
from quadriga.core.workload import Workload
from quadriga.methods.structure.low_rank import LowRank, break_even, factorize, rank_by_energy

torch.set_num_threads(1)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(st.integers(1, 30), st.integers(1, 30), st.data())
def test_factorize_is_the_best_rank_r_fit(rows, columns, data):
    """Eckart-Young: the squared error equals the sum of the dropped squared singular values."""
    linear, rank = nn.Linear(columns, rows).double(), data.draw(st.integers(1, min(rows, columns)))
    down, up = factorize(linear, rank)
    error = (up.weight @ down.weight - linear.weight).square().sum()
    torch.testing.assert_close(error, torch.linalg.svdvals(linear.weight)[rank:].square().sum())
    assert up.bias.equal(linear.bias) and down.bias is None


@pytest.mark.parametrize("mode", ["zeros", "reflect"])
def test_a_convolution_of_low_rank_is_found_exactly(mode):
    """At the true rank the two layers are the convolution, with stride, padding and dilation."""
    conv = nn.Conv2d(6, 10, (3, 5), stride=2, padding=(1, 4), dilation=(1, 2), padding_mode=mode).double()
    conv.weight.data = (torch.randn(10, 4).double() @ torch.randn(4, 90).double()).reshape(conv.weight.shape)
    x = torch.randn(2, 6, 12, 14, dtype=torch.double)
    down, up = factorize(conv, 4)
    torch.testing.assert_close(up(down(x)), conv(x))
    short = factorize(conv, 3)
    error = (short[1].weight.flatten(1) @ short[0].weight.flatten(1) - conv.weight.flatten(1)).square().sum()
    torch.testing.assert_close(error, torch.linalg.svdvals(conv.weight.flatten(1))[3:].square().sum())


def test_rank_by_energy_is_the_least_that_suffices():
    weight = torch.diag(torch.tensor([3.0, 2.0, 1.0, 1.0]))  # squares 9, 4, 1, 1
    assert [rank_by_energy(weight, e) for e in (0.59, 0.61, 0.85, 0.9, 0.999)] == [1, 2, 2, 3, 4]


def setup(net):
    x, y = torch.randn(8, 40), torch.arange(8) % 3
    return Setup.of(Workload(model=net, train=(x, y), val=(x, y), test=(x, y)))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.out = nn.Linear(40, 40), nn.Linear(40, 40), nn.Linear(40, 40), nn.Linear(40, 3)
        self.b.weight = self.a.weight

    def forward(self, x):
        return self.out(nn.functional.linear(self.b(self.a(x)), self.c.weight))


def test_only_layers_that_pay_are_replaced():
    """Parameters drop by mn − r(m+n) in each replaced layer, and nowhere else."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 3))
    net[0].weight.data = torch.randn(40, 2) @ torch.randn(2, 40)
    before = net[0](torch.ones(2, 40))
    after = LowRank(energy=0.9999)(setup(net)).model
    assert isinstance(after[0], nn.Sequential) and after[0][0].out_features == 2 and type(after[2]) is nn.Linear
    torch.testing.assert_close(after[0](torch.ones(2, 40)), before, rtol=1e-4, atol=1e-4)
    half = LowRank(ratio=0.5, only="0")(setup(nn.Sequential(nn.Linear(40, 40), nn.Linear(40, 3)))).model
    assert half[0][0].out_features == int(0.5 * break_even(torch.ones(40, 40))) == 10
    assert sum(p.numel() for p in half[0].parameters()) == 800 + 40


def test_ties_and_weights_that_are_read_directly_are_left_alone():
    net = Tied()
    for layer in (net.a, net.c):
        layer.weight.data = torch.randn(40, 1) @ torch.randn(1, 40)
    with pytest.raises(NotApplicable, match=r"pays in no layer: c: .*weight.*; out needs rank 3"):
        LowRank(energy=0.999)(setup(net))
    state = setup(net)
    assert state.model.a.weight is state.model.b.weight and type(state.model.c) is nn.Linear


def test_break_even_is_refused():
    net = nn.Sequential(nn.Linear(40, 40))
    nn.init.orthogonal_(net[0].weight)  # no rank is better than another
    with pytest.raises(NotApplicable, match=r"0 needs rank 36, break-even is 20\.0"):
        LowRank(energy=0.9)(setup(net))
    with pytest.raises(BadInput, match="energy"):
        LowRank(energy=1.0)
    with pytest.raises(ValueError, match="rank 41"):
        factorize(net[0], 41)
