"""Operators on maps, and sizes that stand in the code or in modules without weights: widths pass them, numbers follow."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from quadriga.core.axes import AxisGraph
from quadriga.core.errors import NotApplicable

torch.manual_seed(0)


class Maps(nn.Module):
    """A convolution of `wide` channels, an operation on maps, and a convolution that reads `narrow` channels."""

    def __init__(self, operation, wide=8, narrow=8):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, wide, 3, padding=1), nn.Conv2d(narrow, 4, 1)
        self.operation = operation

    def forward(self, x):
        return self.b(self.operation(self.a(x))).mean((2, 3))


def thinned(net, example, keep):
    """Cut `a` to these units; its group, and what the network answers then."""
    graph = AxisGraph.trace(net, example)
    group = graph.group("a")
    graph.cut(group, keep)
    return group, net(example)


SAME = {
    "hardswish": F.hardswish,
    "in place": lambda t: F.hardswish(t, inplace=True),
    "logsigmoid": F.logsigmoid,
    "antialias": lambda t: F.interpolate(t, scale_factor=2, mode="bicubic", antialias=True),
    "movedim": lambda t: t.movedim(1, -1).movedim(-1, 1),
    "grid_sample": lambda t: F.grid_sample(t, torch.zeros(t.shape[0], 4, 4, 2), align_corners=False),
    "var_mean": lambda t: t - torch.var_mean(t, (2, 3), keepdim=True)[1],
    "normalize": lambda t: F.normalize(t, dim=1),
    "expand_as": lambda t: t * t.mean(1, keepdim=True).expand_as(t),
    "rot90": lambda t: t.rot90(1, (2, 3)),
    "topk of pixels": lambda t: t.flatten(2).topk(3)[0].unsqueeze(-1),
    "picked columns": lambda t: t[:, :, torch.tensor([0, 1])],
    "differences": lambda t: t.diff(dim=3),
}


@pytest.mark.parametrize("name", SAME)
def test_channels_pass_operators_that_leave_them_alone(name):
    """The thinned network is the whole one without the other channels' part in `b`, unless channels act on one another."""
    net, x, keep = Maps(SAME[name]), torch.randn(2, 3, 8, 8), torch.tensor([0, 2, 3, 7])
    alone = name not in ("normalize", "expand_as")
    with torch.no_grad():
        weight = torch.zeros_like(net.b.weight)
        weight[:, keep] = net.b.weight[:, keep]
        whole = F.conv2d(net.operation(net.a(x)), weight, net.b.bias).mean((2, 3))
        group, thin = thinned(net, x, keep)
    assert group.size == 8 and net.b.in_channels == 4
    assert not alone or torch.allclose(thin, whole, atol=1e-5)


BLOCKS = {
    "pixel_shuffle": (lambda t: F.pixel_shuffle(t, 2), 2, 2, 4),
    "pixel_unshuffle": (lambda t: F.pixel_unshuffle(t, 2), 32, 8, 1),
    "unfold": (lambda t: F.unfold(t, 3, padding=1).unflatten(2, (8, 8)), 72, 8, 1),
    "fold": (lambda t: F.fold(t.flatten(2), (9, 9), 2), 2, 2, 4),
    "channel_shuffle": (lambda t: F.channel_shuffle(t, 2), 8, 4, 2),
    "hstack": (lambda t: torch.hstack([t, -t]), 16, 8, 1),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_channels_that_become_pixels_or_are_shuffled_go_together(name):
    """The weights that go are those of whole blocks: zeros in their place give the same outputs."""
    operation, narrow, size, together = BLOCKS[name]
    net, x = Maps(operation, narrow=narrow), torch.randn(2, 3, 8, 8)
    whole = Maps(operation, narrow=narrow)
    whole.load_state_dict(net.state_dict())
    group, thin = thinned(net, x, torch.arange(1, size))
    assert group.size == size and net.a.out_channels == 8 - together
    gone = torch.tensor([0, 4]) if name == "channel_shuffle" else torch.arange(together)
    with torch.no_grad():
        whole.a.weight[gone] = 0
        whole.a.bias[gone] = 0
    assert torch.allclose(thin, whole(x), atol=1e-5)


NORMS = {
    "InstanceNorm2d": (nn.InstanceNorm2d(8), "num_features", 6),
    "GroupNorm": (nn.GroupNorm(2, 8, affine=False), "num_channels", 6),
    "BatchNorm2d": (nn.BatchNorm2d(8, affine=False, track_running_stats=False), "num_features", 6),
    "LayerNorm": (nn.LayerNorm([8, 8, 8], elementwise_affine=False), "normalized_shape", (6, 8, 8)),
}


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.filterwarnings("error")
def test_numbers_of_norms_without_weights_follow(name):
    norm, field, value = NORMS[name]
    net = Maps(norm)
    thinned(net, torch.randn(2, 3, 8, 8), torch.arange(3 if name == "GroupNorm" else 6))
    assert getattr(norm, field) == value and net.train()(torch.randn(2, 3, 8, 8)).shape == (2, 4)


class Gated(nn.Module):
    """Half of a Linear gates the other half; `parts` cuts it in two."""

    def __init__(self, parts):
        super().__init__()
        self.half, self.a, self.b, self.parts = 8, nn.Linear(6, 16), nn.Linear(8, 4), parts

    def forward(self, x):
        u, v = self.halves(self.a(x))
        return self.b(F.silu(u) * v)

    def halves(self, y):
        if self.parts == "number":
            return y.split(8, 1)
        if self.parts == "field":
            return y.split(self.half, dim=1)
        if self.parts == "list":
            return torch.split(y, [8, 8], 1)
        if self.parts == "keyword":
            return y.split(split_size=8, dim=1)
        return y.split(y.shape[1] // 2, 1)


@pytest.mark.parametrize("parts", ["number", "field", "list", "keyword", "computed"])
def test_the_size_of_equal_parts_follows(parts):
    net, whole, x, keep = Gated(parts), Gated(parts), torch.randn(5, 6), torch.tensor([0, 2, 3, 5, 7])
    whole.load_state_dict(net.state_dict())
    _, thin = thinned(net, x, keep)
    gone = [k for k in range(8) if k not in keep]
    with torch.no_grad():
        whole.b.weight[:, gone] = 0
    assert net.a.out_features == 10 and torch.allclose(thin, whole(x), atol=1e-6)


class Decoder(nn.Module):
    """A vector becomes a map of `side` pixels squared, in one of several ways."""

    def __init__(self, how, side):
        super().__init__()
        self.a, self.map, self.b = nn.Linear(6, 8 * side**2), nn.Unflatten(1, (8, side, side)), nn.Conv2d(8, 3, 1)
        self.how, self.side = how, side

    def forward(self, x):
        return self.b(self.seen(self.a(x)).relu())

    def seen(self, y):
        if self.how == "module":
            return self.map(y)
        if self.how == "unflatten":
            return y.unflatten(1, (8, self.side, self.side))
        if self.how == "last":
            return y.view(-1, self.side, self.side, 8).permute(0, 3, 1, 2)
        return y.view(-1, 8, self.side, self.side)


@pytest.mark.parametrize("side", [2, 3, 5])
@pytest.mark.parametrize("how", ["module", "unflatten", "last", "view"])
def test_features_that_are_seen_as_a_map_lose_whole_channels(how, side):
    net, whole, x, keep = Decoder(how, side), Decoder(how, side), torch.randn(5, 6), torch.tensor([0, 2, 3, 5, 7])
    whole.load_state_dict(net.state_dict())
    group, thin = thinned(net, x, keep)
    with torch.no_grad():
        whole.b.weight[:, [1, 4, 6]] = 0
    assert group.size == 8 and not group.split and net.a.out_features == 5 * side**2
    assert torch.allclose(thin, whole(x), atol=1e-5)
    assert net.map.unflattened_size[0] == (5 if how == "module" else 8)


def test_positions_along_a_width_keep_it():
    """Sorted features, or the first three of them, are positions that the code means."""
    for operation in (lambda t: t.sort(1)[0], lambda t: torch.cat([t[:, :3], t[:, 3:]], 1)):
        graph = AxisGraph.trace(Maps(operation), torch.randn(2, 3, 8, 8))
        with pytest.raises(NotApplicable, match="names positions along it"):
            graph.cut("a", torch.arange(4))


class Cosine(nn.Module):
    """An attention as Swin's second version writes it: a bias from a table and buffers, a mask that may be None, and the
    residual width for the width of the mixed values."""

    def __init__(self, heads=4):
        super().__init__()
        self.heads, self.qkv, self.proj = heads, nn.Linear(16, 48), nn.Linear(16, 16)
        self.table, self.scale = nn.Parameter(torch.randn(9, heads)), nn.Parameter(torch.ones(heads, 1, 1))
        self.register_buffer("places", torch.arange(25).reshape(5, 5) % 9, persistent=False)

    def forward(self, x, mask=None):
        batch, time, width = x.shape
        q, k, v = self.qkv(x).reshape(batch, time, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1) * self.scale.exp()
        bias = self.table[self.places.view(-1)].view(time, time, -1).permute(2, 0, 1).contiguous()
        scores = scores + bias.unsqueeze(0)
        if mask is not None:
            scores = scores.view(-1, 2, self.heads, time, time) + mask
            scores = scores.view(-1, self.heads, time, time)
        return self.proj((scores.softmax(-1) @ v).transpose(1, 2).reshape(batch, time, width))


@pytest.mark.parametrize("left", [1, 3])
def test_heads_of_a_forward_with_branches_on_what_it_is_given(left):
    net = nn.Sequential(nn.Linear(6, 16), Cosine(), nn.Linear(16, 2))
    whole = nn.Sequential(nn.Linear(6, 16), Cosine(), nn.Linear(16, 2))
    whole.load_state_dict(net.state_dict())
    x = torch.randn(4, 5, 6)
    graph = AxisGraph.trace(net, x)
    group = next(g for g in graph.groups() if g.split)
    graph.cut(group, torch.arange(left))
    with torch.no_grad():
        whole[1].proj.weight[:, 4 * left :] = 0
    assert net[1].proj.in_features == 4 * left
    assert torch.allclose(net(x), whole(x), atol=1e-5)
    assert net.train()(x).shape == (4, 5, 2) and set(net.state_dict()) == set(whole.state_dict())


class Quarters(nn.Module):
    """The head width is computed from the residual width, which is cut without the attention's own."""

    def __init__(self):
        super().__init__()
        self.a, self.qkv, self.proj, self.b = nn.Linear(6, 16), nn.Linear(16, 48), nn.Linear(16, 16), nn.Linear(16, 2)

    def forward(self, x):
        x = self.a(x)
        batch, time, width = x.shape
        q, k, v = self.qkv(x).reshape(batch, time, 3, 4, width // 4).permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, time, width)
        return self.b(x + self.proj(mixed))


def test_a_head_width_that_is_computed_from_the_residual_width_stays():
    net, whole, x = Quarters(), Quarters(), torch.randn(3, 5, 6)
    whole.load_state_dict(net.state_dict())
    _, thin = thinned(net, x, torch.arange(12))
    with torch.no_grad():
        whole.a.weight[12:], whole.a.bias[12:] = 0, 0
        whole.proj.weight[12:], whole.proj.bias[12:] = 0, 0
    assert net.qkv.out_features == 48 and net.qkv.in_features == 12
    assert torch.allclose(thin, whole(x), atol=1e-5)
