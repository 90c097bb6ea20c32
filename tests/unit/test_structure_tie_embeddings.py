"""tie_embeddings: one weight at both ends."""

import pytest
import torch
from torch import nn

from quadriga.core.axes import Patch
from quadriga.core.errors import NotApplicable
from quadriga.core.setup import Setup
from quadriga.measure.size import parameters
from quadriga.methods.structure.tie_embeddings import TieEmbeddings, tie
from quadriga.testing import tiny_mlp, tiny_transformer
from quadriga.testing.setups import trained_setup
from quadriga.testing.zoo import ZOO

torch.set_num_threads(1)


@pytest.mark.parametrize(("start", "factor"), [("embedding", 0.0), ("head", 1.0), ("mean", 0.5)])
def test_the_shared_weight_starts_where_it_is_told(start, factor):
    embedding, head = nn.Embedding(7, 4), nn.Linear(4, 7)
    wanted, bias = torch.lerp(embedding.weight.data, head.weight.data, factor), head.bias
    patch = Patch()
    tie(embedding, head, start, patch)
    assert head.weight is embedding.weight and head.bias is bias
    torch.testing.assert_close(head.weight.data, wanted)
    patch.undo()
    assert head.weight is not embedding.weight


def test_a_llama_loses_its_head_and_both_ends_train_as_one():
    setup = Setup.of(ZOO["llama"]())
    count, shape = parameters(setup.model), setup.model.lm_head.weight.shape
    model = TieEmbeddings()(setup).model
    assert parameters(model) == count - shape.numel()
    out = model(**setup.context.example).logits
    out.square().mean().backward()
    both = model.lm_head.weight.grad.clone()
    assert model.model.embed_tokens.weight.grad is model.lm_head.weight.grad
    untied = Setup.of(ZOO["llama"]()).model
    untied.load_state_dict(model.state_dict())
    untied(**setup.context.example).logits.square().mean().backward()
    torch.testing.assert_close(both, untied.lm_head.weight.grad + untied.model.embed_tokens.weight.grad)


def test_what_is_tied_or_has_no_pair_is_refused():
    for build in (tiny_transformer, tiny_mlp):
        with pytest.raises(NotApplicable, match="one shape that are not tied yet"):
            TieEmbeddings()(trained_setup(build))
