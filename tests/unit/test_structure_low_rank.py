"""low_rank: Eckart–Young, the break-even rule, ties."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from quadriga.core.errors import BadInput, NotApplicable
from quadriga.core.setup import Setup
from quadriga.core.workload import Workload
from quadriga.methods.structure._moments import rows
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


@pytest.mark.parametrize("kind", ["linear", "conv1d", "conv2d"])
def test_whitened_is_the_best_fit_of_the_outputs(kind):
    """On its data the error is the sum of the dropped squared singular values of W S, and below plain SVD's."""
    torch.manual_seed(0)
    layer, x = {
        "linear": (nn.Linear(12, 10, bias=False), torch.randn(200, 12) @ torch.randn(12, 12)),
        "conv1d": (nn.Conv1d(4, 8, 3, stride=2, padding=1, bias=False), torch.randn(20, 4, 15).cumsum(2)),
        "conv2d": (nn.Conv2d(3, 8, 3, padding="same", padding_mode="circular", bias=False), torch.randn(9, 3, 6, 6).cumsum(3)),
    }[kind]
    layer, x = layer.double(), x.double()
    seen = rows(layer, x)
    second = seen.T @ seen / len(seen)
    root = torch.linalg.cholesky(second + 1e-12 * torch.eye(len(second)))
    errors = []
    for one in (root, None):
        down, up = factorize(layer, 4, one)
        errors.append((up(down(x)) - layer(x)).square().sum() / len(seen))
    dropped = torch.linalg.svdvals(layer.weight.flatten(1) @ root)[4:].square().sum()
    torch.testing.assert_close(errors[0], dropped, rtol=1e-6, atol=1e-9)
    assert errors[0] < 0.9 * errors[1]


def test_whitening_uses_the_calibration_data():
    """Inputs that never vary cost no rank: a layer of full rank on data of rank 2 becomes rank 2, and outputs stay."""
    torch.manual_seed(0)
    x, y = torch.randn(64, 2) @ torch.randn(2, 40), torch.arange(64) % 3
    start = Setup.of(Workload(model=nn.Sequential(nn.Linear(40, 40), nn.Linear(40, 3)), train=(x, y), val=(x, y), test=(x, y)))
    before = start.model(x)
    model = LowRank(energy=0.999, whiten=True, only="0")(start).model
    assert model[0][0].out_features == 2
    torch.testing.assert_close(model(x), before, rtol=1e-2, atol=1e-2)


def test_the_rank_of_a_latency_is_the_largest_that_is_fast_enough():
    """Where time is the number of weights, half of it is half of break-even; where thin layers are slow, it is refused."""

    def weights(arms, spec):
        return [float(sum(p.numel() for p in model.parameters() if p.dim() > 1)) for model, _ in arms]

    start = setup(nn.Sequential(nn.Linear(40, 40), nn.Linear(40, 3)))
    timed = replace(start, context=replace(start.context, time=weights))
    assert LowRank(latency=0.5, only="0")(timed).model[0][0].out_features == 10
    start = setup(nn.Sequential(nn.Linear(40, 40), nn.Linear(40, 3)))
    slow = replace(start, context=replace(start.context, time=lambda arms, spec: [1.0] * len(arms)))
    with pytest.raises(NotApplicable, match=r"0: two thin layers do not take 0\.5 of its time"):
        LowRank(latency=0.5)(slow)
    with pytest.raises(NotApplicable, match="no clock"):
        LowRank(latency=0.5)(setup(nn.Sequential(nn.Linear(40, 40))))
