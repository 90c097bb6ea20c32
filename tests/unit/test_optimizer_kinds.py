"""Every kind of base optimizer against an independent implementation over twenty steps; Muon's and schedule-free's own rules.

The references are loops over one parameter at a time, written from the papers, in float64. Beside them stand torch.optim.Muon
and AdamW, and, for the extras, the package itself where no loop is short.
"""

import math
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from quadriga.core.errors import BadInput, NotApplicable
from quadriga.core.setup import Setup
from quadriga.core.slots import Factors, Look
from quadriga.methods.optimizer import _kinds
from quadriga.methods.optimizer._groups import roles
from quadriga.methods.optimizer._kinds import KINDS
from quadriga.methods.optimizer._muon import Muon, orthogonal
from quadriga.methods.optimizer._schedule_free import ScheduleFree
from quadriga.methods.optimizer.optimizer import Optimizer
from quadriga.methods.training.schedule import Schedule
from quadriga.testing import fingerprint, tiny_cnn, tiny_mlp, tiny_transformer
from quadriga.train.loop import fit

torch.set_num_threads(1)
COUNT = 20


def gradients(model, i):
    """Leave the gradients of batch i."""
    generator = torch.Generator().manual_seed(i)
    x, y = torch.randn(16, 10, generator=generator), torch.randint(2, (16,), generator=generator)
    model.zero_grad()
    nn.functional.cross_entropy(model(x.to(model[0].weight.dtype)), y).backward()


def trained(method, model=None):
    """The float64 model after twenty steps of a method's optimizer; the optimizer is left in evaluation where it has one."""
    model = tiny_mlp().build().double() if model is None else model
    optimizer = method.make(model)
    for i in range(COUNT):
        gradients(model, i)
        optimizer.step()
    if isinstance(optimizer, ScheduleFree):
        optimizer.eval()
    return list(model.parameters())


def by_hand(update, decays=lambda p: p.dim() > 1):
    """The same twenty steps of `update(weight, gradient, state, step, decays)` → weight, parameter by parameter."""
    model = tiny_mlp().build().double()
    states = [{} for _ in model.parameters()]
    for i in range(COUNT):
        gradients(model, i)
        with torch.no_grad():
            for p, state in zip(model.parameters(), states, strict=True):
                p.copy_(update(p.clone(), p.grad.clone(), state, i + 1, decays(p)))
    return [state.get("x", p) for p, state in zip(model.parameters(), states, strict=True)]


def check(method, update, **options):
    torch.testing.assert_close(trained(method), by_hand(update, **options), rtol=1e-9, atol=1e-11)


def mean(state, name, value, beta):
    """An exponential average that starts at 0."""
    state[name] = beta * state.get(name, 0) + (1 - beta) * value
    return state[name]


def schedule_free(lr, beta=0.9, beta2=0.999, decay=0.01, eps=1e-8, sgd=False):
    """Algorithm 1 of arXiv:2405.15682 with x, y and z apart."""

    def update(y, g, s, t, decays):
        z, x = s.get("z", y), s.get("x", y)
        step = g if sgd else g / ((mean(s, "v", g * g, beta2) / (1 - beta2**t)).sqrt() + eps)
        s["z"] = z - lr * (step + decay * decays * y)
        s["sum"] = s.get("sum", 0) + lr**2
        c = lr**2 / s["sum"]
        s["x"] = (1 - c) * x + c * s["z"]
        return (1 - beta) * s["z"] + beta * s["x"]

    return update


def test_schedule_free_follows_the_algorithm():
    """Against x, y and z kept apart; both forms, decay included."""
    check(Optimizer(kind="schedule_free", lr=0.01, weight_decay=0.3), schedule_free(0.01, decay=0.3))
    check(Optimizer(kind="schedule_free", betas=(0.7, 0.9), eps=1e-3), schedule_free(0.003, 0.7, 0.9, eps=1e-3))
    check(Optimizer(kind="schedule_free_sgd", lr=0.5, weight_decay=0.1), schedule_free(0.5, decay=0.1, sgd=True))


def test_muon_is_torch_muon_and_adamw():
    """Hidden matrices as torch.optim.Muon, made to compute in our type; all else as torch.optim.AdamW."""
    model = tiny_mlp().build()
    ours = trained(Optimizer(kind="muon", lr=0.01, weight_decay=0.1), model)
    plain = tiny_mlp().build()
    hidden = [plain[0].weight, plain[2].weight]
    others = [plain[4].weight, *(m.bias for m in (plain[0], plain[2], plain[4]))]
    muon = torch.optim.Muon(hidden, lr=0.01, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    decays = [{"params": others[:1], "weight_decay": 0.1}, {"params": others[1:], "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(decays, lr=0.01)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "bfloat16", torch.Tensor.float)  # torch's rounds to it, which is not what is compared
        for i in range(COUNT):
            gradients(plain, i)
            muon.step(), adamw.step()
    torch.testing.assert_close(ours, list(plain.parameters()), rtol=1e-3, atol=2e-5)
