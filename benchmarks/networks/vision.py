"""Convolutional networks and what grew out of them: branches, groups, shuffles, gates, patches."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, cat, nn
from torch.nn import functional

from networks._make import numbers, workload


def unit(inside: int, out: int, kernel: int = 3, groups: int = 1) -> nn.Sequential:
    """Convolution, batch normalization, ReLU."""
    conv = nn.Conv2d(inside, out, kernel, padding=kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(out), nn.ReLU())


class UNet(nn.Module):
    """Skips by concatenation, a transposed convolution, an upsampling."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.down, self.last = unit(3, 8), unit(8, 16), unit(16, 32), unit(32, 16), unit(24, 8)
        self.up, self.fc = nn.ConvTranspose2d(32, 16, 2, 2), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        a = self.a(x)
        b = self.b(functional.max_pool2d(a, 2))
        x = self.down(cat([self.up(self.c(functional.max_pool2d(b, 2))), b], 1))
        x = self.last(cat([functional.interpolate(x, scale_factor=2.0, mode="bilinear"), a], 1))
        return self.fc(x.mean((2, 3)))


class DenseNet(nn.Module):
    """Every layer reads all before it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm, self.fc = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(26), nn.Linear(26, 3)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.BatchNorm2d(8 + 6 * i), nn.ReLU(), nn.Conv2d(8 + 6 * i, 6, 3, padding=1)) for i in range(3)
        )

    def forward(self, x: Tensor) -> Tensor:
        seen = [self.stem(x)]
        for layer in self.layers:
            seen.append(layer(cat(seen, 1)))
        return self.fc(self.norm(cat(seen, 1)).relu().mean((2, 3)))


class ShuffleNet(nn.Module):
    """Half of the channels pass, half are worked on, then they are shuffled."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.fc = unit(3, 16), nn.Linear(16, 3)
        self.branch = nn.Sequential(unit(8, 8, 1), unit(8, 8, 3, groups=8), unit(8, 8, 1))

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.stem(x).chunk(2, 1)
        x = cat([left, self.branch(right)], 1)
        b, c, h, w = x.shape
        return self.fc(x.view(b, 2, c // 2, h, w).transpose(1, 2).flatten(1, 2).mean((2, 3)))


class SqueezeExcite(nn.Module):
    """Inverted residuals whose channels gate each other."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.fc = unit(3, 16), nn.Linear(16, 3)
        gate = [nn.AdaptiveAvgPool2d(1), nn.Conv2d(32, 8, 1), nn.ReLU(), nn.Conv2d(8, 32, 1), nn.Sigmoid()]
        self.wide, self.gate, self.narrow = unit(16, 32, 1), nn.Sequential(*gate), nn.Conv2d(32, 16, 1)
        self.deep = unit(32, 32, 3, groups=32)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        inside = self.deep(self.wide(x))
        return self.fc((x + self.narrow(inside * self.gate(inside))).mean((2, 3)))


class Inception(nn.Module):
    """Branches of three kernels, group normalization, a flattened map."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = unit(3, 4, 1), unit(3, 6), nn.Sequential(unit(3, 4, 1), unit(4, 8, 5))
        self.norm, self.fc, self.out = nn.GroupNorm(3, 18), nn.Linear(162, 20), nn.Linear(20, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(cat([self.a(x), self.b(x), self.c(x)], 1))
        return self.out(functional.gelu(self.fc(functional.adaptive_max_pool2d(x, 3).view(x.size(0), -1))))


class ResNeXt(nn.Module):
    """Grouped convolutions in a residual block, then one with a stride and a projection."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.short, self.conv = unit(3, 16), nn.Conv2d(16, 32, 1, 2), nn.Conv2d(16, 32, 3, 2, 1)
        self.block = nn.Sequential(unit(16, 16, 1), unit(16, 16, 3, groups=4), nn.Conv2d(16, 16, 1))
        self.fc = nn.Linear(32, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = torch.relu(x + self.block(x))
        x = torch.relu(self.short(x) + self.conv(x))
        return self.fc(torch.flatten(functional.avg_pool2d(x, 6), 1))


class ConvNeXt(nn.Module):
    """Channels last inside the block, layer normalization, a learned scale."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.deep = nn.Conv2d(3, 16, 4, 4), nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.norm, self.up, self.down, self.fc = nn.LayerNorm(16), nn.Linear(16, 32), nn.Linear(32, 16), nn.Linear(16, 3)
        self.scale = nn.Parameter(torch.full((16,), 0.1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.norm(self.deep(x).permute(0, 2, 3, 1))
        y = self.down(functional.gelu(self.up(y))) * self.scale
        return self.fc((x + y.permute(0, 3, 1, 2)).mean([-1, -2]))


class Mixer(nn.Module):
    """Linear layers over positions and over channels in turn."""

    def __init__(self) -> None:
        super().__init__()
        self.patch, self.fc = nn.Conv2d(3, 16, 4, 4), nn.Linear(16, 3)
        self.norm1, self.norm2 = nn.LayerNorm(16), nn.LayerNorm(16)
        self.places = nn.Sequential(nn.Linear(9, 12), nn.GELU(), nn.Linear(12, 9))
        self.channels = nn.Sequential(nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 16))

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = x + self.places(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        return self.fc((x + self.channels(self.norm2(x))).mean(1))


class Patches(nn.Module):
    """A vision transformer as timm writes it: one projection, its width computed from the input's."""

    def __init__(self) -> None:
        super().__init__()
        self.patch, self.norm, self.fc = nn.Conv2d(1, 16, 4, 4), nn.LayerNorm(16), nn.Linear(16, 3)
        self.token, self.place = nn.Parameter(torch.zeros(1, 1, 16)), nn.Parameter(torch.randn(1, 10, 16) * 0.02)
        self.qkv, self.proj = nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = cat([self.token.expand(x.size(0), -1, -1), x], 1) + self.place
        b, n, c = x.shape
        q, k, v = self.qkv(self.norm(x)).reshape(b, n, 3, 4, c // 4).permute(2, 0, 3, 1, 4).unbind(0)
        mixed = ((q @ k.transpose(-2, -1)) * 0.5).softmax(-1) @ v
        return self.fc((x + self.proj(mixed.transpose(1, 2).reshape(b, n, c)))[:, 0])


class Pixels(nn.Module):
    """Super-resolution: channels become pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(1, 16, 5, padding=2), nn.Conv2d(16, 8, 3, padding=1), nn.Conv2d(8, 16, 3, padding=1)
        self.shuffle, self.fc = nn.PixelShuffle(2), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.shuffle(self.c(torch.tanh(self.b(torch.tanh(self.a(x)))))).mean((2, 3)))


class Generator(nn.Module):
    """A vector becomes a map, by transposed convolutions, one of them in groups."""

    def __init__(self) -> None:
        super().__init__()
        self.start, self.norm, self.fc = nn.Linear(10, 128), nn.BatchNorm2d(16), nn.Linear(8, 3)
        self.a, self.b = nn.ConvTranspose2d(32, 16, 4, 2, 1), nn.ConvTranspose2d(16, 8, 4, 2, 1, groups=2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.start(x).view(-1, 32, 2, 2)
        return self.fc(torch.relu(self.b(torch.relu(self.norm(self.a(x))))).mean((2, 3)))


class Volume(nn.Module):
    """Three dimensions, instance normalization."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.fc = nn.Conv3d(1, 6, 3, padding=1), nn.Conv3d(6, 8, 3), nn.Linear(8, 3)
        self.norm = nn.InstanceNorm3d(6, affine=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(functional.leaky_relu(self.b(functional.elu(self.norm(self.a(x))))).mean((2, 3, 4)))


NETWORKS = {
    "unet": (UNet, (3, 16, 16)),
    "densenet": (DenseNet, (3, 12, 12)),
    "shufflenet": (ShuffleNet, (3, 12, 12)),
    "squeeze_excite": (SqueezeExcite, (3, 12, 12)),
    "inception": (Inception, (3, 12, 12)),
    "resnext": (ResNeXt, (3, 12, 12)),
    "convnext": (ConvNeXt, (3, 12, 12)),
    "mixer": (Mixer, (3, 12, 12)),
    "vit_timm": (Patches, (1, 12, 12)),
    "pixel_shuffle": (Pixels, (1, 10, 10)),
    "generator": (Generator, (10,)),
    "volume": (Volume, (1, 6, 6, 6)),
}
WORKLOADS = {name: partial(workload, name, build, numbers(*shape)) for name, (build, shape) in NETWORKS.items()}
