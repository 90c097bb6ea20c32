"""shrink and prune_channels: the mission's own numbers, inheritance, and refusals."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from quadriga.core.errors import BadInput, NotApplicable
from quadriga.core.setup import Setup
from quadriga.core.workload import Workload
from quadriga.methods.structure._scores import widths
from quadriga.methods.structure.prune_channels import PruneChannels
from quadriga.methods.structure.shrink import Shrink
from quadriga.testing import tiny_cnn, tiny_lstm, tiny_transformer

torch.set_num_threads(1)


def lenet():
    return nn.Sequential(
        *(nn.Conv2d(1, 6, 5), nn.MaxPool2d(2), nn.Conv2d(6, 16, 5), nn.MaxPool2d(2), nn.Flatten()),
        *(nn.Linear(400, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, 10)),
    )


def normed():
    first = [nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU()]
    return nn.Sequential(*first, nn.Conv2d(8, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10))


class Texts(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.rnn, self.fc = nn.Embedding(30, 8), nn.LSTM(8, 12, 2, batch_first=True), nn.Linear(12, 3)

    def forward(self, tokens):
        return self.fc(self.rnn(self.embed(tokens))[0][:, -1])


def setup(net, x=None, **services):
    torch.manual_seed(0)
    x = torch.randn(8, 1, 32, 32) if x is None else x
    y = torch.arange(8) % 3
    return Setup.of(Workload(model=net, train=(x, y), val=(x, y), test=(x, y)), **services)


def count(net):
    return sum(p.numel() for p in net.parameters())


def test_the_missions_numbers():
    """Kernels 5→3 make the flattened map 16·6·6; FC 120→80 pays for it: 576·80 + 80 instead of 400·120 + 120."""
    state = Shrink(kernel=3)(setup(lenet()))
    assert state.model[5].in_features == 576 and state.model[0].weight.shape == (6, 1, 3, 3)
    assert count(state.model) == 60 + 880 + 576 * 120 + 120 + 10164 + 850
    state = Shrink(only="5", features=0.667)(state)
    assert (state.model[5].out_features, state.model[7].in_features, state.model[7].out_features) == (80, 80, 84)
    for batch in (1, 2, 25):
        assert state.model(torch.randn(batch, 1, 32, 32)).shape == (batch, 10)


def test_all_at_once_as_in_the_narrow_recipes():
    net = Shrink(kernel=3, filters=0.5, hidden=1, round_to=1)(setup(lenet())).model
    net = Shrink(only="5", width=32)(setup(net)).model
    assert (net[0].out_channels, net[2].out_channels) == (3, 8)
    assert isinstance(net[7], nn.Identity) and net[9].in_features == 32 and net[5].in_features == 8 * 36
    assert count(net) == 3 * 9 + 3 + 8 * 27 + 8 + 288 * 32 + 32 + 330


def test_dropping_hidden_layers_joins_their_matrices():
    """Exact where the activation lets everything pass: positive weights and inputs."""
    net = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 3)).double()
    for p in net.parameters():
        p.data.abs_()
    x = torch.rand(8, 4, dtype=torch.double)
    before = net(x)
    Shrink(hidden=1)(setup(net, x))
    state = setup(net, x)
    after = Shrink(hidden=1)(state).model
    assert isinstance(after[2], nn.Identity) and after[4].weight.shape == (3, 5)
    torch.testing.assert_close(after(x), before)
    with pytest.raises(NotApplicable, match="has 1 hidden layers"):
        Shrink(hidden=1)(replace(state, model=after))


def test_hidden_layers_with_an_activation_that_would_act_twice_stay():
    net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3))
    with pytest.raises(NotApplicable, match="tanh"):
        Shrink(hidden=1)(setup(net, torch.randn(8, 4)))


def test_filters_that_matter_stay():
    """The kept filters are those of the largest norm over all coupled weights, in their old order."""
    net = lenet()
    with torch.no_grad():
        net[0].weight[[1, 4]] *= 1e-3
        net[0].bias[[1, 4]] = 0
        net[2].weight[:, [1, 4]] *= 1e-3
    kept = net[0].weight[[0, 2, 3, 5]].clone()
    after = Shrink(filters=0.67, only="0", round_to=1)(setup(net)).model
    assert after[0].weight.equal(kept) and after[2].in_channels == 4


@pytest.mark.parametrize("round_to, expected", [(1, (4, 11)), (4, (4, 12)), (8, (6, 8))])
def test_widths_are_what_the_target_likes(round_to, expected):
    net = Shrink(filters=0.67, round_to=round_to)(setup(lenet())).model
    assert (net[0].out_channels, net[2].out_channels) == expected


def test_features_of_recurrent_and_transformer_layers():
    texts = Shrink(features=0.5)(setup(Texts(), torch.randint(30, (8, 5)))).model
    assert texts.rnn.hidden_size == 6 and texts.embed.embedding_dim == 8 and texts.fc.in_features == 6
    encoder = nn.TransformerEncoderLayer(12, 3, 20, batch_first=True, dropout=0.0)
    net = nn.Sequential(encoder, nn.Flatten(), nn.Linear(60, 2))
    after = Shrink(features=0.5)(setup(net, torch.randn(8, 5, 12))).model
    assert after[0].linear1.out_features == 10 and after[0].self_attn.embed_dim == 12


def test_it_refuses_with_the_layer():
    state = setup(lenet())
    for shrink, reason in [
        (Shrink(), "nothing to change"),
        (Shrink(kernel=5), "larger than 5"),
        (Shrink(features=0.5, only="9"), "9: it is the model's output"),
        (Shrink(filters=0.5, only="5"), "5 is linear"),
        (Shrink(features=0.5, only="fc*"), 'matches "fc\\*"'),
        (Shrink(filters=0.99, round_to=1), "no width would change"),
    ]:
        with pytest.raises(NotApplicable, match=reason):
            shrink(state)
    assert count(state.model) == 61706


def test_bad_fields():
    for fields in [{"features": 0.0}, {"filters": 1.5}, {"kernel": 0}, {"width": 8}, {"hidden": -1}, {"round_to": 0}]:
        with pytest.raises(BadInput, match=next(iter(fields))):
            Shrink.parse(fields)


def test_global_pruning_takes_the_weakest_anywhere():
    """The share of units that go is the ratio, equal scores too, until a layer would lose more than nine tenths."""
    scores = {"a": torch.linspace(1, 2, 50), "b": torch.cat([torch.full((45,), 1e-6), torch.ones(5)])}
    assert widths(scores, 0.3, "global") == {"a": 50, "b": 20}
    assert widths(scores, 0.6, "global") == {"a": 35, "b": 5}
    assert widths({"a": torch.ones(50), "b": torch.arange(50.0) ** 9}, 0.6, "global")["b"] >= 5
    assert widths(scores, 0.3, "layer", 4) == {"a": 36, "b": 36}


@pytest.mark.parametrize("importance", ["magnitude", "taylor", "bn_scale"])
def test_every_importance_finds_dead_channels(importance):
    """A channel with zero weights, zero gradient and zero scale is the first to go, and the outputs stay."""
    net, dead = normed().eval(), [2, 5, 7]
    with torch.no_grad():
        net[0].weight[dead] = 0
        net[1].weight[dead] = net[1].bias[dead] = 0
        net[3].weight[:, dead] = 0
    x = torch.randn(8, 1, 32, 32)
    before = net(x)
    state = setup(net, x, gradients=lambda m: {n: torch.ones_like(p) for n, p in m.named_parameters()})
    after = PruneChannels(ratio=0.375, importance=importance, scope="layer", only="0", round_to=1)(state).model
    assert after[0].out_channels == after[1].num_features == 5
    torch.testing.assert_close(after.eval()(x), before)


def test_taylor_is_the_change_of_a_linear_loss():
    """For a loss that is linear in each weight the squared product is exactly the squared change when the unit goes."""
    from quadriga.core.axes import AxisGraph
    from quadriga.core.axes.importance import taylor

    net = nn.Sequential(nn.Linear(3, 4, bias=False), nn.Linear(4, 1, bias=False)).double()
    x = torch.randn(6, 3, dtype=torch.double)
    net(x).sum().backward()
    graph = AxisGraph.trace(net, x)
    score = taylor(graph, {n: p.grad for n, p in net.named_parameters()})(graph.group("0"))
    change = (net[1].weight[0] * net[0](x).sum(0)).square()
    torch.testing.assert_close(score, 2 * change)  # once by its own weights, once by the next layer's


def test_pruning_refuses_with_a_reason():
    state = setup(lenet())
    for prune, reason in [
        (PruneChannels(importance="taylor"), "needs gradients"),
        (PruneChannels(importance="bn_scale"), "batch normalization"),
        (PruneChannels(only="9"), "9: it is the model's output"),
        (PruneChannels(ratio=0.01, scope="layer", only="0", round_to=1), "no width changes"),
    ]:
        with pytest.raises(NotApplicable, match=reason):
            prune(state)
    with pytest.raises(BadInput, match="ratio"):
        PruneChannels(ratio=1.0)


def test_embeddings_are_narrowed_with_all_that_reads_them():
    lstm = Shrink(embeddings=0.5)(Setup.of(tiny_lstm())).model
    assert (lstm.embed.embedding_dim, lstm.lstm.input_size, lstm.lstm.hidden_size) == (4, 4, 12)
    net = Shrink(embeddings=0.5)(Setup.of(tiny_transformer())).model
    assert net.embed.weight.shape == (20, 8) and net.head.weight is net.embed.weight
    assert (net.blocks[0].qkv.in_features, net.blocks[0].down.out_features, net.norm.normalized_shape) == (8, 8, (8,))


def test_the_last_blocks_go():
    setup = Setup.of(tiny_transformer())
    first = setup.model.blocks[0]
    model = Shrink(blocks=0.5)(setup).model
    assert list(model.blocks) == [first] and model(setup.context.example).shape[-1] == 20
    with pytest.raises(NotApplicable, match="no stack holds more blocks"):
        Shrink(blocks=0.5)(Setup.of(tiny_cnn()))
    with pytest.raises(BadInput, match=r"shrink\.blocks"):
        Shrink(blocks=0.0)
