"""Torch-Pruning as the oracle: where it works, cutting the same channels leaves the same weights."""

from copy import deepcopy

import pytest
import torch
from torch import nn
from torch.nn import functional

from quadriga.core.axes import AxisGraph
from quadriga.workloads.ready.resnet20_fashion import workload as resnet20

tp = pytest.importorskip("torch_pruning")
pytestmark = pytest.mark.filterwarnings("ignore")
torch.set_num_threads(1)


class Branches(nn.Module):
    """A concatenation, a depthwise convolution, a residual sum, group norm, and a flattened map before the head."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(3, 6, 1)
        self.mix, self.norm = nn.Conv2d(14, 12, 1), nn.BatchNorm2d(12)
        self.deep, self.point = nn.Conv2d(12, 12, 3, padding=1, groups=12), nn.Conv2d(12, 12, 1)
        self.fc, self.head = nn.Linear(12 * 16, 10), nn.Linear(10, 3)

    def forward(self, x):
        x = self.norm(self.mix(torch.cat([functional.relu(self.a(x)), self.b(x)], 1)))
        x = x + self.point(functional.relu(self.deep(x)))
        return self.head(functional.relu(self.fc(functional.adaptive_avg_pool2d(x, 4).flatten(1))))


class Up(nn.Module):
    """A transposed convolution between two others."""

    def __init__(self):
        super().__init__()
        self.down, self.up, self.last = nn.Conv2d(3, 8, 3), nn.ConvTranspose2d(8, 6, 2, stride=2), nn.Conv2d(6, 2, 3)

    def forward(self, x):
        return self.last(functional.relu(self.up(functional.relu(self.down(x)))))


CASES = {
    "branches": (Branches, (3, 8, 8)),
    "up": (Up, (3, 8, 8)),
    "resnet20": (lambda: resnet20().build(0), (1, 32, 32)),
    "mlp": (lambda: nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 7), nn.Tanh(), nn.Linear(7, 2)), (6,)),
}


@pytest.mark.parametrize("name", CASES)
def test_every_width_is_cut_as_torch_pruning_cuts_it(name):
    build, shape = CASES[name]
    torch.manual_seed(0)
    model, x = build().eval(), torch.randn(2, *shape)
    widths = [g.name for g in AxisGraph.trace(model, x).groups() if not g.fixed]
    assert widths
    for width in widths:
        ours, theirs = deepcopy(model), deepcopy(model)
        graph = AxisGraph.trace(ours, x)
        group = graph.group(width)
        gone = [0, group.size - 2]
        graph.cut(group, torch.tensor([k for k in range(group.size) if k not in gone]))
        layer = theirs.get_submodule(width)
        cut = tp.prune_linear_out_channels if isinstance(layer, nn.Linear) else tp.prune_conv_out_channels
        tp.DependencyGraph().build_dependency(theirs, x).get_pruning_group(layer, cut, idxs=gone).prune()
        wanted, found = theirs.state_dict(), ours.state_dict()
        assert all(torch.equal(wanted[k], found[k]) for k in wanted), width
        torch.testing.assert_close(ours(x), theirs(x))
