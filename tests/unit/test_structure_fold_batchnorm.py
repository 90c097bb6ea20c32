"""fold_batchnorm: the same function with fewer layers."""

import pytest
import torch
from torch import nn

from quadriga import Workload
from quadriga.core.errors import NotApplicable
from quadriga.core.setup import Setup
from quadriga.methods.structure.fold_batchnorm import FoldBatchnorm
from quadriga.testing import tiny_cnn, tiny_mlp
from quadriga.workloads import load

torch.set_num_threads(1)


def stirred(model):
    """Norms with statistics and scales as training leaves them."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_(), module.running_var.uniform_(0.5, 2)
            if module.affine:
                nn.init.normal_(module.weight), nn.init.normal_(module.bias)
    return model.eval()


def setup_of(net, *shape):
    x, y = torch.randn(32, *shape), torch.arange(32) % 3
    return Setup.of(Workload(model=net, train=(x, y), val=(x, y), test=(x, y)))


@pytest.mark.parametrize(
    "net",
    [
        nn.Sequential(
            nn.Conv2d(3, 8, 3, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 4, 3, groups=2),
            nn.BatchNorm2d(4, affine=False),
            nn.Flatten(),
            nn.Linear(64, 5),
            nn.BatchNorm1d(5),
            nn.Linear(5, 3),
        ),
        nn.Sequential(
            nn.ConvTranspose2d(3, 5, 2, stride=2), nn.BatchNorm2d(5), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 3)
        ),
    ],
)
def test_outputs_stay(net):
    setup = setup_of(net, 3, 8, 8)
    stirred(setup.model)
    x = torch.randn(6, 3, 8, 8)
    before = setup.model(x)
    model = FoldBatchnorm()(setup).model
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())
    torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-5)
    model(x).square().mean().backward()  # it still trains
    assert all(p.grad is not None for p in model.parameters())


def test_a_residual_network_folds_whole():
    setup = Setup.of(load("resnet20_fashion"))
    stirred(setup.model)
    x = setup.context.example
    before = setup.model(x).detach()
    model = FoldBatchnorm()(setup).model
    assert not any(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    torch.testing.assert_close(model(x), before, rtol=1e-3, atol=1e-3 * float(before.abs().max()))


class Read(nn.Module):
    """The convolution's output is read beside the norm."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 3)

    def forward(self, x):
        y = self.conv(x)
        return self.head((self.norm(y) + y).mean((2, 3)))


def test_what_reads_the_layer_too_keeps_the_norm():
    with pytest.raises(NotApplicable, match="norm does not follow a layer of its own"):
        FoldBatchnorm()(setup_of(Read(), 3, 8, 8))
    with pytest.raises(NotApplicable, match="no batch normalization"):
        FoldBatchnorm()(Setup.of(tiny_mlp()))
    assert isinstance(FoldBatchnorm()(Setup.of(tiny_cnn())).model.norm, nn.Identity)
