"""prune_heads: whole heads go, and only theirs."""

import pytest
import torch

from quadriga.core.batch import call, tensors
from quadriga.core.errors import BadInput, NotApplicable
from quadriga.core.setup import Setup
from quadriga.methods.structure.prune_heads import PruneHeads
from quadriga.testing import tiny_attention, tiny_cnn, tiny_transformer
from quadriga.testing.setups import trained_setup
from quadriga.testing.zoo import ZOO


def outputs(model, inputs):
    with torch.no_grad():
        return tensors(call(model.eval(), inputs))[0]


def silence(setup, shared):
    """Let a key-value head, with the two query heads that use it, contribute nothing, and be the least important."""
    model = setup.model
    with torch.no_grad():
        model.out.weight[:, 8 * shared : 8 * (shared + 1)] = 0
        for layer, size in ((model.query, 8), (model.key, 4), (model.value, 4)):
            layer.weight[size * shared : size * (shared + 1)] *= 1e-3
    return setup


@pytest.mark.parametrize("shared", [0, 1])
@pytest.mark.parametrize("importance", ["magnitude", "taylor"])
def test_a_head_that_contributes_nothing_goes_and_nothing_changes(shared, importance):
    setup = silence(trained_setup(tiny_attention), shared)
    inputs = setup.context.example
    before = outputs(setup.model, inputs)
    after = PruneHeads(ratio=0.5, importance=importance)(setup).model
    assert (after.query.out_features, after.key.out_features, after.value.out_features) == (8, 4, 4)
    torch.testing.assert_close(outputs(after, inputs), before, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["bert", "llama", "qwen", "vit"])
def test_half_the_heads_of_every_attention_go(name):
    """The projection that reads the heads keeps half of its inputs; the stream between the blocks keeps its width."""
    setup = Setup.of(ZOO[name]())
    readers = ("o_proj", "attention.output.dense")
    wide = {n: (m.in_features, m.out_features) for n, m in setup.model.named_modules() if n.endswith(readers)}
    model = PruneHeads(ratio=0.5)(setup).model
    now = {n: (m.in_features, m.out_features) for n, m in model.named_modules() if n.endswith(readers)}
    assert wide and now == {n: (a // 2, b) for n, (a, b) in wide.items()}
    assert outputs(model, setup.context.example).isfinite().all()


def test_globs_choose_the_attention():
    setup = Setup.of(ZOO["bert"]())
    model = PruneHeads(ratio=0.5, only="*.layer.1.*")(setup).model
    sizes = [layer.attention.self.query.out_features for layer in model.bert.encoder.layer]
    assert sizes[0] == sizes[2] == 2 * sizes[1]


@pytest.mark.parametrize("build", [tiny_cnn, tiny_transformer])
def test_without_heads_it_refuses(build):
    with pytest.raises(NotApplicable, match="heads"):
        PruneHeads()(Setup.of(build()))


def test_an_attention_whose_code_does_not_stand_it_is_named():
    setup = Setup.of(ZOO["whisper"]())
    with pytest.raises(NotApplicable, match=r"encoder.layers.0.self_attn"):
        PruneHeads()(setup)


def test_a_ratio_that_takes_no_head_is_refused():
    with pytest.raises(NotApplicable, match="loses a head"):
        PruneHeads(ratio=0.1)(Setup.of(tiny_attention()))


@pytest.mark.parametrize("ratio", [0.0, 1.0, -1.0])
def test_a_ratio_outside_is_refused(ratio):
    with pytest.raises(BadInput, match="ratio"):
        PruneHeads(ratio=ratio)
