"""L1 against the lasso's solution by coordinate descent; L2 coupled and decoupled, told apart; overflow and resumption."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional

from quadriga.core.errors import NotApplicable
from quadriga.core.setup import Setup
from quadriga.methods.optimizer.cautious_decay import CautiousDecay
from quadriga.methods.optimizer.decay_schedule import DecaySchedule
from quadriga.methods.optimizer.group_lasso import GroupLasso
from quadriga.methods.optimizer.l1 import L1, soft_threshold
from quadriga.methods.optimizer.l2 import L2
from quadriga.methods.optimizer.optimizer import Optimizer
from quadriga.methods.optimizer.stable_decay import StableDecay
from quadriga.methods.training.schedule import Schedule
from quadriga.testing import fingerprint, tiny_cnn, tiny_mlp
from quadriga.train.loop import fit

torch.set_num_threads(1)
PENALTIES = (
    L1(amount=1e-3),
    L2(amount=0.1),
    L2(amount=0.1, form="decoupled"),
    CautiousDecay(amount=0.1),
    StableDecay(),
    GroupLasso(),
)


def made(model, *methods):
    """The optimizer of a model after some methods."""
    setup = Setup.of(tiny_mlp())
    for method in methods:
        setup = method(setup)
    return setup.optimizer.make(model)


def regression(examples=40, features=12):
    """A design with correlated columns, and targets that three of them explain."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(examples, features, generator=generator, dtype=torch.float64)
    x = x + 0.5 * x.roll(1, 1)
    truth = torch.zeros(features, dtype=torch.float64)
    truth[[1, 4, 7]] = torch.tensor([2.0, -1.0, 0.5], dtype=torch.float64)
    return x, x @ truth + 0.1 * torch.randn(examples, generator=generator, dtype=torch.float64)


def coordinate_descent(x, y, amount, sweeps=500):
    """The lasso ½ |y - x w|² / n + amount |w|₁, one coordinate after the other (Friedman et al. 2007)."""
    w, n = torch.zeros(x.shape[1], dtype=x.dtype), len(y)
    for _ in range(sweeps):
        for j in range(len(w)):
            inner = x[:, j] @ (y - x @ w + x[:, j] * w[j]) / n
            w[j] = functional.softshrink(inner, amount) / (x[:, j].square().sum() / n)
    return w


def test_soft_threshold_equals_torch():
    values = torch.randn(1000)
    ours = values.clone()
    soft_threshold([ours], 0.3)
    assert torch.equal(ours, functional.softshrink(values, 0.3))


def test_proximal_l1_solves_a_correlated_lasso():
    """To 1e-6, with zeros where coordinate descent has them and nowhere else."""
    x, y = regression()
    expected = coordinate_descent(x, y, 0.1)
    model = nn.Linear(12, 1, bias=False, dtype=torch.float64)
    lr = float(1 / torch.linalg.eigvalsh(x.T @ x / len(y))[-1])
    optimizer = made(model, Optimizer(lr=lr), L1(amount=0.1))
    for _ in range(3000):
        optimizer.zero_grad()
        (0.5 * (model(x)[:, 0] - y).square().mean()).backward()
        optimizer.step()
    found = model.weight.detach()[0]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    assert torch.equal(found == 0, expected == 0) and 0 < int((found == 0).sum()) < 12


def walk(optimizer, model, count=20):
    """Steps on fixed random data; the weights after."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(count):
        x, y = torch.randn(16, 10, generator=generator), torch.randint(2, (16,), generator=generator)
        optimizer.zero_grad()
        functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def ends(kind, amount, **fields):
    """The weights after L2 in both forms."""
    found = []
    for form in ("coupled", "decoupled"):
        model = tiny_mlp().build()
        found.append(walk(made(model, Optimizer(kind=kind, **fields), L2(amount=amount, form=form, biases=True)), model))
    return found


def test_with_plain_sgd_both_forms_of_l2_are_one():
    torch.testing.assert_close(*ends("sgd", 0.3, lr=0.1), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(*ends("sgd", 0.3, lr=0.1, momentum=0.9), atol=1e-3)


def test_decoupled_l2_makes_adam_adamw():
    """Twenty steps of Adam with it and of torch's AdamW; coupled it is somewhere else."""
    coupled, decoupled = ends("adam", 0.3, lr=0.01)
    model = tiny_mlp().build()
    reference = walk(torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.3), model)
    torch.testing.assert_close(decoupled, reference, rtol=1e-4, atol=1e-6)
    assert float((coupled - reference).abs().max()) > 0.01


def test_l2_apart_in_closed_form():
    """Adam without memory takes steps of sign(g): decoupled it shrinks every weight alike, coupled only where the penalty
    turns the sign, so not where the gradient is large (Loshchilov & Hutter, section 2)."""
    lr, amount = 0.1, 0.5
    gradient = torch.tensor([[10.0, -0.1], [-10.0, 0.1]])
    for form, expected in (
        ("coupled", torch.ones(2, 2) - lr * torch.sign(gradient + amount)),
        ("decoupled", (1 - lr * amount) * torch.ones(2, 2) - lr * torch.sign(gradient)),
    ):
        model = nn.Linear(2, 2, bias=False)
        nn.init.ones_(model.weight)
        optimizer = made(model, Optimizer(kind="adam", lr=lr, betas=(0.0, 0.0)), L2(amount=amount, form=form))
        (model.weight * gradient).sum().backward()
        optimizer.step()
        torch.testing.assert_close(model.weight.detach(), expected)


@pytest.mark.parametrize("method", PENALTIES[1:5], ids=str)
def test_decays_of_one_entry_exclude_each_other(method):
    for other in PENALTIES[1:5]:
        with pytest.raises(NotApplicable, match="already"):
            other(method(Setup.of(tiny_mlp())))


@pytest.mark.parametrize("kind", ["sgd", "adamw", "adam", "rmsprop", "muon"])
@pytest.mark.parametrize("method", PENALTIES, ids=str)
def test_nothing_acts_when_scaled_gradients_overflowed(kind, method):
    """Torch calls a fused optimizer's hooks even then: weights and averages stay, to the bit."""
    model = tiny_cnn().build()
    setup = Setup.of(tiny_cnn(), model=model)
    optimizer = method(Optimizer(kind=kind)(setup)).optimizer.make(model)
    scaler = torch.amp.GradScaler("cpu")
    loss = functional.cross_entropy(model(torch.randn(4, 1, 20, 20)), torch.arange(4))
    scaler.scale(loss).backward()
    next(iter(model.parameters())).grad.fill_(float("inf"))
    before = fingerprint(model)
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    assert fingerprint(model) == before
    assert not optimizer.param_groups[0].get("gradient_steps")


class Cut(Exception):
    """The process ends."""


@pytest.mark.parametrize("method", PENALTIES, ids=str)
@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_resumes_bit_for_bit(tmp_path, kind, method):
    """Cut in the middle of an epoch with schedules of rate and decay on, it ends with the weights of the run in one go."""

    def setup(cut=None):
        made = Setup.of(tiny_cnn())
        for one in (Optimizer(kind=kind), method, DecaySchedule(kind="linear", final=2.0, follow="alone"), Schedule()):
            made = one(made)
        inner = made.optimizer.make

        def make(model):
            optimizer, left = inner(model), [cut]

            def count(*_):
                left[0] = left[0] - 1 if left[0] is not None else None
                if left[0] == 0:
                    raise Cut

            optimizer.register_step_post_hook(count)
            return optimizer

        return replace(made, optimizer=replace(made.optimizer, make=make))

    data = tiny_cnn().train
    whole, cut, rest = setup(), setup(cut=9), setup()
    fit(whole, data, epochs=2, seed=3)
    with pytest.raises(Cut):
        fit(cut, data, epochs=2, seed=3, checkpoint=tmp_path, every=0.0)
    outcome = fit(rest, data, epochs=2, seed=3, checkpoint=tmp_path, every=0.0)
    assert outcome.steps == 12 and fingerprint(rest.model) == fingerprint(whole.model)
