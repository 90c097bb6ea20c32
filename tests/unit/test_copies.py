"""Copies of models as people bring them, and what `torch.compile` and `DataParallel` put around them."""

import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

from quadriga.core.axes import keep_frozen
from quadriga.core.computed import computed, computes_weight
from quadriga.core.copies import copy_model, wrappers
from quadriga.core.errors import BadInput, NotApplicable
from quadriga.core.setup import Setup
from quadriga.core.workload import Workload
from quadriga.measure.quality import score
from quadriga.methods.structure.low_rank import LowRank
from quadriga.methods.structure.prune_weights import PruneWeights
from quadriga.train.loop import fit
from quadriga.workloads import check

torch.set_num_threads(1)
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning"),
]
G = torch.Generator().manual_seed(0)
X = torch.randn(900, 6, generator=G)
Y = X[:, :3].argmax(1)


def old(function):
    def make(layer):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return function(layer)

    return make


def masked(layer):
    return prune.l1_unstructured(layer, "weight", 0.5)


class Kept(nn.Linear):
    """Keeps its last output, and others in a list and a dict, as for a later look at them."""

    def __init__(self, like):
        super().__init__(like.in_features, like.out_features)
        self.last, self.history = None, {"all": []}

    def forward(self, x):
        self.last = super().forward(x)
        self.history["all"] = [self.last * 2]
        return self.last


FORMS = {
    "weight_norm": old(weight_norm),
    "weight_norm, new": parametrizations.weight_norm,
    "spectral_norm": old(spectral_norm),
    "spectral_norm, new": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "masked": masked,
    "keeps outputs": Kept,
}


def net(form):
    torch.manual_seed(0)
    return nn.Sequential(form(nn.Linear(6, 12)), nn.ReLU(), form(nn.Linear(12, 12)), nn.ReLU(), nn.Linear(12, 3))


def workload(model, **changes):
    return Workload(model=model, train=(X[:300], Y[:300]), val=(X[300:600], Y[300:600]), test=(X[600:], Y[600:]), **changes)


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_a_copy_computes_the_same_and_trains(form):
    model = net(form)
    model(X[:2])  # in training mode: now it holds results of autograd
    assert check(workload(model)) == []
    copy = workload(model).build()
    model.eval(), copy.eval()
    assert torch.equal(copy(X[:50]), model(X[:50]))
    setup = Setup.of(workload(model))
    was = {k: v.clone() for k, v in model.state_dict().items()}
    first = setup.training.loss(setup.model(X[:300]), workload(model).train.batch(torch.arange(300))).mean()
    assert fit(setup, workload(model).train, epochs=5, seed=0).loss < float(first.detach())
    assert all(torch.equal(v, was[k]) for k, v in model.state_dict().items())  # the user's own is left alone
    moved = copy_model(setup.model).eval()
    assert torch.equal(moved(X[:50]), setup.model.eval()(X[:50])) and not torch.equal(moved(X[:50]), model(X[:50]))


@pytest.mark.parametrize("name", [n for n in FORMS if n != "keeps outputs"])
def test_layers_that_compute_their_weight_are_left_by_methods_that_read_it(name):
    """What lies in `weight` may be older than what it is computed from."""
    model = net(FORMS[name])
    assert computes_weight(model[0]) and not computes_weight(model[4]) and ", and 0 computes its weight" in computed(model)
    one = nn.Sequential(FORMS[name](nn.Linear(6, 6)))
    start = {"train": (X[:300], Y[:300]), "val": (X[300:600], Y[300:600]), "test": (X[600:], Y[600:])}
    setup = Setup.of(Workload(model=one, **start, trained=True))
    for method in (PruneWeights(), *([LowRank(energy=0.1)] if "weight_norm" not in name else [])):
        with pytest.raises(NotApplicable, match="no "):
            method(setup)


def test_remedies_for_layers_that_compute_their_weight():
    model = net(masked)
    assert "torch.nn.utils.prune.remove(layer, 'weight')" in computed(model)
    prune.remove(model[0], "weight"), prune.remove(model[2], "weight")
    assert computed(model) == ""
    model = net(parametrizations.weight_norm)
    assert "remove_parametrizations" in computed(model)
    for k in (0, 2):
        nn.utils.parametrize.remove_parametrizations(model[k], "weight")
    assert computed(model) == ""


class Own(nn.Module):
    def __init__(self, inner=lambda m: m):
        super().__init__()
        torch.manual_seed(0)
        self.inner = inner(nn.Linear(6, 3))

    def forward(self, x):
        return self.inner(x)


class Empty(Own):
    """A model that counts as false."""

    def __init__(self):
        super().__init__()
        self.drop = nn.Dropout(0.9)

    def __len__(self):
        return 0

    def forward(self, x):
        return self.drop(self.inner(x))


@pytest.mark.parametrize(
    ("wrapped", "names"),
    [
        (lambda: torch.compile(Own()), ["torch.compile"]),
        (lambda: torch.compile(nn.Sequential(Own())), ["torch.compile"]),
        (lambda: nn.DataParallel(Own()), ["DataParallel"]),
        (lambda: torch.compile(nn.DataParallel(Own())), ["DataParallel", "torch.compile"]),
        (lambda: Own(torch.compile), ["torch.compile"]),
        (lambda: Own(nn.DataParallel), ["DataParallel"]),
    ],
)
def test_wrappers_are_taken_away(wrapped, names):
    model = wrapped()
    assert wrappers(model) == names
    for given in (model, wrapped):
        notes = check(workload(given))
        assert len(notes) == 1 and all(name in notes[0] for name in names)
        built = workload(given).build()
        assert wrappers(built) == [] and [type(m) for m in built.modules()][-2:] == [Own, nn.Linear]
        torch.testing.assert_close(built(X), Own()(X))
    assert wrappers(model) == names  # the user's own is left alone


def test_a_module_compiled_in_place():
    model = Own()
    model.compile()
    assert wrappers(model) == ["torch.compile"] and wrappers(workload(lambda: model).build()) == []


def test_a_module_that_counts_as_false_is_scored_in_eval_mode():
    model = Empty().train()
    assert not model
    whole = workload(model)
    assert check(whole) == []
    assert score(model, whole.val, whole.metric).value == score(model.inner, whole.val, whole.metric).value
    assert model.training


@pytest.mark.parametrize("make", [torch.jit.script, lambda m: torch.jit.trace(m, X[:2])], ids=["script", "trace"])
def test_torchscript_is_refused_and_the_module_inside_is_taken(make):
    for given in (make(Own()), Own(make)):
        with pytest.raises(BadInput, match=r"TorchScript.*give the module that it was made of"):
            check(workload(given))
    assert check(workload(Own())) == []


def test_frozen_in_part():
    old = nn.Linear(3, 4)
    old.weight.requires_grad_(False)
    new = nn.Sequential(nn.Linear(3, 2, bias=False), nn.Linear(2, 4))
    keep_frozen(old, new, {id(new[0].weight)})  # one that the model holds elsewhere too
    assert [p.requires_grad for p in new.parameters()] == [True, False, True]
