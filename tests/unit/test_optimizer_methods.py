"""Optimizers against torch's own, penalties against soft-thresholding and closed forms, and their schedules."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from quadriga.core.errors import BadInput, NotApplicable
from quadriga.core.setup import Setup
from quadriga.methods.optimizer.decay_schedule import DecaySchedule
from quadriga.methods.optimizer.l1 import L1
from quadriga.methods.optimizer.l2 import L2
from quadriga.methods.optimizer.optimizer import Optimizer
from quadriga.testing import tiny_cnn, tiny_mlp
from quadriga.train.loop import fit

torch.set_num_threads(1)


def steps(model, optimizer, count=20):
    """A few steps on fixed random data; the weights after."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(count, 16, 10, generator=generator), torch.randint(2, (count, 16), generator=generator)
    for i in range(count):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[i]), y[i]).backward()
        optimizer.step()
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def made(*methods):
    """A fresh model, and its optimizer after some methods."""
    setup = Setup.of(tiny_mlp())
    for method in methods:
        setup = method(setup)
    return setup.model, setup.optimizer.make(setup.model)


REFERENCES = {
    "sgd": (Optimizer(), lambda p: torch.optim.SGD(p, lr=0.1)),
    "nesterov": (
        Optimizer(momentum=0.9, nesterov=True, lr=0.02, weight_decay=0.1, decay_biases=True),
        lambda p: torch.optim.SGD(p, lr=0.02, momentum=0.9, nesterov=True, weight_decay=0.1),
    ),
    "adam": (
        Optimizer(kind="adam", scale=2.0, betas=(0.8, 0.9), eps=1e-4),
        lambda p: torch.optim.Adam(p, lr=2e-3, betas=(0.8, 0.9), eps=1e-4),
    ),
    "adamw": (Optimizer(kind="adamw", decay_biases=True), lambda p: torch.optim.AdamW(p, lr=1e-3)),
    "rmsprop": (
        Optimizer(kind="rmsprop", alpha=0.9, momentum=0.5),
        lambda p: torch.optim.RMSprop(p, lr=1e-3, alpha=0.9, momentum=0.5),
    ),
}


@pytest.mark.parametrize("name", REFERENCES)
def test_equals_torch(name):
    """Twenty steps of ours, fused or foreach, and of torch's plain loop: equal weights to rounding."""
    method, reference = REFERENCES[name]
    model, optimizer = made(method)
    plain = tiny_mlp().build()
    torch.testing.assert_close(steps(model, optimizer), steps(plain, reference(plain.parameters())), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["sgd", "adam", "adamw", "rmsprop"])
def test_biases_and_norms_do_not_decay(kind):
    """With zero gradients only matrices shrink, unless the field says otherwise."""
    model = tiny_cnn().build()
    setup = Optimizer(kind=kind, weight_decay=0.1)(Setup.of(tiny_cnn(), model=model))
    optimizer = setup.optimizer.make(model)
    groups = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    assert all(groups[id(p)] == (0.1 if p.dim() > 1 else 0.0) for p in model.parameters())
    everything = Optimizer(kind=kind, weight_decay=0.1, decay_biases=True).make(model).param_groups
    assert [g["weight_decay"] for g in everything] == [0.1]


def test_frozen_and_sparse_parameters():
    """What does not require a gradient is left out; sparse gradients get the implementation that takes them."""
    model = nn.Sequential(nn.Embedding(5, 3, sparse=True), nn.Linear(3, 2))
    model[1].bias.requires_grad_(False)
    optimizer = Optimizer(lr=0.1).make(model)
    assert len(optimizer.param_groups[0]["params"]) == 2
    before = model[0].weight.detach().clone()
    model(torch.tensor([1, 1])).sum().backward()
    optimizer.step()
    changed = (model[0].weight != before).any(1)
    assert changed.tolist() == [False, True, False, False, False]


def test_one_optimizer_in_a_recipe():
    """A second one, or one after a penalty, would silently drop what is there."""
    setup = Optimizer(kind="adam")(Setup.of(tiny_mlp()))
    with pytest.raises(NotApplicable, match="stands already") as caught:
        Optimizer(kind="sgd")(setup)
    assert "first" in caught.value.remedy
    with pytest.raises(NotApplicable, match="stands already"):
        Optimizer()(L1()(Setup.of(tiny_mlp())))
    assert Optimizer()(setup.reset_training(tiny_mlp())).optimizer.make is not None


def test_schedules_survive_a_new_optimizer():
    setup = Setup.of(tiny_mlp())
    mark = DecaySchedule(kind="linear").factors
    setup = replace(setup, optimizer=replace(setup.optimizer, schedules=(mark,)))
    assert Optimizer()(setup).optimizer.schedules == (mark,)


def test_proximal_l1_is_soft_thresholding():
    """One step: sign(v) · max(|v| - lr·amount, 0) of where plain SGD would be; biases are left alone."""
    model, optimizer = made(Optimizer(lr=0.5), L1(amount=0.2))
    plain, reference = made(Optimizer(lr=0.5))
    steps(model, optimizer, 1), steps(plain, reference, 1)
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        expected = q.sign() * (q.abs() - 0.5 * 0.2).clamp_min(0) if q.dim() > 1 else q
        torch.testing.assert_close(p, expected)
    assert (model[0].weight == 0).any()


def test_proximal_l1_reaches_the_lasso_solution():
    """On ½(w - a)² + amount·|w| it converges to the soft-thresholded a, with exact zeros; the subgradient form hovers."""
    a = torch.tensor([[1.0, -0.3, 0.05, -2.0]])
    ends = {}
    for form in ("proximal", "subgradient"):
        model = nn.Linear(4, 1, bias=False)
        setup = Setup.of(tiny_mlp(), model=None)
        optimizer = L1(amount=0.4, form=form)(Optimizer(lr=0.1)(setup)).optimizer.make(model)
        for _ in range(200):
            optimizer.zero_grad()
            (0.5 * (model.weight - a).square()).sum().backward()
            optimizer.step()
        ends[form] = model.weight.detach()
    exact = a.sign() * (a.abs() - 0.4).clamp_min(0)
    torch.testing.assert_close(ends["proximal"], exact, rtol=1e-4, atol=1e-5)
    assert ends["proximal"][0, 1] == 0 and ends["proximal"][0, 2] == 0
    torch.testing.assert_close(ends["subgradient"], exact, rtol=1e-4, atol=0.1)
    assert (ends["subgradient"][0, 1:3] != 0).all()


def test_l2_is_weight_decay_with_sgd():
    """Coupled, so the same as torch's weight_decay of SGD; and of Adam, whose weight_decay is coupled too."""
    for kind, reference in (("sgd", torch.optim.SGD), ("adam", torch.optim.Adam)):
        model, optimizer = made(Optimizer(kind=kind, lr=0.05), L2(amount=0.1, biases=True))
        plain = tiny_mlp().build()
        expected = steps(plain, reference(plain.parameters(), lr=0.05, weight_decay=0.1))
        torch.testing.assert_close(steps(model, optimizer), expected, rtol=1e-4, atol=1e-5)


def test_l2_is_not_decoupled_decay():
    """Where the loss has no gradient, Adam with L2 takes full steps of lr; AdamW shrinks by lr·decay alone."""
    for method, expected in ((L2(amount=0.01), 1.0 - 0.001), (None, 1.0 - 0.001 * 0.01)):
        model = nn.Linear(3, 3)
        nn.init.ones_(model.weight)
        setup = Setup.of(tiny_mlp())
        setup = method(Optimizer(kind="adam")(setup)) if method else Optimizer(kind="adamw", weight_decay=0.01)(setup)
        optimizer = setup.optimizer.make(model)
        (0.0 * model.weight.sum()).backward()
        optimizer.step()
        torch.testing.assert_close(model.weight, torch.full((3, 3), expected), rtol=1e-6, atol=1e-7)


def test_l2_leaves_biases():
    model, optimizer = made(Optimizer(), L2(amount=0.5))
    plain, reference = made(Optimizer())
    steps(model, optimizer, 1), steps(plain, reference, 1)
    assert torch.equal(model[0].bias, plain[0].bias) and not torch.equal(model[0].weight, plain[0].weight)


@pytest.mark.parametrize("method", [L1(), L2()])
def test_a_penalty_is_given_once(method):
    with pytest.raises(NotApplicable, match="already"):
        method(method(Setup.of(tiny_mlp())))
    both = L2()(L1()(Setup.of(tiny_mlp())))
    group = both.optimizer.make(both.model).param_groups[0]
    assert (group["l1"], group["l2"]) == (1e-5, 5e-4)


def test_decay_schedule_reaches_every_decay():
    """Under a linear fall to 0 the entries are base · (1 - progress), and l2's pull on the weights goes with them."""
    seen = []
    setup = Setup.of(tiny_mlp())
    for method in (Optimizer(kind="adamw", weight_decay=0.1), L1(amount=0.3), L2(amount=0.2), DecaySchedule(kind="linear")):
        setup = method(setup)
    inner = setup.optimizer.make

    def make(model):
        optimizer = inner(model)
        optimizer.register_step_pre_hook(lambda o, a, k: seen.append([dict(g) for g in o.param_groups]))
        return optimizer

    workload = tiny_mlp()
    fit(replace(setup, optimizer=replace(setup.optimizer, make=make)), workload.train, epochs=1, seed=0)
    for k, (matrices, biases) in enumerate(seen):
        factor = 1 - k / 6
        assert [matrices[n] for n in ("weight_decay", "l1", "l2")] == pytest.approx([0.1 * factor, 0.3 * factor, 0.2 * factor])
        assert biases["weight_decay"] == 0 and matrices["lr"] == 1e-3


@pytest.mark.parametrize(
    ("fields", "middle"),
    [
        ({"kind": "linear"}, 0.5),
        ({"kind": "cosine"}, 0.5),
        ({"kind": "exponential", "final": 0.01}, 0.1),
        ({"kind": "cosine", "final": 3.0}, 2.0),
    ],
)
def test_decay_schedule_closed_forms(fields, middle):
    schedule = DecaySchedule(**fields)
    assert [schedule.factors(p).decay for p in (0.0, 0.5, 1.0)] == pytest.approx([1.0, middle, schedule.final])
    assert schedule.factors(0.3).lr == 1


def test_decay_schedule_needs_something_that_decays():
    with pytest.raises(NotApplicable, match="nothing decays") as caught:
        DecaySchedule()(Optimizer(kind="adam")(Setup.of(tiny_mlp())))
    assert "before" in caught.value.remedy


@pytest.mark.parametrize(
    ("method", "fields", "word"),
    [
        (Optimizer, {"kind": "adamm"}, "kind"),
        (Optimizer, {"lr": -1.0}, "lr"),
        (Optimizer, {"nesterov": True}, "nesterov"),
        (Optimizer, {"betas": [0.9]}, "betas"),
        (Optimizer, {"momentum": 1.0}, "momentum"),
        (L1, {"amount": 0.0}, "amount"),
        (L2, {"amount": -1.0}, "amount"),
        (DecaySchedule, {"kind": "exponential"}, "final"),
        (Optimizer, {"weigth_decay": 0.1}, 'did you mean "weight_decay"'),
    ],
)
def test_bad_values(method, fields, word):
    with pytest.raises(BadInput, match=word):
        method.parse(fields)
