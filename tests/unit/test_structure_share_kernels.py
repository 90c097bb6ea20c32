"""share_kernels: the best set of kernels, exact where it can be."""

import pytest
import torch
from torch import nn

from quadriga.core.errors import BadInput, NotApplicable
from quadriga.core.setup import Setup
from quadriga.methods.structure.share_kernels import SharedKernels, ShareKernels, bases_by_energy
from quadriga.testing import tiny_cnn, tiny_mlp

torch.set_num_threads(1)


@pytest.mark.parametrize(("bases", "bias"), [(1, True), (3, False), (9, True)])
def test_no_set_of_kernels_fits_better(bases, bias):
    """Eckart-Young: the squared error is the sum of the dropped squared singular values of [kernels, positions]."""
    conv = nn.Conv2d(4, 6, 3, bias=bias).double()
    shared = SharedKernels(conv, bases).double()
    mixed = torch.einsum("oib,bk->oik", shared.mix.weight.reshape(6, 4, bases), shared.basis.flatten(1))
    left = torch.linalg.svdvals(conv.weight.flatten(2).flatten(0, 1))[bases:].square().sum()
    torch.testing.assert_close((mixed - conv.weight.flatten(2)).square().sum(), left, rtol=1e-7, atol=1e-12)


@pytest.mark.parametrize(
    "geometry",
    [
        {"kernel_size": 3, "padding": 1, "stride": 2},
        {"kernel_size": (3, 5), "padding": "same", "dilation": (2, 1), "padding_mode": "circular"},
        {"kernel_size": 2, "padding": "valid"},
    ],
)
def test_with_all_kernels_it_is_the_convolution(geometry):
    conv, x = nn.Conv2d(3, 5, **geometry), torch.randn(2, 3, 9, 11)
    shared = SharedKernels(conv, conv.weight[0, 0].numel())
    torch.testing.assert_close(shared(x), conv(x), rtol=1e-4, atol=1e-5)


def test_kernels_from_a_small_set_are_found():
    weight = torch.einsum("oib,bhw->oihw", torch.randn(6, 4, 2), torch.randn(2, 5, 5))
    assert bases_by_energy(weight, 0.999999) == 2


def test_what_pays_is_replaced_and_the_rest_named():
    model = ShareKernels(bases=4)(Setup.of(tiny_cnn())).model
    assert type(model.conv2) is SharedKernels and model(torch.randn(3, 1, 20, 20)).shape == (3, 4)
    with pytest.raises(NotApplicable, match=r"conv1 has fewer kernels than 20"):
        ShareKernels(bases=20, only="conv1")(Setup.of(tiny_cnn()))
    with pytest.raises(NotApplicable, match=r"conv2 would have \d+ weights with 25 kernels of 25 positions"):
        ShareKernels(bases=25, only="conv2")(Setup.of(tiny_cnn()))
    with pytest.raises(NotApplicable, match="no dense 2-D convolution"):
        ShareKernels()(Setup.of(tiny_mlp()))
    with pytest.raises(BadInput, match="bases"):
        ShareKernels(bases=0)
