"""SmoothQuant: the function stays, outliers go, and what something else reads is left alone."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from quadriga.core.batch import Batch
from quadriga.core.errors import BadInput, NotApplicable
from quadriga.core.setup import Setup
from quadriga.core.workload import Workload
from quadriga.methods.hardware._simulate import products, roundings, squared_error, watch
from quadriga.methods.hardware.smooth_quant import SmoothQuant, balance, readers


class Blocks(nn.Module):
    """Two residual blocks that normalize first; the gain of one channel is large, and the weights that read it are small."""

    def __init__(self, kind=nn.LayerNorm, outlier=60.0, post=False):
        super().__init__()
        self.norms = nn.ModuleList([kind(16), kind(16)])
        self.ups, self.gates = (nn.ModuleList([nn.Linear(16, 24) for _ in range(2)]) for _ in range(2))
        self.downs, self.head, self.post = nn.ModuleList([nn.Linear(24, 16) for _ in range(2)]), nn.Linear(16, 4), post
        with torch.no_grad():
            for norm, up, gate in zip(self.norms, self.ups, self.gates, strict=True):
                norm.weight[3] = outlier
                up.weight[:, 3] /= outlier
                gate.weight[:, 3] /= outlier

    def forward(self, x):
        for norm, up, gate, down in zip(self.norms, self.ups, self.gates, self.downs, strict=True):
            y = norm(x)
            x = (y if self.post else x) + down(torch.relu(up(y)) * torch.sigmoid(gate(y)))
        return self.head(x)


def setup_of(model):
    torch.manual_seed(3)
    splits = [(torch.randn(128, 16), torch.randint(4, (128,))) for _ in range(3)]
    return Setup.of(Workload(model=model, train=splits[0], val=splits[1], test=splits[2], trained=True))


@pytest.fixture(autouse=True)
def _seed():
    torch.set_num_threads(1)
    torch.manual_seed(0)


def int8_error(setup):
    model, batches = setup.model, setup.context.calibration
    return squared_error(model, roundings(watch(model, products(model), batches), "static"), batches) ** 0.5


@pytest.mark.parametrize("kind", [nn.LayerNorm, nn.RMSNorm])
def test_the_function_stays_and_int8_gets_better(kind):
    setup = setup_of(Blocks(kind))
    x = setup.context.calibration[0].inputs
    with torch.no_grad():
        before, error = setup.model(x), int8_error(setup)
        after = SmoothQuant()(setup)
        torch.testing.assert_close(after.model(x), before, rtol=1e-4, atol=1e-5)
    assert int8_error(after) < 0.5 * error


def test_it_balances_the_largest_values_of_both_sides():
    """With alpha = 0.5 both sides have the same largest value in each channel."""
    torch.manual_seed(0)
    largest, weight = torch.rand(6) * 50, torch.randn(5, 6)
    factor = balance(largest, [weight], 0.5)
    torch.testing.assert_close(largest / factor, (weight * factor).abs().amax(0))
    assert torch.equal(balance(torch.tensor([0.0, 3.0]), [torch.zeros(2, 2)], 0.5), torch.ones(2))


def test_all_readers_of_a_normalization_are_found():
    model = Blocks()
    data = [Batch(torch.randn(4, 16), torch.zeros(4), torch.arange(4))]
    found = readers(model, data)
    assert [[id(m) for m in one.layers] for one in found] == [
        [id(up), id(gate)] for up, gate in zip(model.ups, model.gates, strict=True)
    ]


def test_what_something_else_reads_is_left_as_it_was():
    """Where the sum takes the normalized values too, scaling them would change the network."""
    setup = setup_of(Blocks(post=True))
    before = [p.clone() for p in setup.model.parameters()]
    with pytest.raises(NotApplicable, match="read by linear layers alone"):
        SmoothQuant()(setup)
    assert all(torch.equal(a, b) for a, b in zip(before, setup.model.parameters(), strict=True))


def test_a_share_beyond_one_is_refused():
    with pytest.raises(BadInput, match=r"smooth_quant\.alpha is 1\.5"):
        SmoothQuant(alpha=1.5)
