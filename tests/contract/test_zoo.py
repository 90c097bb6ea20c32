"""Every structure method on models that it was not written for: fewer parameters and the same interface, or a refusal."""

import re
from functools import cache

import pytest
import torch

from quadriga import methods
from quadriga.core.method import Family
from quadriga.core.recipe import Recipe, Step
from quadriga.testing import make_setups, starting
from quadriga.testing.combine import REFUSED, WORKS, Combiner
from quadriga.testing.setups import fake_time
from quadriga.testing.zoo import ZOO

pytest.importorskip("transformers")
torch.set_num_threads(1)
STRUCTURE = [name for name, method in methods.available().items() if method.family is Family.STRUCTURE]
OTHERWISE = {
    "distill",
    "distill_features",
    "distill_attention",
    "widen",
    "cluster_weights",
    "prune_weights",
}  # no fewer weights


@cache
def combiner(model):
    return Combiner(ZOO[model](), {"time": fake_time})


@cache
def start(model, name):
    setups = {k: make for k, make in make_setups({model: ZOO[model]}).items() if k.endswith("trained")}
    one = starting(methods.available()[name], setups)
    return Step(name, {k: v for k in type(one).fields() if (v := getattr(one, k)) is not None})


def cases():
    """Every method on every model; two models for each method are part of `make test`, the others of `make test-all`."""
    for place, name in enumerate(STRUCTURE):
        for number, model in enumerate(ZOO):
            yield pytest.param(model, name, marks=() if (number - place) % 3 == 0 else pytest.mark.slow)


@pytest.mark.parametrize(("model", "name"), list(cases()))
def test_a_structure_method_on_a_model_of_transformers(model, name):
    """The same interface, finite outputs, a training step, an export and fewer parameters; or a refusal that names a layer."""
    combine = combiner(model)
    before = combine(Recipe(()))
    outcome = combine(Recipe((start(model, name),)))
    assert before.status == WORKS and outcome.status in (WORKS, REFUSED), outcome
    if outcome.status == REFUSED:
        layers = [n for n, _ in combine.workload.build(0).named_modules() if n]
        kinds = {type(m).__name__ for m in combine.workload.build(0).modules()}
        named = any(re.search(rf"\b{re.escape(word)}\b", outcome.reason) for word in (*layers, *kinds))
        assert outcome.at == name and (named or "requires" in outcome.reason or "no " in outcome.reason), outcome
    elif name not in OTHERWISE:
        assert outcome.parameters < before.parameters
