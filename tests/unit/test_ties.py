"""A tie survives copy, save, load, structure methods, quantization and export, and is counted once."""

import copy

import pytest
import torch

from quadriga import runtime
from quadriga.core.errors import NotApplicable
from quadriga.core.recipe import step
from quadriga.core.setup import Setup
from quadriga.core.slots import RuntimeSpec
from quadriga.measure.size import parameters
from quadriga.methods import build
from quadriga.methods.structure.tie_embeddings import TieEmbeddings
from quadriga.methods.structure.tie_layers import TieLayers
from quadriga.testing import tiny_transformer
from quadriga.testing.setups import trained_setup
from quadriga.testing.zoo import ZOO

torch.set_num_threads(1)


def tied_llama():
    return TieLayers()(TieEmbeddings()(Setup.of(ZOO["llama"]())))


def ties(model):
    """How many names share a parameter with another."""
    named = list(model.named_parameters(remove_duplicate=False))
    return len(named) - len({id(p) for _, p in named})


def test_a_copy_is_tied_in_itself_alone():
    model = tied_llama().model
    twin = copy.deepcopy(model)
    assert ties(twin) == ties(model) > 10 and parameters(twin) == parameters(model)
    assert twin.lm_head.weight is not model.lm_head.weight and twin.lm_head.weight is twin.model.embed_tokens.weight


def test_a_rebuilt_network_takes_the_state_and_stays_tied():
    model, other = tied_llama().model, tied_llama().model
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1)
    other.load_state_dict(model.state_dict())
    assert ties(other) == ties(model)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True))


STEPS = [
    step("prune_hidden", ratio=0.5),
    step("prune_heads", ratio=0.5),
    step("prune_blocks", ratio=0.25),
    step("prune_channels", ratio=0.25),
    step("shrink", features=0.5),
    step("low_rank", ratio=0.5),
    step("quantize_int8", activations="weights"),
]


@pytest.mark.parametrize("one", STEPS, ids=lambda s: s.method)
def test_methods_keep_ties_or_refuse(one):
    """Whatever shared a parameter before and is still there shares it afterwards."""
    setup = TieLayers()(trained_setup(tiny_transformer))
    before = _partners(setup.model)
    try:
        after = build(one)(setup).model
    except NotApplicable as refusal:
        assert refusal.reason
        after = setup.model
    now = _partners(after)
    assert all(now[a] == now[b] for a, b in before_pairs(before) if a in now and b in now)


def _partners(model):
    return {name: id(p) for name, p in model.named_parameters(remove_duplicate=False)}


def before_pairs(named):
    owners = {}
    for name, identity in named.items():
        owners.setdefault(identity, []).append(name)
    return [(names[0], other) for names in owners.values() for other in names[1:]]


@pytest.mark.parametrize("name", ["eager", "onnxruntime"])
def test_export_stores_a_shared_weight_once(name, tmp_path):
    pytest.importorskip("onnxruntime") if name == "onnxruntime" else None
    sizes = {}
    for label, setup in {"tied": TieLayers()(trained_setup(tiny_transformer)), "free": trained_setup(tiny_transformer)}.items():
        built = runtime.build(setup.model.eval(), RuntimeSpec(name=name), setup.context, tmp_path / label)
        found, wanted = built.run()(setup.context.example), setup.model(setup.context.example)
        torch.testing.assert_close(found, wanted.detach(), rtol=1e-4, atol=1e-5)
        sizes[label] = (sum(f.stat().st_size for f in (tmp_path / label).rglob("*") if f.is_file()), parameters(setup.model))
    saved = 4 * (sizes["free"][1] - sizes["tied"][1])
    assert saved > 5000 and sizes["free"][0] - sizes["tied"][0] > 0.9 * saved
