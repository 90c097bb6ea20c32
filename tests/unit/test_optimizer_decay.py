"""Dynamic decay against closed forms, stable decay against AdamS, cautious decay against its own definition."""

from dataclasses import replace

import pytest
import torch
from pytorch_optimizer import AdamS
from torch import nn
from torch.nn import functional

from quadriga.core.errors import BadInput, NotApplicable
from quadriga.core.setup import Setup
from quadriga.methods.optimizer.cautious_decay import CautiousDecay, decay_agreeing
from quadriga.methods.optimizer.decay_schedule import DecaySchedule
from quadriga.methods.optimizer.l2 import L2
from quadriga.methods.optimizer.optimizer import Optimizer
from quadriga.methods.optimizer.stable_decay import StableDecay
from quadriga.methods.training.schedule import Schedule
from quadriga.testing import tiny_cnn, tiny_mlp
from quadriga.train.loop import fit

torch.set_num_threads(1)


def after(*methods, workload=tiny_mlp):
    """A fresh setup after some methods."""
    setup = Setup.of(workload())
    for method in methods:
        setup = method(setup)
    return setup


def batches(count=20):
    generator = torch.Generator().manual_seed(1)
    for _ in range(count):
        yield torch.randn(16, 10, generator=generator), torch.randint(2, (16,), generator=generator)


def flat(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def walk(optimizer, model):
    """Steps on fixed random data; the weights after."""
    for x, y in batches():
        optimizer.zero_grad()
        functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    return flat(model)


def pulls(*methods, epochs=2):
    """For each step of a train step, (rate, decay) of the first group as the step hooks find them."""
    seen, setup = [], after(*methods)
    inner = setup.optimizer.make

    def make(model):
        optimizer = inner(model)
        optimizer.register_step_pre_hook(lambda o, a, k: seen.append((o.param_groups[0]["lr"], o.param_groups[0]["l2"])))
        return optimizer

    fit(replace(setup, optimizer=replace(setup.optimizer, make=make)), tiny_mlp().train, epochs=epochs, seed=0)
    return seen


@pytest.mark.parametrize(
    ("fields", "points"),
    [
        ({"kind": "linear", "final": 0.5}, {0.0: 1, 0.5: 0.75, 1.0: 0.5}),
        ({"kind": "cosine"}, {0.0: 1, 1 / 3: 0.75, 0.5: 0.5, 1.0: 0}),
        ({"kind": "exponential", "final": 0.01}, {0.0: 1, 0.5: 0.1, 1.0: 0.01}),
        ({"kind": "step", "final": 0.2}, {0.0: 1, 0.49: 1, 0.5: 0.6, 0.74: 0.6, 0.75: 0.2, 1.0: 0.2}),
        ({"kind": "late", "final": 3.0}, {0.0: 1, 0.8: 1, 0.9: 2, 1.0: 3}),
        ({"kind": "constant", "follow": "alone"}, {0.0: 1, 1.0: 1}),
    ],
)
def test_closed_forms(fields, points):
    schedule = DecaySchedule(**fields)
    assert [schedule.factors(t).decay for t in points] == pytest.approx(list(points.values()), abs=1e-12)
    assert schedule.factors(0.3).lr == 1


@pytest.mark.parametrize("follow", ["rate", "alone"])
def test_decay_with_the_rate_and_without_it(follow):
    """Under a linear fall of both, a step pulls by rate · decay ~ (1 - t)², or, independent of the rate, by ~ (1 - t)."""
    decay = DecaySchedule(kind="linear", follow=follow)
    seen = pulls(Optimizer(kind="adam", lr=0.01), L2(amount=0.1, form="decoupled"), decay, Schedule(kind="linear"))
    left = [1 - k / 12 for k in range(12)]
    assert [lr for lr, _ in seen] == pytest.approx([0.01 * x for x in left])
    assert [lr * l2 for lr, l2 in seen] == pytest.approx([0.001 * x ** (2 if follow == "rate" else 1) for x in left])


def test_independent_of_a_rate_that_starts_at_zero():
    """A warm-up's first step has the rate 0 and pulls not at all; all others pull alike."""
    methods = (
        Optimizer(kind="adam", lr=0.01),
        L2(amount=0.1, form="decoupled"),
        DecaySchedule(kind="constant", follow="alone"),
    )
    seen = pulls(*methods, Schedule(kind="cosine", warmup=0.3))
    assert [lr * l2 for lr, l2 in seen] == pytest.approx([0.0] + [0.001] * 11)


def test_independence_is_given_once_and_nothing_is_no_schedule():
    with pytest.raises(NotApplicable, match="already"):
        after(L2(), DecaySchedule(follow="alone"), DecaySchedule(follow="alone"))
    with pytest.raises(NotApplicable, match="constant"):
        after(L2(), DecaySchedule(kind="constant"))


def test_stable_decay_makes_adam_adams():
    """Twenty steps of Adam with it, and of the package's AdamS: its mean of second moments is our average of mean squares."""
    setup = after(Optimizer(kind="adam", lr=0.01, weight_decay=0.5, decay_biases=True), StableDecay(amount=1e-2))
    found = walk(setup.optimizer.make(setup.model), setup.model)
    model = tiny_mlp().build()
    expected = walk(AdamS(model.parameters(), lr=0.01, weight_decay=1e-2), model)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    plain = tiny_mlp().build()
    assert float((walk(torch.optim.Adam(plain.parameters(), lr=0.01), plain) - found).abs().max()) > 0.01


def test_stable_decay_is_free_of_the_scale_of_the_loss():
    """With c times the gradients, as of a loss multiplied by c, c times the amount decays alike; no gradient, never below 0."""
    shrunk = []
    for c in (1.0, 100.0):
        model = nn.Linear(3, 3)
        nn.init.ones_(model.weight)
        optimizer = StableDecay(amount=0.01 * c)(after(Optimizer(kind="adam", lr=0.1))).optimizer.make(model)
        for p in model.parameters():
            p.grad = torch.full_like(p, 0.1 * c)
        optimizer.step()
        shrunk.append(model.weight.detach() + 0.1)
    torch.testing.assert_close(shrunk[0], torch.full((3, 3), 1 - 0.1 * 0.01 / 0.1))
    torch.testing.assert_close(shrunk[0], shrunk[1])
    optimizer.zero_grad(set_to_none=False)
    one = StableDecay(beta=0.0)(after(Optimizer(lr=0.1))).optimizer.make(model)
    one.step()
    assert torch.equal(model.weight.detach(), torch.zeros(3, 3))


def test_decay_of_agreeing_signs():
    """All nine pairs of signs, and numbers whose product vanishes."""
    old = torch.tensor([1.0, 1.0, 1.0, -1.0, -1.0, -1.0, 1e-30, 0.0])
    update = torch.tensor([0.1, -0.1, 0.0, 0.1, -0.1, 0.0, 1e-31, 0.3])
    new = old - update
    decay_agreeing([new], [old], 0.5)
    expected = old - update - 0.5 * old * torch.tensor([1.0, 0, 1, 0, 1, 1, 1, 1])
    torch.testing.assert_close(new, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", ["sgd", "adam", "adamw", "muon", "lion"])
def test_cautious_decay_is_its_definition_around_any_optimizer(kind):
    """Each step equals the optimizer's own update from the same state, less lr · decay · w where both have one sign."""
    lr, amount = 0.01, 0.2
    setup = after(Optimizer(kind=kind, lr=lr, weight_decay=amount), CautiousDecay())
    model, optimizer = setup.model, setup.optimizer.make(setup.model)
    plain = tiny_mlp().build()
    reference = Optimizer(kind=kind, lr=lr, weight_decay=0.0).make(plain)
    masked = 0
    for x, y in batches(10):
        with torch.no_grad():
            for p, q in zip(model.parameters(), plain.parameters(), strict=True):
                q.copy_(p)
        before = [p.detach().clone() for p in model.parameters()]
        for net, rule in ((model, optimizer), (plain, reference)):
            rule.zero_grad()
            functional.cross_entropy(net(x), y).backward()
            rule.step()
        for p, q, w in zip(model.parameters(), plain.parameters(), before, strict=True):
            mask = ((w - q) * w >= 0) if p.dim() > 1 else torch.zeros_like(w)
            torch.testing.assert_close(p.detach(), q.detach() - lr * amount * mask * w, rtol=1e-5, atol=1e-7)
            masked += int((mask == 0).sum()) if p.dim() > 1 else 0
    assert masked > 100


def test_cautious_decay_does_not_move_the_minimum():
    """On ½(w - a)² decay ends at a / (1 + decay); the cautious one may rest at a, which is what its authors show."""
    a, rests = torch.tensor([[2.0, -1.0, 0.5]]), {}
    for name, method in (("plain", L2(amount=0.5, form="decoupled")), ("cautious", CautiousDecay(amount=0.5))):
        model = nn.Linear(3, 1, bias=False)
        optimizer = method(after(Optimizer(lr=0.01))).optimizer.make(model)
        nn.init.zeros_(model.weight)
        for _ in range(2000):
            optimizer.zero_grad()
            (0.5 * (model.weight - a).square()).sum().backward()
            optimizer.step()
        rests[name] = model.weight.detach()
    torch.testing.assert_close(rests["plain"], a / 1.5, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(rests["cautious"], a, rtol=0, atol=0.02)


@pytest.mark.parametrize("method", [CautiousDecay(amount=0.3), StableDecay(amount=0.3)], ids=["cautious", "stable"])
def test_what_the_optimizer_lets_decay_and_schedules_drive(method):
    """The amount goes where the weight decay was, or to matrices; the optimizer's own is gone; a schedule finds it."""
    groups = after(Optimizer(kind="adamw"), method, workload=tiny_cnn).optimizer.make(tiny_cnn().build()).param_groups
    assert [(g["l2"], g["weight_decay"]) for g in groups] == [(0.3, 0.0), (0.0, 0.0)]
    model = tiny_cnn().build()
    optimizer = after(Optimizer(kind="adam"), method, workload=tiny_cnn).optimizer.make(model)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer.step()
    assert all(torch.equal(p, before[n]) == (p.dim() <= 1) for n, p in model.named_parameters())
    assert [x for _, x in pulls(Optimizer(), method, DecaySchedule(kind="linear"), epochs=1)] == pytest.approx(
        [0.3 * (1 - k / 6) for k in range(6)]
    )


def test_cautious_decay_needs_a_decay():
    with pytest.raises(NotApplicable, match="no weight decay") as caught:
        CautiousDecay()(after(Optimizer(kind="adam")))
    assert "amount" in caught.value.remedy


@pytest.mark.parametrize(
    ("method", "fields", "word"),
    [
        (DecaySchedule, {"kind": "exponential"}, "final"),
        (DecaySchedule, {"final": -1.0}, "final"),
        (DecaySchedule, {"milestones": [0.7, 0.2]}, "milestones"),
        (DecaySchedule, {"milestones": []}, "milestones"),
        (DecaySchedule, {"part": 0.0}, "part"),
        (CautiousDecay, {"amount": 0.0}, "amount"),
        (StableDecay, {"amount": -1.0}, "amount"),
        (StableDecay, {"beta": 1.0}, "beta"),
        (L2, {"form": "decoupeld"}, "form"),
    ],
)
def test_bad_values(method, fields, word):
    with pytest.raises(BadInput, match=word):
        method.parse(fields)
