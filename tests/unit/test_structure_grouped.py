"""grouped: the regression of every output on its own inputs."""

import pytest
import torch
from torch import nn

from quadriga import Workload
from quadriga.core.errors import BadInput, NotApplicable
from quadriga.core.setup import Setup
from quadriga.methods.structure._moments import Moments, rows
from quadriga.methods.structure.grouped import Grouped, in_groups
from quadriga.testing import tiny_mlp

torch.set_num_threads(1)


def seen(conv, x):
    found = rows(conv, x)
    width = found.shape[1]
    moments = Moments(torch.zeros(width, dtype=torch.float64), torch.zeros(width, width, dtype=torch.float64))
    for part in found.split(50):
        moments.add(part)
    return moments


@pytest.mark.parametrize("bias", [True, False])
def test_it_is_the_least_squares_fit(bias):
    """torch.linalg.lstsq finds the same weights, and the same intercept, for each group."""
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 6, 3, padding=1, stride=2, bias=bias).double()
    x = torch.randn(30, 4, 6, 6).double().cumsum(1) + 1
    new = in_groups(conv, 2, seen(conv, x))
    patches, wanted = rows(conv, x), conv(x).movedim(1, -1).reshape(-1, 6)
    for g, part in enumerate(patches.chunk(2, 1)):
        known = torch.cat([part, torch.ones(len(part), 1).double()], 1) if bias else part
        found = torch.linalg.lstsq(known, wanted[:, 3 * g : 3 * g + 3]).solution
        torch.testing.assert_close(new.weight[3 * g : 3 * g + 3].flatten(1).T, found[: part.shape[1]], rtol=1e-3, atol=1e-3)
        if bias:
            torch.testing.assert_close(new.bias[3 * g : 3 * g + 3], found[-1], rtol=1e-3, atol=1e-3)


def test_weights_that_are_block_diagonal_are_kept():
    torch.manual_seed(0)
    grouped = nn.Conv1d(4, 4, 3, groups=2)
    conv = nn.Conv1d(4, 4, 3)
    conv.weight.data.zero_()
    conv.weight.data[:2, :2], conv.weight.data[2:, 2:] = grouped.weight.data[:2], grouped.weight.data[2:]
    x = torch.randn(40, 4, 9)
    torch.testing.assert_close(in_groups(conv, 2, seen(conv, x))(x), conv(x), rtol=1e-3, atol=1e-4)


def test_what_does_not_divide_is_named():
    x, y = torch.randn(32, 3, 8, 8), torch.arange(32) % 3
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(128, 3))
    start = Setup.of(Workload(model=net, train=(x, y), val=(x, y), test=(x, y)))
    model = Grouped(groups=4, round_to=1)(start).model
    assert (model[0].groups, model[2].groups, tuple(model[2].weight.shape)) == (1, 4, (8, 2, 3, 3))
    with pytest.raises(NotApplicable, match=r"0 \(3 → 8 channels\) does not divide into 4 groups"):
        Grouped(groups=4, only="0")(start)
    with pytest.raises(NotApplicable, match="no dense convolution"):
        Grouped()(Setup.of(tiny_mlp()))
    with pytest.raises(BadInput, match="groups"):
        Grouped(groups=1)
