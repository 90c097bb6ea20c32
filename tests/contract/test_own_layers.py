"""Every method that changes models, on layers that are subclasses with a forward of their own: right, or refused in words."""

from functools import cache

import pytest
import torch
from torch import nn

from quadriga import methods
from quadriga.core.errors import NotApplicable
from quadriga.core.method import Family, Numerics
from quadriga.core.recipe import Recipe, Step
from quadriga.testing import make_setups, starting
from quadriga.testing.combine import REFUSED, WORKS, Combiner
from quadriga.testing.own_layers import OWN_LAYERS, own_layers
from quadriga.testing.setups import fake_time
from quadriga.verify.promise import Witness

torch.set_num_threads(1)
PROMISING = [
    name
    for name, method in methods.available().items()
    if method.numerics is not Numerics.CHANGED and "model" in {method.family.slot, *method.writes}
]
STRUCTURE = [name for name, method in methods.available().items() if method.family is Family.STRUCTURE]
REPLACING = ("depthwise", "grouped", "low_rank", "share_kernels", "tucker")  # put other layers in the place of single ones


@cache
def combiner(kind):
    return Combiner(own_layers(kind), {"time": fake_time}, export=False)


def setups_of(kind):
    made = make_setups({kind: lambda trained=True: own_layers(kind, trained=trained)})
    return {k: make for k, make in made.items() if k.endswith("trained")}


@cache
def start(kind, name):
    return starting(methods.available()[name], setups_of(kind))


def own(model):
    """The names and classes of layers with a forward of their own."""
    return {name: type(m) for name, m in model.named_modules() if type(m).__module__ == "quadriga.testing.own_layers"}


def cases():
    """Every method on every kind; three kinds for each method are part of `make test`, the others of `make test-all`."""
    for place, name in enumerate(sorted({*STRUCTURE, *PROMISING})):
        for number, kind in enumerate(OWN_LAYERS):
            yield pytest.param(kind, name, marks=() if (number - place) % 3 == 0 else pytest.mark.slow)


@pytest.mark.parametrize(("kind", "name"), list(cases()))
def test_it_works_or_is_refused_with_a_reason(kind, name):
    """Applied as a walk does: the same interface, finite outputs and a finite step of training; or a reason."""
    one = start(kind, name)
    outcome = combiner(kind)(Recipe((Step(name, {k: v for k in type(one).fields() if (v := getattr(one, k)) is not None}),)))
    assert outcome.status in (WORKS, REFUSED), outcome
    assert outcome.status == WORKS or len(outcome.reason) > 10
    assert "promises" not in outcome.reason, "a method knows by itself what it can do"


@pytest.mark.parametrize("name", PROMISING)
@pytest.mark.parametrize("kind", OWN_LAYERS)
def test_equal_outputs_where_they_are_promised(kind, name):
    (make,) = setups_of(kind).values()
    setup, one = make(), methods.available()[name]()
    witness = Witness(setup.model, setup.context.example, one.numerics)
    try:
        after = one(setup)
    except NotApplicable as refusal:
        assert len(refusal.reason) > 10
        return
    assert witness.broken(after.model) == ""


@pytest.mark.parametrize("name", REPLACING)
@pytest.mark.parametrize("kind", OWN_LAYERS)
def test_no_layer_with_a_forward_of_its_own_is_replaced(kind, name):
    (make,) = setups_of(kind).values()
    setup = make()
    before = own(setup.model)
    try:
        after = start(kind, name)(setup)
    except NotApplicable:
        return
    assert own(after.model) == before


@pytest.mark.parametrize(
    ("kind", "gone", "words"),
    [
        ("norm_act", 2, ""),
        ("same_padding", 2, ""),
        ("scaled_head", 2, ""),
        ("squashed_norm", 0, "SquashedNorm that computes more"),
        ("standardized", 0, "which computes its weight"),
        ("channels_first", 0, "no batch normalization"),
    ],
)
def test_what_is_folded_and_what_is_not(kind, gone, words):
    (make,) = setups_of(kind).values()
    setup = make()
    count = lambda model: sum(isinstance(m, nn.BatchNorm2d) for m in model.modules())  # noqa: E731
    before, acts = count(setup.model), sum(type(m) is nn.ReLU for m in setup.model.modules())
    if words:
        with pytest.raises(NotApplicable, match=words):
            methods.available()["fold_batchnorm"]()(setup)
    else:
        methods.available()["fold_batchnorm"]()(setup)
    assert count(setup.model) == before - gone
    assert sum(type(m) is nn.ReLU for m in setup.model.modules()) == acts


@pytest.mark.parametrize("kind", ["acted_norm", "offset_norm", "scaled_linear"])
def test_smooth_quant_takes_no_norm_and_no_linear_layer_with_a_forward_of_its_own(kind):
    (make,) = setups_of(kind).values()
    with pytest.raises(NotApplicable, match="no normalization is read by linear layers alone"):
        methods.available()["smooth_quant"]()(make())


@pytest.mark.parametrize("kind", OWN_LAYERS)
def test_a_wider_network_is_the_same_function(kind):
    """Whatever a layer computes from its weight: units that are copied are shared out among its readers, or left."""
    (make,) = setups_of(kind).values()
    setup = make()
    witness, before = Witness(setup.model, setup.context.example), sum(p.numel() for p in setup.model.parameters())
    model = methods.available()["widen"]()(setup).model
    assert witness.broken(model) == "" and sum(p.numel() for p in model.parameters()) > before


def test_channels_of_standardized_convolutions_are_pruned():
    (make,) = setups_of("standardized").values()
    setup = make()
    widths = [m.out_channels for m in setup.model if isinstance(m, nn.Conv2d)]
    model = methods.available()["prune_channels"](scope="layer")(setup).model
    assert [m.out_channels for m in model if isinstance(m, nn.Conv2d)] == [n // 2 for n in widths]
