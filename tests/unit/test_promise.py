"""What promises equal outputs is held to it when it is applied, and the model's state is its own."""

from dataclasses import dataclass

import pytest
import torch
from torch import nn

from quadriga import Workload
from quadriga.core.errors import NotApplicable
from quadriga.core.method import Family, Method, Numerics
from quadriga.core.recipe import Recipe, step
from quadriga.core.setup import Setup
from quadriga.engine.walk import walk
from quadriga.methods.structure.fold_batchnorm import FoldBatchnorm
from quadriga.testing import fingerprint, tiny_cnn, tiny_mlp
from quadriga.verify.promise import Witness, hold, stirred_copy

torch.set_num_threads(1)


@dataclass(frozen=True, kw_only=True)
class Lies(Method):
    """Change the model as a test says, and promise equal outputs. Source: none."""

    family = Family.STRUCTURE
    numerics = Numerics.CLOSE
    source = "a test"
    change = None

    def apply(self, setup):
        type(self).change(setup.model)
        return setup


def lying(change, numerics=Numerics.CLOSE):
    return type("Lies", (Lies,), {"change": staticmethod(change), "numerics": numerics})()


def shift(model):
    model[0].bias.data.add_(0.01)
    model[2] = nn.Sequential(model[2])
    model.note = "changed"
    model[4].register_buffer("more", torch.ones(1))


def test_a_step_that_breaks_its_promise_is_undone_and_refused():
    setup = Setup.of(tiny_mlp())
    before, names = fingerprint(setup.model), list(vars(setup.model))
    with pytest.raises(NotApplicable, match=r"lies promises close outputs, and they are others: output at batch 4: error"):
        hold(lying(shift), setup)
    assert fingerprint(setup.model) == before and list(vars(setup.model)) == names


def test_a_failing_forward_breaks_the_promise_too():
    setup = Setup.of(tiny_mlp())
    before = fingerprint(setup.model)
    with pytest.raises(NotApplicable, match="the forward fails: mat1 and mat2"):
        hold(lying(lambda model: model.__setitem__(2, nn.Linear(3, 3))), setup)
    assert fingerprint(setup.model) == before


def test_exact_is_bit_by_bit_and_close_is_not():
    by_rounding = lambda model: model[4].bias.data.mul_(1 + 2e-7)  # noqa: E731
    model = Setup.of(tiny_mlp(trained=True)).model
    assert (model[4].bias * (1 + 2e-7) != model[4].bias).any()
    hold(lying(by_rounding), Setup.of(tiny_mlp(trained=True)))
    with pytest.raises(NotApplicable, match="promises exact outputs"):
        hold(lying(by_rounding, Numerics.EXACT), Setup.of(tiny_mlp(trained=True)))


def without_norm(model):
    model.norm = nn.Identity()


def test_fresh_statistics_hide_nothing():
    """A fresh norm is the identity within 5e-6: only random statistics show that it is gone."""
    setup = Setup.of(tiny_cnn())
    witness = Witness(setup.model, setup.context.example)
    without_norm(setup.model)
    assert not witness.broken(setup.model)
    with pytest.raises(NotApplicable, match="promises close outputs"):
        hold(lying(without_norm), Setup.of(tiny_cnn()))


def test_a_step_that_keeps_its_promise_passes_and_statistics_of_its_own_stay():
    setup = Setup.of(tiny_cnn())
    after = hold(FoldBatchnorm(), setup)
    assert isinstance(after.model.norm, nn.Identity)
    assert torch.allclose(after.model.conv1.weight, Setup.of(tiny_cnn()).model.conv1.weight, atol=1e-4)  # not the stirred one


class Restless(nn.Module):
    """Draws numbers and counts its calls in evaluation too."""

    def __init__(self, noise):
        super().__init__()
        self.fc, self.noise = nn.Linear(6, 3), noise
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x):
        self.calls += 1
        return self.fc(x) + self.noise * torch.randn(len(x), 3)


def restless(noise):
    x, y = torch.randn(30, 6), torch.arange(30) % 3
    return Setup.of(Workload(model=lambda: Restless(noise), train=(x, y), val=(x, y), test=(x, y), trained=True))


def test_the_check_changes_neither_generators_nor_buffers_nor_inputs():
    setup = restless(0.0)
    state, calls = torch.get_rng_state(), setup.model.calls.clone()
    hold(lying(lambda model: None), setup)
    assert torch.equal(torch.get_rng_state(), state) and torch.equal(setup.model.calls, calls)


def test_a_random_forward_cannot_be_held_to_outputs():
    worse = lambda model: model.fc.bias.data.add_(1)  # noqa: E731
    with pytest.raises(NotApplicable, match="promises close"):
        hold(lying(worse), restless(0.0))
    hold(lying(worse), restless(1.0))


def test_a_stirred_copy_has_no_constant_vector_and_the_model_keeps_its_own():
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.LayerNorm(3))
    before, copy = fingerprint(net), stirred_copy(net)
    assert fingerprint(net) == before
    assert all(t.unique().numel() > 1 for t in (*copy.parameters(), *copy.buffers()) if t.numel() > 1)
    assert bool((copy[1].running_var > 0.4).all()) and stirred_copy(nn.Linear(2, 2)) is None


def test_a_walk_refuses_a_fold_that_loses_an_activation(monkeypatch):
    """What the issue found in fold_batchnorm: every norm gone, the activation with it, and status "works"."""

    def apply(self, setup):
        without_norm(setup.model)
        return setup

    monkeypatch.setattr(FoldBatchnorm, "apply", apply)
    with pytest.raises(NotApplicable, match="fold_batchnorm promises close outputs"):
        walk(tiny_cnn(trained=True), Recipe((step("fold_batchnorm"),)), seed=0, store=None)
