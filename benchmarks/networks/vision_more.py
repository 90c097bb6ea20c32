"""Vision networks of the newer kinds: hard activations, style transfer, decoders, blocks of attention in windows."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, cat, nn
from torch.nn import functional

from networks._make import numbers, workload


class Inverted(nn.Module):
    """MobileNet's block of the third generation: hard swish in place, a gate of hard sigmoids."""

    def __init__(self, width: int, wide: int) -> None:
        super().__init__()
        self.up, self.down = nn.Conv2d(width, wide, 1, bias=False), nn.Conv2d(wide, width, 1, bias=False)
        self.deep = nn.Conv2d(wide, wide, 5, padding=2, groups=wide, bias=False)
        self.norms = nn.ModuleList(nn.BatchNorm2d(n) for n in (wide, wide, width))
        self.less, self.more, self.act = nn.Conv2d(wide, 8, 1), nn.Conv2d(8, wide, 1), nn.Hardswish(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.norms[1](self.deep(self.act(self.norms[0](self.up(x))))))
        y = y * functional.hardsigmoid(self.more(self.less(y.mean((2, 3), keepdim=True)).relu_()))
        return x + self.norms[2](self.down(y))


class MobileNetV3(nn.Module):
    """A stem and three such blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.fc = nn.Sequential(nn.Conv2d(3, 12, 3, 2, 1), nn.Hardswish()), nn.Linear(12, 3)
        self.blocks = nn.Sequential(*(Inverted(12, 24) for _ in range(3)))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.blocks(self.stem(x)).mean((2, 3)))


class Style(nn.Module):
    """Style transfer: reflection, instance normalization without weights, pixels that become channels and back."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 12, 5, padding=2, padding_mode="reflect")
        self.norms = nn.ModuleList(nn.InstanceNorm2d(n) for n in (12, 16, 8))
        self.fewer, self.b, self.c = nn.PixelUnshuffle(2), nn.Conv2d(48, 16, 3, padding=1), nn.Conv2d(16, 8, 3, padding=1)
        self.fc = nn.Linear(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fewer(functional.relu6(self.norms[0](self.a(x))))
        x = functional.mish(self.norms[1](self.b(x)))
        x = functional.interpolate(x, scale_factor=2.0, mode="bicubic", antialias=True)
        return self.fc(functional.pixel_shuffle(self.norms[2](self.c(x)), 2).abs().mean((2, 3)))


class Decoder(nn.Module):
    """An autoencoder's second half: `nn.Unflatten`, gates by `split`, group normalization."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.start, self.map = 8, nn.Linear(10, 16 * 9), nn.Unflatten(1, (16, 3, 3))
        self.wide, self.norm, self.last = nn.Conv2d(16, 16, 3, padding=1), nn.GroupNorm(4, 16), nn.Conv2d(8, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.norm(self.wide(self.map(self.start(x)))).split(self.hidden, dim=1)
        return self.last(value * gate.sigmoid()).mean((2, 3))


class Attention(nn.Module):
    """One projection for queries, keys and values; numbers of heads and of features in one are the module's."""

    def __init__(self, width: int = 16, heads: int = 4) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.attn_dim = heads, width // heads, width
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        qkv = self.qkv(x).reshape(b, n, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(*qkv.unbind(0))
        return self.proj(mixed.transpose(1, 2).reshape(b, n, self.attn_dim))


class Windowed(nn.Module):
    """Cosine attention with a bias from a table, and a mask that may be None."""

    def __init__(self, width: int = 16, heads: int = 4, places: int = 9) -> None:
        super().__init__()
        self.heads, self.qkv, self.proj = heads, nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.scale, self.table = nn.Parameter(torch.ones(heads, 1, 1)), nn.Parameter(torch.randn(places, heads))
        self.register_buffer("index", torch.arange(places * places).reshape(places, places) % places)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        scores = functional.normalize(q, dim=-1) @ functional.normalize(k, dim=-1).transpose(-2, -1) * self.scale.exp()
        scores = scores + self.table[self.index.view(-1)].view(n, n, -1).permute(2, 0, 1).contiguous().unsqueeze(0)
        if mask is not None:
            scores = scores + mask
        return self.proj((scores.softmax(-1) @ v).transpose(1, 2).reshape(b, n, c))


class Layer(nn.Module):
    """Attention and a feed-forward part, each scaled by learned factors."""

    def __init__(self, mix: nn.Module) -> None:
        super().__init__()
        self.mix, self.up, self.down = mix, nn.Linear(16, 32), nn.Linear(32, 16)
        self.norms = nn.ModuleList(nn.LayerNorm(16) for _ in range(2))
        self.scales = nn.ParameterList(nn.Parameter(torch.ones(16)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.scales[0] * self.mix(self.norms[0](x))
        return x + self.scales[1] * self.down(functional.gelu(self.up(self.norms[1](x))))


class Layers(nn.Module):
    """A vision transformer of three layers, as timm writes it today; with a class token or without."""

    def __init__(self, mix: type[nn.Module], token: bool) -> None:
        super().__init__()
        self.patch, self.norm, self.fc = nn.Conv2d(1, 16, 4, 4), nn.LayerNorm(16), nn.Linear(16, 3)
        self.token = nn.Parameter(torch.zeros(1, 1, 16)) if token else None
        self.place = nn.Parameter(torch.randn(1, 9 + token, 16) * 0.02)
        self.blocks = nn.Sequential(*(Layer(mix()) for _ in range(3)))

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        if self.token is not None:
            x = cat([self.token.expand(x.shape[0], -1, -1), x], dim=1)
        x = self.norm(self.blocks(x + self.place))
        return self.fc(x.mean(1) if self.token is None else x[:, 0])


NETWORKS = {
    "mobilenet3": (MobileNetV3, (3, 12, 12)),
    "style": (Style, (3, 12, 12)),
    "decoder": (Decoder, (10,)),
    "vit_blocks": (partial(Layers, Attention, True), (1, 12, 12)),
    "windows": (partial(Layers, Windowed, False), (1, 12, 12)),
}
WORKLOADS = {name: partial(workload, name, build, numbers(*shape)) for name, (build, shape) in NETWORKS.items()}
