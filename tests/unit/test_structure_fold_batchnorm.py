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


class Act(nn.BatchNorm2d):
    """A norm that holds its activation, as timm's do."""

    def __init__(self, width, act):
        super().__init__(width)
        self.drop, self.act = nn.Identity(), act

    def forward(self, x):
        return self.act(self.drop(super().forward(x)))


class Frozen(nn.Module):
    """A norm of another base, whose vectors are all buffers, with an activation that is no module."""

    def __init__(self, width):
        super().__init__()
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.rand(width) + 0.5)

    def forward(self, x):
        return nn.functional.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias).relu()


class Same(nn.Conv2d):
    """Pads by itself, and uses weight and bias as they are."""

    def forward(self, x):
        x = nn.functional.pad(x, (0, 1, 0, 1))
        return nn.functional.conv2d(x, self.weight, self.bias, self.stride)


class Standardized(nn.Conv2d):
    """Its weight is computed."""

    def forward(self, x):
        return self._conv_forward(x, self.weight - self.weight.mean((1, 2, 3), keepdim=True), self.bias)


class Deaf(nn.Conv2d):
    """Has no bias and would not use one."""

    def forward(self, x):
        return self._conv_forward(x, self.weight, None)


def net_of(*layers):
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LazyLinear(3))


def folded(net, *shape):
    """The model afterwards, with equal outputs, and what it was before."""
    net(torch.randn(2, *shape))  # lazy layers
    setup = setup_of(net, *shape)
    stirred(setup.model)
    x = torch.randn(5, *shape)
    with torch.no_grad():
        before = setup.model(x)
        model = FoldBatchnorm()(setup).model
        torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-5)
    return model


def test_the_activation_of_a_norm_stays():
    model = folded(
        net_of(nn.Conv2d(3, 6, 3, bias=False), Act(6, nn.ReLU(inplace=True)), Same(6, 4, 3, 2), Act(4, nn.SiLU())), 3, 9, 9
    )
    assert [type(m) for m in (model[1], model[3])] == [nn.ReLU, nn.SiLU]
    assert model[0].bias is not None


def test_only_what_the_operators_show_is_folded():
    """A weight that is computed, an activation that is no part, a bias that is not used: left, the others are folded."""
    odd = [
        (Standardized(3, 4, 3), nn.BatchNorm2d(4)),
        (nn.Conv2d(3, 4, 3), Frozen(4)),
        (Deaf(3, 4, 3, bias=False), nn.BatchNorm2d(4)),
    ]
    for layer, norm in odd:
        model = folded(net_of(nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3), layer, norm), 3, 9, 9)
        assert isinstance(model[1], nn.Identity) and type(model[3]) is type(norm)


@pytest.mark.parametrize(
    ("layers", "words"),
    [
        ((Standardized(3, 4, 3), nn.BatchNorm2d(4)), "1 follows 0, which computes its weight"),
        ((nn.Conv2d(3, 4, 3), Frozen(4)), "1 is a Frozen that computes more than a normalization"),
        ((Deaf(3, 4, 3, bias=False), nn.BatchNorm2d(4)), "1 cannot be folded: output at batch 4"),
        ((nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False)), "none has running statistics"),
    ],
)
def test_what_is_left_is_said(layers, words):
    net = net_of(*layers)
    net(torch.randn(2, 3, 9, 9))
    setup = setup_of(net, 3, 9, 9)
    stirred(setup.model) if "none" not in words else None
    with pytest.raises(NotApplicable, match=words):
        FoldBatchnorm()(setup)


def test_a_norm_over_positions_is_no_norm_over_features():
    """As many positions as features: the widths agree, and the norm runs along the other axis."""
    net = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Flatten(), nn.Linear(16, 3))
    with pytest.raises(NotApplicable, match="1 does not normalize the outputs of 0 one by one"):
        FoldBatchnorm()(setup_of(net, 4, 5))


class Counted(nn.Sequential):
    """Counts how often it is called."""

    calls = 0

    def forward(self, x):
        Counted.calls += 1
        return super().forward(x)


def calls(depth):
    layers = [m for _ in range(depth) for m in (nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3))]
    setup = setup_of(Counted(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten()), 3, 8, 8)
    Counted.calls = 0
    FoldBatchnorm()(setup)
    return Counted.calls


def test_the_network_runs_as_often_for_one_norm_as_for_many():
    assert calls(1) == calls(12)
