"""The axis graph: what is cut together, and that nothing else changes."""

from copy import deepcopy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import (
    Apart,
    Bare,
    Block,
    Cells,
    Concat,
    Last,
    LeNet,
    Projected,
    Recurrent,
    Squeeze,
    Turned,
    Windows,
    grouped,
    resnet,
    transposed,
)
from torch import Tensor, nn
from torch.nn import functional

from quadriga.core.axes import AxisGraph, Reference
from quadriga.core.errors import NotApplicable

torch.set_num_threads(1)
TRACED = {}


NETS = {
    "lenet": (LeNet, lambda: torch.randn(2, 1, 32, 32)),
    "resnet": (resnet, lambda: torch.randn(2, 1, 8, 8)),
    "lstm": (lambda: Recurrent(nn.LSTM), lambda: torch.randint(20, (2, 5))),
    "gru": (lambda: Recurrent(nn.GRU), lambda: torch.randint(20, (2, 5))),
    "last": (Last, lambda: torch.randn(2, 5, 4)),
    "concat": (Concat, lambda: torch.randn(2, 3, 4, 4)),
    "apart": (Apart, lambda: torch.randn(2, 5)),
    "grouped": (grouped, lambda: torch.randn(2, 2, 9, 9)),
    "squeeze": (Squeeze, lambda: torch.randn(2, 1, 6, 6)),
    "bare": (Bare, lambda: torch.randn(2, 4)),
    "transposed": (transposed, lambda: torch.randn(2, 2, 6, 6)),
    "projected": (Projected, lambda: torch.randn(2, 5, 4)),
    "turned": (Turned, lambda: torch.randn(2, 4)),
    "windows": (Windows, lambda: torch.randn(2, 5, 8)),
    "cells": (Cells, lambda: torch.randn(2, 3, 4)),
}


def make(name: str, seed: int = 0) -> tuple[nn.Module, Tensor]:
    """A network in double precision with statistics that are not trivial, and an example."""
    torch.manual_seed(seed)
    build, draw = NETS[name]
    net, x = build().double().eval(), draw()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight, module.bias, module.running_mean):
                nn.init.normal_(tensor)
            nn.init.uniform_(module.running_var, 0.5, 2)
    return net, x.double() if x.is_floating_point() else x


def traced(name):
    """A fresh copy's graph; tracing is what costs time, so the net is traced once and reset."""
    if name not in TRACED:
        net, x = make(name)
        TRACED[name] = (AxisGraph.trace(net, x), x)
    return TRACED[name]


def silence(group, gone):
    """Zero the matrices that hold the units: what reads them reads nothing. A tied matrix makes and reads along one axis."""
    for member in group.members:
        if len(member.units) and member.tensor.dim() > 1:
            rows = torch.isin(member.units, gone)
            member.tensor.data.index_fill_(member.dim, rows.nonzero().flatten(), 0)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.sampled_from(sorted(NETS)), st.randoms(use_true_random=False))
def test_cutting_silent_units_changes_nothing(name, random):
    """Theorem: a unit whose outgoing weights are zero can go; outputs stay, and parameters drop as computed."""
    graph, x = traced(name)
    group = random.choice([g for g in graph.groups() if not g.fixed])
    gone = torch.tensor(sorted(random.sample(range(group.size), random.randint(1, group.size - 1))))
    keep = torch.tensor([u for u in range(group.size) if u not in gone])
    saved = [(t, t.data.clone()) for t in (*graph.model.parameters(), *graph.model.buffers())]
    silence(group, gone)
    with torch.no_grad():
        before = graph.model(x)
        sizes = {id(t): t.numel() for t in graph.model.parameters()}
        for tensor in {id(m.tensor): m.tensor for m in group.members if id(m.tensor) in sizes}.values():
            for member in (m for m in group.members if m.tensor is tensor):
                kept = int((~torch.isin(member.units, gone)).sum())
                sizes[id(tensor)] = sizes[id(tensor)] * kept // len(member.units)
        try:
            patch = graph.cut(group, keep)
        except NotApplicable as error:
            assert "would be left" in error.reason  # all units of one of the joined layers
        else:
            torch.testing.assert_close(graph.model(x), before, rtol=1e-9, atol=1e-9)
            assert {id(t): t.numel() for t in graph.model.parameters()} == sizes
            patch.undo()
    for tensor, data in saved:
        assert tensor.shape == data.shape
        tensor.data = data


@pytest.mark.filterwarnings("ignore:The tensor attributes self.rnn._flat_weights")  # torch's own, for every LSTM
@pytest.mark.parametrize("name", sorted(NETS))
def test_every_cut_model_trains_copies_saves_and_exports(name):
    net, x = make(name)
    graph = AxisGraph.trace(net, x)
    loss = net(x).square().mean()
    loss.backward()  # gradients of the old shapes must not survive
    reference = Reference.of(net, x)
    patch, refused = graph.cut_each({g: torch.arange((g.size + 1) // 2) for g in graph.groups() if not g.fixed})
    assert not refused
    assert Reference.of(net, x).shapes == reference.shapes
    before = {k: v.clone() for k, v in net.state_dict().items()}
    optimizer = torch.optim.SGD(net.parameters(), 0.01)
    net.train()
    functional.mse_loss(net(x), torch.ones_like(net(x))).backward()
    optimizer.step()
    assert any(not torch.equal(v, before[k]) for k, v in net.state_dict().items())
    twin = deepcopy(net).eval()
    twin.load_state_dict(net.state_dict())
    torch.testing.assert_close(torch.export.export(twin, (x,)).module()(x), net.eval()(x))
    check_fields(net)
    patch.undo()
    assert Reference.of(net, x).shapes == reference.shapes


def check_fields(net):
    """Every standard layer built anew from its repr holds the same shapes."""
    kinds = (nn.Linear, nn.Conv2d, nn.ConvTranspose2d, nn.LSTM, nn.GRU, nn.BatchNorm2d, nn.Embedding, nn.PReLU)
    for module in (m for m in net.modules() if type(m) in kinds):
        fresh = eval(repr(module), {k: getattr(nn, k) for k in dir(nn)})
        assert {k: v.shape for k, v in fresh.state_dict().items()} == {k: v.shape for k, v in module.state_dict().items()}


def test_groups_of_a_residual_network():
    graph = AxisGraph.trace(*make("resnet"))
    found = {g.name: g for g in graph.groups()}
    assert found["0"].layers == ("0", "3.conv2")  # the stem and what is added to it
    assert found["4.conv2"].layers == ("4.conv2", "4.short.0", "5.conv2")
    assert {k for k, g in found.items() if g.fixed} == {"8"}
    names = {(m.names[0], m.dim) for m in found["3.conv1"].members}
    states = {"weight", "bias", "running_mean", "running_var"}
    assert names == {("3.conv1.weight", 0), ("3.conv2.weight", 1)} | {(f"3.bn1.{s}", 0) for s in states}


def test_concatenated_groups_stay_apart_unless_joined():
    assert {g.name: g.size for g in AxisGraph.trace(*make("apart")).groups()} == {"a": 4, "b": 6, "fc": 2}
    graph = AxisGraph.trace(*make("concat"))
    assert set(graph.group("a").layers) == {"a", "b", "c"} and graph.group("a").size == 10
    with pytest.raises(NotApplicable, match=r"nothing of b\.weight would be left"):
        graph.cut("a", torch.arange(4))


def test_one_index_set_over_gates_layers_and_directions():
    net, x = make("lstm")
    AxisGraph.trace(net, x).cut("rnn", torch.tensor([1, 4, 6]))
    original, _ = make("lstm")
    gates = torch.cat([torch.tensor([1, 4, 6]) + 8 * g for g in range(4)])
    assert torch.equal(net.rnn.weight_hh_l1_reverse, original.rnn.weight_hh_l1_reverse[gates][:, [1, 4, 6]])
    assert torch.equal(net.rnn.weight_ih_l1, original.rnn.weight_ih_l1[gates][:, [1, 4, 6, 9, 12, 14]])
    assert net.rnn.hidden_size == 3 and net.rnn.input_size == 6


def test_depthwise_groups_follow():
    net, x = make("grouped")
    AxisGraph.trace(net, x).cut("2", torch.tensor([0, 2]))  # two of three in each of four groups, then depthwise × 2
    assert net[2].groups == 4 and net[2].weight.shape == (8, 2, 3, 3)
    assert net[4].groups == 8 and net[4].weight.shape == (16, 1, 3, 3) and net[5].in_channels == 16


class Tied(nn.Module):
    """A tied head, as in language models, and two layers that share one weight."""

    def __init__(self):
        super().__init__()
        self.embed, self.up, self.down = nn.Embedding(11, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight, self.down.weight = self.embed.weight, self.up.weight

    def forward(self, tokens):
        return self.head(self.down(torch.relu(self.up(self.embed(tokens)))))


def test_ties_are_kept_and_cut_once():
    net, x = Tied(), torch.randint(11, (2, 3))
    graph = AxisGraph.trace(net, x)
    assert set(graph.group("embed").layers) == {"embed", "head", "up", "down"}  # the shared weight joins its two widths
    assert all("up.weight" not in m.names or m.names == ("up.weight", "down.weight") for m in graph.group("up").members)
    graph.cut("embed", torch.arange(5))
    assert net.head.weight is net.embed.weight and net.down.weight is net.up.weight
    assert net.head.weight.shape == (11, 5) and net.up.weight.shape == (5, 5) and net.head.in_features == 5
    assert net(x).shape == (2, 3, 11)


class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x):
        x = self.fc(x)
        if x.sum() > 0:
            return x
        return -x


def test_untraceable_code_is_refused_with_layer_and_line():
    net = nn.Sequential(nn.Linear(4, 4), Branches())
    with pytest.raises(NotApplicable, match=r"1 cannot be traced at test_axes\.py:\d+"):
        AxisGraph.trace(net, torch.randn(2, 4))


class Odd(nn.Module):
    """Transforms features, which no rule covers, and reads fixed positions of others."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.d = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 5), nn.Linear(3, 2)

    def forward(self, x):
        x = self.b(torch.fft.fft(self.a(x)).real)
        return self.d(self.c(x)[:, :3])


def test_what_is_not_understood_is_fixed_and_says_where():
    graph = AxisGraph.trace(Odd(), torch.randn(2, 4))
    assert "fft" in graph.group("a").fixed and "test_axes.py:" in graph.group("a").fixed
    assert "names positions" in graph.group("c").fixed
    assert not graph.group("b").fixed
    with pytest.raises(NotApplicable, match="a has a fixed width"):
        graph.cut("a", torch.arange(3))
    assert graph.model.a.out_features == 6


def test_weights_that_are_computed_are_cut_at_their_source_or_fixed():
    """weight_norm's weight comes out of an operator without a rule: its layer stays, its neighbours may go."""
    normed = nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 6, 3))
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 1), normed, nn.Flatten(), nn.Linear(24, 2))
    graph = AxisGraph.trace(net, torch.randn(2, 1, 6, 6))
    assert "is not understood" in graph.group("1").fixed and not graph.group("0").fixed
    graph.cut("0", torch.arange(2))
    assert net[1].in_channels == 2 and net[2].in_channels == 4


class Heads(nn.Module):
    """An attention whose number of heads is `heads`, or follows from the width."""

    def __init__(self, heads, sizes):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(16, 16) for _ in range(4))
        self.heads, self.sizes = heads, sizes

    def forward(self, x):
        q, k, v = (f(x).unflatten(-1, self.sizes).transpose(1, 2) for f in (self.q, self.k, self.v))
        return self.o(functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def test_heads_are_whole_or_refused():
    """`unflatten(-1, (4, -1))` would take a narrower width silently, as four thinner heads."""
    x = torch.randn(2, 5, 16)
    graph = AxisGraph.trace(Heads(4, (-1, 4)), x)
    assert graph.group("q").size == 4 and set(graph.group("q").layers) == {"q", "k", "v"}
    net = deepcopy(graph.model)
    silence(group := graph.group("q"), torch.tensor([1]))
    before = graph.model(x)
    graph.cut(group, torch.tensor([0, 2, 3]))
    torch.testing.assert_close(graph.model(x), before)
    assert graph.model.q.out_features == 12 and net.q.out_features == 16
    refused = AxisGraph.trace(Heads(4, (4, -1)), x)
    with pytest.raises(NotApplicable, match="cannot lose whole parts"):
        refused.cut("q", torch.tensor([0, 2, 3]))
    assert refused.model.q.out_features == 16


def test_a_transposed_convolution_loses_the_same_positions_in_every_group():
    net, x = make("transposed")
    graph = AxisGraph.trace(net, x)
    assert [(g.name, g.size, g.fixed) for g in graph.groups()][:2] == [("0", 4, ""), ("2", 6, "")]
    graph.cut_all({graph.group("0"): torch.tensor([1, 2, 3]), graph.group("2"): torch.tensor([0, 5])})
    assert (net[2].in_channels, net[2].out_channels, tuple(net[2].weight.shape)) == (6, 4, (6, 2, 2, 2))


def test_group_norm_loses_the_same_positions_in_every_group():
    net = nn.Sequential(nn.Conv2d(1, 12, 3), nn.GroupNorm(3, 12), nn.ReLU(), nn.Flatten(), nn.Linear(12, 2))
    graph = AxisGraph.trace(net, torch.randn(2, 1, 3, 3))
    assert graph.group("0").size == 4
    graph.cut("0", torch.tensor([0, 3]))
    assert net[1].num_channels == 6 and net[4].in_features == 6


def test_undo_gives_everything_back():
    net, x = LeNet(), torch.randn(2, 1, 32, 32)
    before, text, kind = {k: v.clone() for k, v in net.state_dict().items()}, str(net), type(net)
    graph = AxisGraph.trace(net, x)
    patch = graph.cut_all({graph.group("conv2"): torch.arange(9), graph.group("fc1"): torch.arange(7)})
    assert str(net) != text and type(net) is not kind
    patch.undo()
    assert str(net) == text and type(net) is kind
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def test_modes_are_left_as_they_are():
    net = nn.Sequential(Block(1, 1, 1), nn.Flatten(), nn.Linear(16, 2)).train()
    net[0].bn1.eval()  # frozen statistics
    state = {k: v.clone() for k, v in net.state_dict().items()}
    AxisGraph.trace(net, torch.randn(2, 1, 4, 4))
    assert net.training and net[0].bn2.training and not net[0].bn1.training
    assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items())


def test_transformers_with_dict_inputs():
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=24, vocab_size=30, num_labels=3
    )
    net = transformers.BertForSequenceClassification(config).eval()
    x = {"input_ids": torch.randint(30, (2, 7)), "attention_mask": torch.ones(2, 7, dtype=torch.long)}
    graph = AxisGraph.trace(net, x)
    free = {g.name: g.size for g in graph.groups() if not g.fixed and not g.split}
    assert {k: v for k, v in free.items() if "intermediate" in k} == {
        f"bert.encoder.layer.{i}.intermediate.dense": 24 for i in (0, 1)
    }
    heads = graph.group("bert.encoder.layer.0.attention.self.query")
    assert heads.size == 4 and "modeling_bert.py" in heads.split
    group = graph.group("bert.encoder.layer.1.intermediate.dense")
    silence(group, torch.arange(10, 24))
    before = net(**x).logits
    graph.cut(group, torch.arange(10))
    torch.testing.assert_close(net(**x).logits, before)
    assert net.bert.encoder.layer[1].output.dense.in_features == 10
