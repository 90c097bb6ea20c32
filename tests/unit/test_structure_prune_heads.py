"""prune_heads: whole heads go, and only theirs."""

import pytest
import torch
from torch import nn

from quadriga import Workload
from quadriga.core.axes import AxisGraph
from quadriga.core.batch import call, tensors
from quadriga.core.errors import BadInput, NotApplicable
from quadriga.core.setup import Setup
from quadriga.measure.size import parameters
from quadriga.methods.structure.prune_heads import PruneHeads
from quadriga.testing import tiny_attention, tiny_cnn, tiny_lstm, tiny_transformer
from quadriga.testing.setups import trained_setup
from quadriga.testing.zoo import ZOO
from quadriga.workloads.ready.gpt_shakespeare import GPT


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


class Interleaved(nn.Module):
    """Heads outside, projections inside, and the number of heads in an attribute of another name."""

    def __init__(self):
        super().__init__()
        self.n, self.wide = 4, 16
        self.qkv, self.out = nn.Linear(12, 48), nn.Linear(16, 12)

    def forward(self, x):
        q, k, v = self.qkv(x).view(x.shape[0], x.shape[1], self.n, 3, -1).permute(3, 0, 2, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.out(mixed.transpose(1, 2).reshape(x.shape[0], x.shape[1], self.wide))


class Repeated(nn.Module):
    """Grouped queries by `repeat_interleave`, one key-value head for two query heads."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.out = nn.Linear(12, 16), nn.Linear(12, 8), nn.Linear(12, 8), nn.Linear(16, 12)

    def forward(self, x):
        q, k, v = (p(x).view(*x.shape[:2], -1, 4).transpose(1, 2) for p in (self.q, self.k, self.v))
        mixed = nn.functional.scaled_dot_product_attention(q, *(t.repeat_interleave(2, dim=1) for t in (k, v)))
        return self.out(mixed.transpose(1, 2).flatten(2))


class Literal(Interleaved):
    """The number of heads stands in the code."""

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (4, 3, -1)).permute(3, 0, 2, 1, 4)
        return self.out(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def workload_of(model, x=None, **given):
    x = torch.randn(64, 5, 12) if x is None else x
    data = (x, torch.zeros_like(x))
    return Workload(
        model=model,
        train=data,
        val=data,
        test=data,
        **(given or {"loss": "squared_error", "metric": "mean_squared_error"}),
    )


NETWORKS = {
    **ZOO,
    "tiny": tiny_transformer,
    "shakespeare": lambda: workload_of(GPT(2, 16, 4, 8), torch.randint(256, (64, 8)), metric="bits_per_byte"),
    "repeated": lambda: workload_of(Repeated()),
    "interleaved": lambda: workload_of(Interleaved()),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_in_every_style_of_attention_an_idle_head_goes_and_nothing_changes(name):
    """Split or fused projections, as `view`, `split` or `chunk`, the number of heads computed or in an attribute."""
    setup = Setup.of(NETWORKS[name]())
    graph = AxisGraph.trace(setup.model, setup.context.example)
    heads = [g for g in graph.groups() if g.split]
    assert heads
    with torch.no_grad():
        for member in (m for group in heads for m in group.members):
            idle = (member.units == 1).to(member.tensor.dtype)
            member.tensor.mul_((1 - idle * (1 if not member.producer else 0.999)).reshape(_along(member)))
    before = outputs(setup.model, setup.context.example)
    size = parameters(setup.model)
    pruned = PruneHeads(ratio=0.75 / heads[0].size)(setup).model
    assert parameters(pruned) < size
    torch.testing.assert_close(outputs(pruned, setup.context.example), before, rtol=1e-4, atol=1e-5)


def _along(member):
    return [-1 if k == member.dim else 1 for k in range(member.tensor.dim())]


def test_globs_choose_the_attention():
    setup = Setup.of(ZOO["bert"]())
    model = PruneHeads(ratio=0.5, only="*.layer.1.*")(setup).model
    sizes = [layer.attention.self.query.out_features for layer in model.bert.encoder.layer]
    assert sizes[0] == sizes[2] == 2 * sizes[1]


@pytest.mark.parametrize("build", [tiny_cnn, tiny_lstm])
def test_without_heads_it_refuses(build):
    with pytest.raises(NotApplicable, match="heads"):
        PruneHeads()(Setup.of(build()))


def test_a_number_of_heads_in_the_code_is_named_and_the_model_left():
    setup = Setup.of(workload_of(Literal()))
    with pytest.raises(NotApplicable, match=r"qkv cannot lose whole parts.*stands in the code"):
        PruneHeads()(setup)
    assert (setup.model.n, setup.model.qkv.out_features) == (4, 48)


def test_a_ratio_that_takes_no_head_is_refused():
    with pytest.raises(NotApplicable, match="no width changes"):
        PruneHeads(ratio=0.1)(Setup.of(tiny_attention()))


@pytest.mark.parametrize("ratio", [0.0, 1.0, -1.0])
def test_a_ratio_outside_is_refused(ratio):
    with pytest.raises(BadInput, match="ratio"):
        PruneHeads(ratio=ratio)
