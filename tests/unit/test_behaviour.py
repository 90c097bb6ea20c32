"""Models that draw random numbers, remember, mix examples or write into data are refused by the check, with a way out."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from quadriga.core.errors import BadInput
from quadriga.core.workload import Workload
from quadriga.workloads import check

torch.set_num_threads(1)
G = torch.Generator().manual_seed(0)
X = torch.randn(900, 6, generator=G)
Y = X[:, :3].argmax(1)
FILE = "test_behaviour.py"


def made(model, **changes):
    splits = {"train": (X[:300], Y[:300]), "val": (X[300:600], Y[300:600]), "test": (X[600:], Y[600:])}
    return Workload(**{"model": model, **splits, **changes})


def refused(model, *words, **changes):
    """Refused with these words, and nothing of the user's data has changed."""
    before, state = X.clone(), torch.get_rng_state()
    with pytest.raises(BadInput) as caught:
        check(made(model, **changes))
    for word in words:
        assert word in str(caught.value), str(caught.value)
    assert torch.equal(X, before) and torch.equal(torch.get_rng_state(), state)
    return str(caught.value)


class Inner(nn.Module):
    """What it does to the hidden units; `way_out` does it as the refusal advises."""

    def __init__(self, way_out=False):
        super().__init__()
        self.way_out = way_out
        self.calls = 0
        self.register_buffer("seen", torch.zeros(()))
        self.generator = torch.Generator().manual_seed(0)

    def forward(self, h):
        return self.act(h)


class Net(nn.Module):
    def __init__(self, inner):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.inner, self.last = nn.Linear(6, 8), inner, nn.Linear(8, 3)

    def forward(self, x):
        return self.last(self.inner(self.first(x)))


# randomness


class Sampling(Inner):
    def act(self, h):
        if self.way_out and not self.training:
            return h
        return h + torch.randn_like(h)


class Dropping(Inner):
    def act(self, h):
        return functional.dropout(h, 0.5, self.training) if self.way_out else functional.dropout(h, 0.5)


class TinyNoise(Inner):
    def act(self, h):
        return h if self.way_out and not self.training else h + 1e-7 * torch.rand_like(h)


class OfNumpy(Inner):
    def act(self, h):
        return h if self.way_out and not self.training else h * float(np.random.rand())


class OfPython(Inner):
    def act(self, h):
        return h if self.way_out and not self.training else h * random.random()


@pytest.mark.parametrize("kind", [Sampling, Dropping, TinyNoise])
def test_random_in_eval_mode(kind):
    text = refused(Net(kind()), "random in eval mode", f"its layer inner ({kind.__name__}) draws", f"{FILE}:", "self.training")
    line = int(text.split(f"{FILE}:")[1].split(";")[0])
    source = Path(__file__).read_text().splitlines()[line - 1]
    assert "rand" in source or "dropout" in source
    assert check(made(Net(kind(way_out=True)))) == []


@pytest.mark.parametrize("kind", [OfNumpy, OfPython])
def test_random_numbers_of_others(kind):
    states = random.getstate(), np.random.get_state()[1].tolist()
    refused(Net(kind()), "random in eval mode", f"its layer inner ({kind.__name__}) draws")
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states
    assert check(made(Net(kind(way_out=True)))) == []


def test_an_autoencoder_that_samples():
    class Vae(nn.Module):
        def __init__(self, mean_in_eval):
            super().__init__()
            torch.manual_seed(0)
            self.encoder, self.decoder, self.mean_in_eval = nn.Linear(6, 4), nn.Linear(2, 6), mean_in_eval

        def forward(self, x):
            mean, log_variance = self.encoder(x).chunk(2, -1)
            if self.mean_in_eval and not self.training:
                return self.decoder(mean)
            return self.decoder(mean + torch.randn_like(mean) * (log_variance / 2).exp())

    data = {n: (x, x) for n, x in (("train", X[:300]), ("val", X[300:600]), ("test", X[600:]))}
    task = {"loss": "squared_error", "metric": "mean_squared_error", **data}
    refused(Vae(False), "the forward of Vae draws random numbers", "use the mean otherwise", **task)
    assert check(made(Vae(True), **task)) == []


def test_dropout_modules_and_rounding_are_not_random():
    assert check(made(Net(nn.Dropout(0.5)))) == []
    torch.set_num_threads(2)
    try:
        wide = nn.Sequential(nn.Linear(6, 700), nn.ReLU(), nn.Linear(700, 3))
        assert check(made(wide)) == []
    finally:
        torch.set_num_threads(1)


# memory


class Counting(Inner):
    def act(self, h):
        if not self.way_out or self.training:
            self.calls += 1
        return h * (1 + self.calls)


class OwnGenerator(Inner):
    def act(self, h):
        if self.way_out and not self.training:
            return h
        return h + torch.randn(h.shape, generator=self.generator)


class Buffering(Inner):
    def act(self, h):
        if not self.way_out or self.training:
            self.seen += 1
        return h


@pytest.mark.parametrize("kind", [Counting, OwnGenerator])
def test_models_that_remember(kind):
    refused(Net(kind()), "second call", f"its layer inner ({kind.__name__})", "if not self.training")
    assert check(made(Net(kind(way_out=True)))) == []


def test_a_buffer_that_counts():
    refused(Net(Buffering()), "changes its buffer inner.seen in eval mode", "only if self.training")
    assert check(made(Net(Buffering(way_out=True)))) == []


def test_a_norm_that_a_forward_leaves_in_training_mode():
    class Restless(nn.BatchNorm1d):
        def forward(self, x):
            self.train()
            return super().forward(x)

    refused(Net(Restless(8)), "fails on inputs [1, 6]", "no train() in a forward")
    maps = nn.Sequential(nn.Unflatten(1, (2, 3)), Restless(2), nn.Flatten(), nn.Linear(6, 3))
    refused(maps, "changes its buffer 1.running_mean in eval mode")


def test_what_is_made_at_the_first_call_and_stays_is_no_memory():
    class Table(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("table", None, persistent=False)

        def forward(self, h):
            if self.table is None:
                self.table = torch.ones(8)
            return h + self.table

    assert check(made(Net(Table()))) == []


# other examples of the batch


class Centring(Inner):
    def act(self, h):
        return h - (h.mean(1, keepdim=True) if self.way_out else h.mean(0))


def test_examples_that_depend_on_each_other():
    refused(Net(Centring()), "depends on the others in its batch", "its layer inner (Centring)", "computed by itself")
    assert check(made(Net(Centring(way_out=True)))) == []


def test_batch_statistics_in_eval_mode():
    norm = nn.BatchNorm1d(8, track_running_stats=False)
    refused(Net(norm), "fails on inputs [1, 6]", "track_running_stats=True")  # one value has no variance
    maps = nn.Sequential(nn.Unflatten(1, (2, 3)), nn.BatchNorm1d(2, track_running_stats=False), nn.Flatten(), nn.Linear(6, 3))
    refused(maps, "depends on the others in its batch", "its layer 1 (BatchNorm1d)", "track_running_stats=True")
    assert check(made(Net(nn.BatchNorm1d(8)))) == []


# writing


class Standard(nn.Module):
    def __init__(self, way_out=False):
        super().__init__()
        self.way_out = way_out

    def forward(self, x):
        return (x - 0.5) / 2 if self.way_out else x.sub_(0.5).div_(2)


class Hidden(Standard):
    def forward(self, x):
        x = x.clone() if self.way_out else x
        x.data.mul_(2)
        return x


class ByNumpy(Standard):
    def forward(self, x):
        x = x.clone() if self.way_out else x
        x.numpy()[:] *= 2
        return x


class InTraining(Standard):
    def forward(self, x):
        return x.mul_(2) if self.training and not self.way_out else x * 2


@pytest.mark.parametrize("kind", [Standard, Hidden, InTraining])
def test_models_that_write_into_their_input(kind):
    mode = " in training mode" if kind is InTraining else ""
    words = f"its layer 0 ({kind.__name__}) changes the model's input in place{mode}", "x = x.clone()"
    refused(nn.Sequential(kind(), nn.Linear(6, 3)), *words, f"at {__file__}:")
    assert check(made(nn.Sequential(kind(way_out=True), nn.Linear(6, 3)))) == []


def test_a_write_past_pytorch():
    refused(nn.Sequential(ByNumpy(), nn.Linear(6, 3)), "its layer 0 (ByNumpy) changes the model's input in place")


def test_an_activation_in_place():
    refused(nn.Sequential(nn.ReLU(inplace=True), nn.Linear(6, 3)), "its layer 0 (ReLU) changes", "inplace=False")
    assert check(made(nn.Sequential(nn.ReLU(inplace=False), nn.Linear(6, 3)))) == []
    assert check(made(nn.Sequential(nn.Linear(6, 3), nn.ReLU(inplace=True)))) == []


def loss_on_output(output, target):
    return functional.cross_entropy(output.sub_(1.0), target)


def loss_on_target(output, target):
    return functional.cross_entropy(output, target.clamp_(max=1))


def metric_on_output(output, target):
    return (output.neg_().argmin(1) == target).float()


def metric_on_target(output, target):
    target += 1
    return (output.argmax(1) + 1 == target).float()


@pytest.mark.parametrize("function", [loss_on_output, loss_on_target, metric_on_output, metric_on_target])
def test_losses_and_metrics_that_write(function):
    what, _, into = function.__name__.partition("_on_")
    model = nn.Sequential(nn.Linear(6, 3))
    words = f"the {what}", f"changes its {into} in place at {__file__}:", f"begin with {into} = {into}.clone()"
    refused(model, *words, **{what: function})

    def way_out(output, target):
        return function(output.clone(), target.clone())

    assert check(made(model, **{what: way_out})) == []
