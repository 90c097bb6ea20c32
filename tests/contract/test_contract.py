"""The contract suite itself: each check finds the method that breaks it, and outsiders' methods pass."""

import os
import warnings
from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch
from torch import nn

from quadriga import methods
from quadriga.core.errors import BadInput, NotApplicable
from quadriga.core.method import Family, Method, Numerics
from quadriga.core.recipe import Step
from quadriga.core.setup import Setup
from quadriga.testing import CHECKS, check_method, fingerprint, make_setups, tiny_mlp

torch.set_num_threads(1)
BY_NAME = {check.__name__: check for check in CHECKS}
FEW = {name: make for name, make in make_setups().items() if name.startswith("mlp")}


@dataclass(frozen=True, kw_only=True)
class Good(Method):
    """Halve the batch size.

    Args:
        by: a divisor.

    Source: none needed.
    """

    family = Family.TRAINING
    numerics = Numerics.CHANGED
    source = "an example"
    search: ClassVar = {"by": (2, 4)}
    by: int = 2

    def apply(self, setup: Setup) -> Setup:
        return replace(setup, training=replace(setup.training, batch_size=setup.training.batch_size // self.by))


class NotADataclass(Good):
    """Not decorated, with another field. Source: none."""

    def __init__(self):
        object.__setattr__(self, "by", 2)


@dataclass(frozen=True, kw_only=True)
class NoSource(Good):
    """Halve. Args: by: a divisor. Source: it is empty below."""

    source = " "


@dataclass(frozen=True, kw_only=True)
class BadChoice(Good):
    """Halve. Args: by: a divisor. Source: none."""

    search: ClassVar = {"by": (2, "four")}


@dataclass(frozen=True, kw_only=True)
class WritesModel(Good):
    """Halve, and spoil the model. Args: by: a divisor. Source: none."""

    def apply(self, setup):
        with torch.no_grad():
            next(setup.model.parameters()).zero_()
        return setup


@dataclass(frozen=True, kw_only=True)
class WritesRuntime(Good):
    """Halve, and write a slot of others. Args: by: a divisor. Source: none."""

    def apply(self, setup):
        return replace(setup, runtime=replace(setup.runtime, threads=1))


@dataclass(frozen=True, kw_only=True)
class OtherOutputs(Good):
    """Change the outputs' shape. Args: by: a divisor. Source: none."""

    family = Family.STRUCTURE

    def apply(self, setup):
        setup.model[4] = nn.Linear(16, 3)
        return replace(setup, model=setup.model)


@dataclass(frozen=True, kw_only=True)
class Thaws(Good):
    """Halve. Args: by: a divisor. Source: none."""

    family = Family.STRUCTURE

    def apply(self, setup):
        return replace(setup, model=setup.model.requires_grad_(True))


@dataclass(frozen=True, kw_only=True)
class Lies(Good):
    """Promise close outputs and move a bias. Args: by: a divisor. Source: none."""

    family = Family.STRUCTURE
    numerics = Numerics.CLOSE

    def apply(self, setup):
        setup.model[0].bias.data.add_(0.1)
        return replace(setup, model=setup.model)


@dataclass(frozen=True, kw_only=True)
class Infinite(Good):
    """A loss that is infinite. Args: by: a divisor. Source: none."""

    def apply(self, setup):
        return replace(setup, training=replace(setup.training, loss=lambda o, b: o.sum() * float("inf")))


@dataclass(frozen=True, kw_only=True)
class Unseeded(Good):
    """Random weights from the global generator. Args: by: a divisor. Source: none."""

    family = Family.STRUCTURE

    def apply(self, setup):
        nn.init.normal_(setup.model[0].weight)
        return replace(setup, model=setup.model)


@dataclass(frozen=True, kw_only=True)
class Racing(Good):
    """A loss with noise that no seed governs, and no word about it. Args: by: a divisor. Source: none."""

    adds = frozenset({"NONDETERMINISTIC"})

    def apply(self, setup):
        noise = lambda o, b: nn.functional.cross_entropy(o, b.target) * os.urandom(1)[0]  # noqa: E731
        return replace(setup, training=replace(setup.training, loss=noise))


@dataclass(frozen=True, kw_only=True)
class Silent(Good):
    """Refuse without a reason. Args: by: a divisor. Source: none."""

    def apply(self, setup):
        raise NotApplicable("")


@dataclass(frozen=True, kw_only=True)
class Never(Good):
    """Refuse everything. Args: by: a divisor. Source: none."""

    def apply(self, setup):
        raise NotApplicable("it is Monday")


@dataclass(frozen=True, kw_only=True)
class Replaces(Good):
    """Put another loss in the place of the one there. Args: by: a divisor. Source: none."""

    def apply(self, setup):
        return replace(setup, training=replace(setup.training, loss=lambda o, b: nn.functional.cross_entropy(o, b.target)))


BROKEN = [
    (NotADataclass, "check_declaration", "not a frozen dataclass"),
    (NoSource, "check_declaration", "no source"),
    (BadChoice, "check_fields", "four"),
    (WritesModel, "check_input_unchanged", "changed the model"),
    (WritesRuntime, "check_slots", "does not own"),
    (OtherOutputs, "check_interface", "at batch 1"),
    (Lies, "check_promise", "promises close outputs"),
    (Thaws, "check_frozen", "weights are learned"),
    (Infinite, "check_training_step", "inf"),
    (Unseeded, "check_deterministic", "unequal weights"),
    (Racing, "check_deterministic", "does not say so"),
    (Silent, "check_refusals", "without a reason"),
    (Never, "check_refusals", "none of the setups"),
    (Replaces, "check_wraps", "dropped what stood there before it: loss"),
]


@pytest.mark.parametrize(("method", "check", "words"), BROKEN, ids=lambda v: getattr(v, "__name__", None))
def test_a_breach_is_found(method, check, words):
    with pytest.raises((AssertionError, BadInput, ArithmeticError), match=words):
        check_method(method(), FEW, [BY_NAME[check]])


def test_every_check_is_tried_by_a_breach():
    assert {check for _, check, _ in BROKEN} == set(BY_NAME)


def test_a_good_method_of_a_stranger_passes():
    check_method(Good, FEW)
    check_method(Good(by=4), FEW)


def test_a_setup_is_a_copy_of_the_workload():
    """Whatever is done to a setup's model, the module that the user gave stays as it was."""
    workload = tiny_mlp()
    before = fingerprint(workload.model)
    setup = Setup.of(workload)
    nn.init.zeros_(setup.model[0].weight)
    assert fingerprint(workload.model) == before


def test_build_and_its_errors():
    """A step becomes its method; unknown names and fields get the nearest one as remedy."""
    assert methods.build(Step("l2", {"amount": 0.1})).amount == 0.1
    with pytest.raises(BadInput, match=r'no method "optimiser"; did you mean "optimizer"\?'):
        methods.build(Step("optimiser"))
    with pytest.raises(BadInput, match=r'no field "lrr"; did you mean "lr"\?'):
        methods.build(Step("optimizer", {"lrr": 1}))


def test_cards_are_plain_and_complete():
    import json

    cards = methods.cards()
    assert json.loads(json.dumps(cards, allow_nan=False)) == cards
    assert [c["name"] for c in cards] == list(methods.available())
    for row in cards:
        assert row["about"] and row["source"] and set(row["search"]) <= set(row["fields"])
        assert all(field["about"] and field["type"] for field in row["fields"].values()), row["name"]


class Point:
    """An entry point that gives a value or raises it."""

    def __init__(self, value):
        self.given, self.value = value, "plugin:Thing"

    def load(self):
        if isinstance(self.given, Exception):
            raise self.given
        return self.given


def test_plugins(monkeypatch):
    """A good plug-in joins; one that fails, is no method or takes a name of ours is left out with a warning."""
    clash = type("L2", (Good,), {"__doc__": "Another.", "name": "l2"})
    for given, words in ((Good, None), (ImportError("gone"), "does not import"), (int, "not a subclass"), (clash, "l2 exists")):
        monkeypatch.setattr(methods, "entry_points", lambda group, given=given: [Point(given)])
        methods._found.cache_clear()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found = methods.available()
        assert [w for w in caught if words and words in str(w.message)] or (not words and not caught)
        assert ("good" in found) == (given is Good) and found["l2"].__module__.startswith("quadriga")
    monkeypatch.undo()
    methods._found.cache_clear()
