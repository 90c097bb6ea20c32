"""Mean gradients and the Fisher diagonal, against closed forms."""

import torch
from torch import nn

from quadriga.core.batch import Batch
from quadriga.train.gradients import fisher_diagonal, mean_gradients


def regression():
    """A linear model without bias, half the squared error: the gradient of an example is (w·x − y) x."""
    torch.manual_seed(0)
    model, x, y = nn.Linear(3, 1, bias=False).double(), torch.randn(10, 3).double(), torch.randn(10).double()
    batches = [Batch(x[i], y[i], i) for i in torch.arange(10).split(4)]
    return model, lambda out, batch: (out.squeeze(1) - batch.target).square() / 2, batches, x, y


def test_mean_gradients_weigh_every_example_alike():
    model, loss, batches, x, y = regression()
    residual = x @ model.weight.detach()[0] - y
    torch.testing.assert_close(mean_gradients(model, loss, batches)["weight"][0], (residual[:, None] * x).mean(0))
    assert model.weight.grad is None


def test_the_fisher_diagonal_squares_before_it_averages():
    model, loss, batches, x, y = regression()
    residual = x @ model.weight.detach()[0] - y
    squares = (residual[:, None] * x).square()
    torch.testing.assert_close(fisher_diagonal(model, loss, batches)["weight"][0], squares.mean(0))
    torch.testing.assert_close(fisher_diagonal(model, loss, batches, examples=5)["weight"][0], squares[:5].mean(0))
