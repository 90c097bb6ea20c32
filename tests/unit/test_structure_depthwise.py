"""depthwise: the best fit for each channel, and exact where it can be."""

import pytest
import torch
from torch import nn

from quadriga import Workload
from quadriga.core.errors import BadInput, NotApplicable
from quadriga.core.setup import Setup
from quadriga.methods.structure.depthwise import Depthwise, separate, weights_ratio
from quadriga.testing import tiny_cnn, tiny_mlp

torch.set_num_threads(1)


def dense(first, second):
    """The dense weight [out, in, k…] of the two layers."""
    inside = first.groups
    point = second.weight.flatten(1).reshape(len(second.weight), inside, -1)
    return torch.einsum("oir,irk->oik", point, first.weight.flatten(1).reshape(inside, point.shape[2], -1))


@pytest.mark.parametrize("rank", [1, 2, 5])
def test_it_is_the_best_fit_of_its_rank(rank):
    """The squared error is what Eckart and Young leave in each channel."""
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 7, 3).double()
    error = (dense(*separate(conv, rank)) - conv.weight.flatten(2)).square().sum()
    torch.testing.assert_close(error, torch.linalg.svdvals(conv.weight.flatten(2).transpose(0, 1))[:, rank:].square().sum())


@pytest.mark.parametrize(
    "build",
    [
        lambda: (nn.Conv2d(3, 16, 3, stride=2, padding=1, dilation=2, padding_mode="reflect"), torch.randn(2, 3, 11, 9)),
        lambda: (nn.Conv1d(4, 9, 5, padding="same", bias=False), torch.randn(2, 4, 13)),
    ],
)
def test_with_a_kernel_for_each_position_it_is_the_dense_layer(build):
    conv, x = build()
    first, second = separate(conv, conv.weight[0, 0].numel())
    torch.testing.assert_close(second(first(x)), conv(x), rtol=1e-4, atol=1e-5)


def test_it_counts_the_weights_that_are_there():
    conv = nn.Conv2d(8, 64, 3, bias=False)
    parts = separate(conv, 2)
    assert weights_ratio(conv.weight, 2) == sum(p.numel() for m in parts for p in m.parameters()) / conv.weight.numel()


def images(net):
    x, y = torch.randn(8, 3, 8, 8), torch.arange(8) % 3
    return Setup.of(Workload(model=net, train=(x, y), val=(x, y), test=(x, y)))


def test_it_replaces_what_pays_and_names_what_does_not():
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 3, groups=2), nn.Flatten(), nn.Linear(32, 3)
    )
    model = Depthwise()(images(net)).model
    assert [type(m).__name__ for m in model] == ["Conv2d", "Sequential", "Conv2d", "Conv2d", "Flatten", "Linear"]
    with pytest.raises(NotApplicable, match=r"0 has 3 input channels.*2 has a kernel of one position"):
        Depthwise(only="0,2")(
            images(nn.Sequential(*net[:1], nn.Identity(), nn.Conv2d(8, 8, 1), nn.Flatten(), nn.Linear(288, 3)))
        )
    assert Depthwise(only="conv2")(Setup.of(tiny_cnn())).model.conv2[0].groups == 4
    with pytest.raises(NotApplicable, match="no dense convolution"):
        Depthwise()(Setup.of(tiny_mlp()))
    with pytest.raises(BadInput, match="rank"):
        Depthwise(rank=0)
