"""A fixed sample of `make matrix`: ordered pairs of methods work together, or are refused with a reason."""

import random
from functools import cache

import pytest
import torch

from quadriga import methods
from quadriga.core.recipe import Recipe, Step
from quadriga.testing import make_setups, starting
from quadriga.testing.combine import FAILS, REFUSED, WORKS, Combiner, Outcome
from quadriga.testing.setups import fake_time
from quadriga.testing.workloads import TINY

torch.set_num_threads(1)
NETWORKS = ("cnn", "lstm", "transformer")
SLOW = ("inductor", "compile", "opencl")  # a compiler's minute each
NAMES = [n for n in methods.available() if n not in SLOW]
SAMPLE = random.Random(0).sample([(n, a, b) for n in NETWORKS for a in NAMES for b in NAMES], 100)


@cache
def combiner(network):
    return Combiner(TINY[network](trained=True), {"time": fake_time})


@cache
def start(network, name):
    setups = {k: make for k, make in make_setups({network: TINY[network]}).items() if k.endswith("trained")}
    one = starting(methods.available()[name], setups)
    return Step(name, {k: v for k in type(one).fields() if (v := getattr(one, k)) is not None})


@pytest.mark.parametrize(("network", "first", "second"), SAMPLE, ids=lambda value: value)
def test_a_pair_works_or_is_refused_with_a_reason(network, first, second):
    outcome = combiner(network)(Recipe((start(network, first), start(network, second))))
    assert outcome.status in (WORKS, REFUSED), outcome
    assert outcome.status == WORKS or (outcome.at in (first, second) and len(outcome.reason) > 10), outcome


def test_the_combiner_finds_what_breaks(monkeypatch):
    """A method that spoils the weights, changes the outputs' shape, raises, or refuses without a word is caught."""
    from quadriga.core.errors import NotApplicable
    from quadriga.methods.structure.prune_channels import PruneChannels

    def spoil(self, setup):
        with torch.no_grad():
            setup.model.fc2.weight.fill_(float("nan"))
        return setup

    def widen(self, setup):
        setup.model.fc2 = torch.nn.Linear(16, 5)
        return setup

    def crash(self, setup):
        raise KeyError("surprise")

    def sulk(self, setup):
        raise NotApplicable("")

    found = {}
    for act in (spoil, widen, crash, sulk):
        monkeypatch.setattr(PruneChannels, "apply", act)
        found[act.__name__] = combiner("cnn")(Recipe((Step("prune_channels", {}),)))
    assert {name: (o.status, o.at) for name, o in found.items()} == {
        "spoil": (FAILS, "outputs"),
        "widen": (FAILS, "outputs"),
        "crash": (FAILS, "apply"),
        "sulk": (FAILS, "prune_channels"),
    }
    assert isinstance(found["crash"], Outcome) and "KeyError: 'surprise'" in found["crash"].reason
