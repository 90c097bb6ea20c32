"""replace_head: exact where the old head only looked at means, and near its logits elsewhere."""

from itertools import pairwise

import pytest
import torch
from torch import nn

from quadriga import Workload
from quadriga.core.errors import BadInput, NotApplicable
from quadriga.core.setup import Setup
from quadriga.methods.structure.replace_head import ReplaceHead, least_squares
from quadriga.testing import tiny_cnn, tiny_lstm, tiny_mlp

torch.set_num_threads(1)


def setup_of(net, shape=(3, 8, 8)):
    torch.manual_seed(1)
    x, y = torch.randn(96, *shape), torch.arange(96) % 3
    return Setup.of(Workload(model=net, train=(x, y), val=(x, y), test=(x, y)))


def pooling(*hidden):
    """A head that flattens maps, but whose first matrix is the same at every position."""
    torch.manual_seed(0)
    sizes = [6 * 36, *hidden, 3]
    linears = [nn.Linear(a, b) for a, b in pairwise(sizes)]
    linears[0].weight.data = torch.randn(sizes[1], 6).repeat_interleave(36, 1) / 36
    return nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Flatten(), *linears)


@pytest.mark.parametrize("hidden", [(), (20,), (20, 12)])
def test_a_head_that_sees_only_means_is_found_exactly(hidden):
    setup = setup_of(pooling(*hidden))
    x, sizes = setup.context.example, sum(p.numel() for p in setup.model.parameters())
    before = setup.model(x)
    model = ReplaceHead(kind="pool", dropout=0.3)(setup).model.eval()
    torch.testing.assert_close(model(x), before, rtol=1e-3, atol=1e-3)
    assert sum(p.numel() for p in model.parameters()) == 3 * 6 * 9 + 6 + 6 * 3 + 3 < sizes
    assert [m.p for m in model.modules() if isinstance(m, nn.Dropout)] == [0.3]


def test_dropout_in_the_place_of_a_linear_map_loses_nothing():
    """Two layers without an activation between are one; the second takes over."""
    setup = setup_of(nn.Sequential(nn.Linear(5, 40), nn.Linear(40, 8), nn.ReLU(), nn.Linear(8, 3)), (5,))
    x = setup.context.example
    before = setup.model(x)
    model = ReplaceHead(kind="dropout")(setup).model.eval()
    assert isinstance(model[0], nn.Dropout) and (model[1].in_features, model[1].out_features) == (5, 8)
    torch.testing.assert_close(model(x), before, rtol=1e-2, atol=1e-2)


def test_the_fit_is_least_squares():
    x, y = torch.randn(60, 5).double(), torch.randn(60, 2).double()
    layer = least_squares(x, y, ridge=0.0)
    wanted = torch.linalg.lstsq(torch.cat([x, torch.ones(60, 1).double()], 1), y).solution
    torch.testing.assert_close(torch.cat([layer.weight.data.T, layer.bias.data[None]]), wanted)
    plain = least_squares(x, y, bias=False, ridge=0.0)
    torch.testing.assert_close(plain.weight.data.T, torch.linalg.lstsq(x, y).solution)


def test_constants_in_the_forward_stay_right():
    model = ReplaceHead()(Setup.of(tiny_cnn())).model  # `reshape(-1, 32)`, relu and dropout between its layers
    assert model(torch.randn(5, 1, 20, 20)).shape == (5, 4) and model.fc2.in_features == 8


def test_other_heads_are_refused_by_name_and_left():
    setup = Setup.of(tiny_mlp())
    with pytest.raises(NotApplicable, match="0 does not read flattened maps"):
        ReplaceHead()(setup)
    with pytest.raises(NotApplicable, match="head is the only Linear"):
        ReplaceHead(kind="dropout")(Setup.of(tiny_lstm()))
    few = nn.Sequential(nn.Linear(50, 4), nn.Linear(4, 40), nn.ReLU(), nn.Linear(40, 3))
    with pytest.raises(NotApplicable, match=r"would give way to a head with \+\d+ weights"):
        ReplaceHead(kind="dropout")(setup_of(few, (50,)))
    assert [type(m) for m in few] == [nn.Linear, nn.Linear, nn.ReLU, nn.Linear]
    with pytest.raises(BadInput, match="dropout"):
        ReplaceHead(dropout=1.0)
