"""`nn.MultiheadAttention` in its open form answers alike, and loses heads and widths."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import weight_norm

from quadriga.core.axes import AxisGraph, opened
from quadriga.core.axes.opened import OpenAttention
from quadriga.core.errors import NotApplicable
from quadriga.core.setup import Setup
from quadriga.core.workload import Workload
from quadriga.methods.structure.prune_heads import PruneHeads
from quadriga.methods.structure.shrink import Shrink

torch.set_num_threads(1)
CAUSAL = nn.Transformer.generate_square_subsequent_mask(5)
PADDING = torch.tensor([[False] * 5, [False] * 3 + [True] * 2, [False] * 4 + [True]])
CALLS = {
    "plain": {},
    "without weights": {"need_weights": False},
    "weights of each head": {"average_attn_weights": False},
    "causal": {"attn_mask": CAUSAL, "need_weights": False},
    "causal by hint": {"attn_mask": CAUSAL, "is_causal": True, "need_weights": False},
    "causal hint with padding": {"attn_mask": CAUSAL.isinf(), "is_causal": True, "key_padding_mask": PADDING},
    "bool mask": {"attn_mask": CAUSAL.isinf()},
    "a mask a head": {"attn_mask": torch.randn(12, 5, 5)},
    "padding": {"key_padding_mask": PADDING, "need_weights": False},
}


def pair(**options):
    torch.manual_seed(0)
    closed = nn.MultiheadAttention(8, 4, **options)
    nn.init.normal_(closed.in_proj_bias) if closed.in_proj_bias is not None else None
    return closed, OpenAttention(closed)


def assert_alike(one, other):
    for a, b in zip(one, other, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("options", [{"batch_first": True}, {}, {"bias": False, "batch_first": True}])
def test_it_answers_as_the_packed_module(call, options):
    closed, ours = pair(**options)
    x = torch.randn(3, 5, 8) if closed.batch_first else torch.randn(5, 3, 8)
    assert_alike(ours(x, x, x, **CALLS[call]), closed(x, x, x, **CALLS[call]))


def test_keys_and_values_of_other_widths_and_one_example_without_a_batch():
    closed, ours = pair(kdim=6, vdim=7)
    inputs = torch.randn(5, 8), torch.randn(4, 6), torch.randn(4, 7)
    assert_alike(ours(*inputs), closed(*inputs))
    assert ours.num_heads == 4 and ours.embed_dim == 8


def test_training_draws_the_same_dropout():
    closed, ours = pair(dropout=0.5, batch_first=True)
    x = torch.randn(3, 5, 8)
    outputs = []
    for module in (closed, ours):
        torch.manual_seed(1)
        outputs.append(module.train()(x, x, x, need_weights=False)[0])
    torch.testing.assert_close(*outputs)


class Reader(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(20, 16)
        layer = nn.TransformerEncoderLayer(16, 4, 24, batch_first=True, dropout=0.0)
        self.body, self.head = nn.TransformerEncoder(layer, 2), nn.Linear(16, 3)

    def forward(self, tokens):
        return self.head(self.body(self.embed(tokens)).mean(1))


def setup():
    torch.manual_seed(0)
    tokens, labels = torch.randint(20, (12, 7)), torch.randint(3, (12,))
    split = (tokens, labels)
    return Setup.of(Workload(model=Reader(), train=split, val=split, test=split, trained=True))


@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
def test_a_transformer_encoder_loses_heads_and_widths():
    one, tokens = setup(), torch.randint(20, (4, 7))
    before = copy.deepcopy(one.model).eval()
    with opened(one.model):
        torch.testing.assert_close(one.model.eval()(tokens), before(tokens))
    heads = PruneHeads(ratio=0.5)(setup()).model
    assert [layer.self_attn.num_heads for layer in heads.body.layers] == [2, 2]
    assert heads.body.layers[0].self_attn.q_proj.out_features == 8
    thin = Shrink(embeddings=0.5)(setup()).model
    assert thin.embed.embedding_dim == 8 and thin.body.layers[1].self_attn.out_proj.out_features == 8


def test_a_head_that_does_nothing_is_cut_without_a_trace():
    ours = pair(batch_first=True)[1]
    with torch.no_grad():
        ours.out_proj.weight[:, 2:4] = 0  # what the second of four heads gives is not read
    x = torch.randn(3, 5, 8)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.attend = ours

        def forward(self, x):
            return self.attend(x, x, x, need_weights=False)[0]

    net = Net().eval()
    wanted = net(x)
    graph = AxisGraph.trace(net, x)
    graph.cut("attend.q_proj", torch.tensor([0, 2, 3]))
    torch.testing.assert_close(net(x), wanted)
    assert ours.num_heads == 3


def test_what_raises_inside_leaves_the_module_packed():
    model = setup().model
    with pytest.raises(NotApplicable), opened(model):
        assert isinstance(model.body.layers[0].self_attn, OpenAttention)
        raise NotApplicable("as a method does")
    assert type(model.body.layers[0].self_attn) is nn.MultiheadAttention


def test_what_it_cannot_take_over_stays_packed():
    model = nn.ModuleDict({"a": nn.MultiheadAttention(8, 2, add_bias_kv=True), "b": nn.MultiheadAttention(8, 2)})
    model["c"] = nn.MultiheadAttention(8, 2)
    model["c"].in_proj_weight = model["b"].in_proj_weight
    with opened(model):
        assert all(type(m) is nn.MultiheadAttention for m in model.values())


class Normed(nn.Module):
    """Convolutions and a Linear under weight_norm, as vocoders have them."""

    def __init__(self):
        super().__init__()
        self.a, self.b = weight_norm(nn.Conv1d(4, 12, 3)), weight_norm(nn.Conv1d(12, 8, 3))
        self.fc = weight_norm(nn.Linear(8, 3))

    def forward(self, x):
        return self.fc(torch.relu(self.b(torch.relu(self.a(x)))).mean(-1))


def test_a_weight_normed_network_is_cut_as_its_plain_twin():
    torch.manual_seed(0)
    net, x = Normed(), torch.randn(2, 4, 9)
    torch.manual_seed(0)
    twin = Normed()  # and no copy, whose class would be shared with the first
    for layer in (twin.a, twin.b, twin.fc):
        parametrize.remove_parametrizations(layer, "weight")
    cut = []
    for model in (net, twin):
        split = (torch.randn(20, 4, 9), torch.randint(3, (20,)))
        one = Setup.of(Workload(model=model, train=split, val=split, test=split, trained=True))
        cut.append(Shrink(filters=0.5, round_to=1)(one).model)
    torch.testing.assert_close(cut[0](x), cut[1](x))
    assert cut[0].a.out_channels == 6 and not parametrize.is_parametrized(cut[0].b)


def test_weight_norm_comes_back_where_a_method_refuses():
    net, x = Normed(), torch.randn(2, 4, 9)
    before = net(x)
    with pytest.raises(NotApplicable), opened(net):
        assert not parametrize.is_parametrized(net.a)
        raise NotApplicable("as a method does")
    assert parametrize.is_parametrized(net.a) and torch.equal(net(x), before)
