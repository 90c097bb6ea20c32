"""prune_hidden: idle hidden units go, and the stream between blocks keeps its width."""

import pytest
import torch
from torch import nn

from quadriga import Workload
from quadriga.core.axes import AxisGraph
from quadriga.core.batch import call, tensors
from quadriga.core.errors import BadInput, NotApplicable
from quadriga.core.setup import Setup
from quadriga.methods.structure.prune_hidden import PruneHidden, hidden_groups
from quadriga.testing import tiny_lstm, tiny_mlp, tiny_transformer
from quadriga.testing.setups import trained_setup
from quadriga.testing.zoo import ZOO


def outputs(setup):
    with torch.no_grad():
        return tensors(call(setup.model.eval(), setup.context.example))[0]


@pytest.mark.parametrize("name", ZOO)
def test_idle_hidden_units_go_and_nothing_changes(name):
    """A quarter of each block's units is silenced; that quarter goes, and the model computes what it did."""
    setup = Setup.of(ZOO[name]())
    groups = hidden_groups(AxisGraph.trace(setup.model, setup.context.example), "*.layers.*,*.layer.*,*.h.*")
    assert len(groups) >= 3
    with torch.no_grad():
        for member in (m for g in groups for m in g.members):
            idle = (
                (member.units % 4 == 1)
                .to(member.tensor.dtype)
                .reshape([-1 if k == member.dim else 1 for k in range(member.tensor.dim())])
            )
            member.tensor.mul_(1 - idle * (0.999 if member.producer else 1))
    before, sizes = outputs(setup), {g.name: g.size for g in groups}
    setup = PruneHidden(ratio=0.25, only=",".join(sizes))(setup)
    now = {g.name: g.size for g in AxisGraph.trace(setup.model, setup.context.example).groups()}
    assert {n: now[n] for n in sizes} == {n: s * 3 // 4 for n, s in sizes.items()}
    torch.testing.assert_close(outputs(setup), before, rtol=1e-4, atol=1e-5)


class Residual(nn.Module):
    """A perceptron with a stem, a residual block and a head."""

    def __init__(self):
        super().__init__()
        self.stem, self.up, self.down, self.head = nn.Linear(6, 8), nn.Linear(8, 16), nn.Linear(16, 8), nn.Linear(8, 3)

    def forward(self, x):
        x = self.stem(x)
        return self.head(x + self.down(self.up(x).relu()))


def residual():
    x, y = torch.randn(64, 6), torch.arange(64) % 3
    return Workload(model=Residual(), train=(x, y), val=(x, y), test=(x, y))


def test_a_residual_stream_keeps_its_width():
    model = PruneHidden(ratio=0.5)(Setup.of(residual())).model
    assert [m.out_features for m in (model.stem, model.up, model.down, model.head)] == [8, 8, 8, 3]


@pytest.mark.parametrize("importance", ["magnitude", "taylor", "hessian"])
def test_every_importance_spares_the_units_that_matter(importance):
    """Units whose output weights are zero neither move the loss nor have curvature in them."""
    setup = trained_setup(tiny_mlp)
    with torch.no_grad():
        setup.model[2].weight[:, ::2] = 0
        setup.model[0].weight[::2] *= 1e-3
    before = outputs(setup)
    after = PruneHidden(ratio=0.5, importance=importance, only="0")(setup)
    torch.testing.assert_close(outputs(after), before, rtol=1e-5, atol=1e-6)


def test_global_takes_more_where_less_is_lost():
    setup = Setup.of(tiny_transformer())
    with torch.no_grad():
        setup.model.blocks[0].up.weight[8:] *= 1e-4
        setup.model.blocks[0].down.weight[:, 8:] *= 1e-4
    model = PruneHidden(ratio=0.5, scope="global")(setup).model
    assert model.blocks[0].up.out_features < model.blocks[1].up.out_features


def test_without_feed_forward_layers_it_refuses_and_says_what_is_there():
    with pytest.raises(NotApplicable, match="lstm: 12 recurrent"):
        PruneHidden()(Setup.of(tiny_lstm()))


@pytest.mark.parametrize("fields", [{"ratio": 0.0}, {"ratio": 1.0}, {"round_to": 0}])
def test_bad_fields(fields):
    with pytest.raises(BadInput, match=next(iter(fields))):
        PruneHidden(**fields)
