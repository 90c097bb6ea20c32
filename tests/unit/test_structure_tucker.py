"""tucker: exact at the true ranks, orthogonal factors, and only where it pays."""

import pytest
import torch
from torch import nn

from quadriga import Workload
from quadriga.core.errors import BadInput, NotApplicable
from quadriga.core.setup import Setup
from quadriga.methods.structure import tucker
from quadriga.methods.structure.tucker import Tucker, ranks_by_energy, tucker2, weights_share
from quadriga.testing import tiny_cnn, tiny_mlp

pytest.importorskip("tensorly")
torch.set_num_threads(1)


@pytest.mark.parametrize("mode", ["zeros", "circular"])
def test_a_convolution_of_low_multilinear_rank_is_found_exactly(mode):
    torch.manual_seed(0)
    conv = nn.Conv2d(6, 10, (3, 5), stride=2, padding=(1, 2), padding_mode=mode).double()
    core, left, right = torch.randn(4, 3, 3, 5).double(), torch.randn(10, 4).double(), torch.randn(6, 3).double()
    conv.weight.data = torch.einsum("abhw,oa,ib->oihw", core, left, right)
    assert ranks_by_energy(conv.weight.data, 1 - 1e-12) == (4, 3)
    x = torch.randn(2, 6, 9, 11).double()
    y = x
    for layer in tucker2(conv, (4, 3)):
        y = layer(y)
    torch.testing.assert_close(y, conv(x))


def test_the_error_is_that_of_a_projection():
    """With orthonormal factors, squares of core and error add up to the weight's; truncated HOSVD is no better."""
    torch.manual_seed(0)
    conv = nn.Conv1d(8, 12, 3).double()
    first, middle, last = tucker2(conv, (5, 4))
    near = torch.einsum("abk,oa,bi->oik", middle.weight, last.weight.flatten(1), first.weight.flatten(1))
    whole = conv.weight.square().sum()
    torch.testing.assert_close((near - conv.weight).square().sum(), whole - middle.weight.square().sum())
    u, v = (torch.linalg.svd(conv.weight.movedim(m, 0).flatten(1))[0][:, :r] for m, r in ((0, 5), (1, 4)))
    hosvd = torch.einsum("oik,oa,ib->abk", conv.weight, u, v).square().sum()
    assert middle.weight.square().sum() >= hosvd - 1e-9


def test_it_replaces_what_pays_and_names_what_does_not():
    x, y = torch.randn(8, 3, 8, 8), torch.arange(8) % 3
    net = nn.Sequential(nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 1), nn.Conv2d(16, 4, 3), nn.Flatten(), nn.Linear(64, 3))
    start = Setup.of(Workload(model=net, train=(x, y), val=(x, y), test=(x, y)))
    model = Tucker(ratio=0.5, round_to=1)(start).model
    assert [type(m).__name__ for m in model] == ["Sequential", "Conv2d", "Sequential", "Flatten", "Linear"]
    assert weights_share(net[2].weight, (2, 8)) == sum(p.numel() for n, p in model[2].named_parameters() if "weight" in n) / 576
    with pytest.raises(NotApplicable, match=r"1 has a kernel of one position"):
        Tucker(ratio=0.5, only="1")(Setup.of(Workload(model=net, train=(x, y), val=(x, y), test=(x, y))))
    with pytest.raises(NotApplicable, match=r"conv1 would have .* of its weights at ranks"):
        Tucker(energy=0.9999)(Setup.of(tiny_cnn()))
    with pytest.raises(NotApplicable, match="no dense convolution"):
        Tucker()(Setup.of(tiny_mlp()))
    with pytest.raises(BadInput, match="energy"):
        Tucker(energy=1.0)


def test_without_tensorly_it_names_the_extra(monkeypatch):
    monkeypatch.setattr(tucker, "find_spec", lambda name: None)
    with pytest.raises(NotApplicable, match="tensorly"):
        Tucker()(Setup.of(tiny_cnn()))
