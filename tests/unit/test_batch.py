"""The mode of a model during and after an evaluation."""

import pytest
import torch
from torch import nn

from quadriga.core.batch import Batch, evaluating
from quadriga.train.gradients import fisher_diagonal


class Keeping(nn.Module):
    """Keeps a tensor from its first evaluation until it trains, as LeViT keeps its attention biases."""

    def __init__(self):
        super().__init__()
        self.weight, self.kept = nn.Parameter(torch.ones(3)), {}

    def train(self, mode=True):
        if mode:
            self.kept.clear()
        return super().train(mode)

    def forward(self, x):
        if self.training:
            return x * self.weight.exp()
        if not self.kept:
            self.kept[0] = self.weight.exp()
        return x * self.kept[0]


@pytest.mark.parametrize("training", [True, False])
def test_what_a_model_keeps_from_evaluation_does_not_outlive_it(training):
    net, x = Keeping().train(training), torch.ones(2, 3)
    with evaluating(net), torch.no_grad():
        net(x)
    assert net.training is training and not net.kept
    with torch.no_grad():
        net.weight.zero_()
        assert torch.equal(net.eval()(x), x)


def test_gradients_of_a_model_that_keeps_tensors_from_evaluation():
    net = Keeping().eval()
    batches = [Batch(torch.ones(2, 3), torch.zeros(2, 3), torch.arange(2))] * 2
    found = fisher_diagonal(net, lambda output, batch: output.sum(1), batches)
    assert torch.allclose(found["weight"], torch.full((3,), torch.e**2))


def test_modes_of_single_modules_are_given_back():
    net = nn.Sequential(nn.BatchNorm1d(3).eval(), nn.Dropout())
    with evaluating(net):
        assert not any(m.training for m in net.modules())
    assert [m.training for m in net.modules()] == [True, False, True]
