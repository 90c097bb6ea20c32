"""Networks of layers that are subclasses of `torch.nn`'s with a forward of their own, as libraries of models have them.

Whoever takes such a layer for a plain one by `isinstance` loses what it computes beside that. No running statistic, gain or
bias is the identity, so that nothing that is left out stays hidden.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from quadriga.core.workload import Workload
from quadriga.testing.workloads import of_images, of_vectors
from quadriga.verify.promise import stirred_copy


class NormAct(nn.BatchNorm2d):
    """A batch normalization that holds its activation, as timm's BatchNormAct2d does."""

    def __init__(self, channels: int, act: type[nn.Module] = nn.ReLU) -> None:
        super().__init__(channels)
        self.drop, self.act = nn.Identity(), act()

    def forward(self, x: Tensor) -> Tensor:
        """[batch, channels, height, width] → the same shape."""
        return self.act(self.drop(super().forward(x)))


class SquashedNorm(nn.BatchNorm2d):
    """A batch normalization with an activation that is no part of it."""

    def forward(self, x: Tensor) -> Tensor:
        """[batch, channels, height, width] → the same shape."""
        return torch.tanh(super().forward(x))


class Standardized(nn.Conv2d):
    """A convolution whose weight is standardized at each call (Qiao et al. 2019, arXiv:1903.10520)."""

    def forward(self, x: Tensor) -> Tensor:
        """[batch, in, height, width] → [batch, out, height', width']."""
        flat = self.weight.reshape(1, self.out_channels, -1)
        weight = functional.batch_norm(flat, None, None, training=True, momentum=0.0).reshape_as(self.weight)
        return functional.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class SamePadding(nn.Conv2d):
    """A convolution that pads as TensorFlow does: ⌈size / stride⌉ positions, more on the right and below."""

    def forward(self, x: Tensor) -> Tensor:
        """[batch, in, height, width] → [batch, out, ⌈height / stride⌉, ⌈width / stride⌉]."""
        sizes = zip(x.shape[-2:], self.kernel_size, self.stride, strict=True)
        missing = [max(0, (-(-n // s) - 1) * s + k - n) for n, k, s in sizes]
        pads = [p for total in reversed(missing) for p in (total // 2, total - total // 2)]
        return functional.conv2d(functional.pad(x, pads), self.weight, self.bias, self.stride)


class ScaledLinear(nn.Linear):
    """A Linear whose weight has a learned gain for all of it."""

    def __init__(self, inside: int, out: int) -> None:
        super().__init__(inside, out)
        self.gain = nn.Parameter(torch.tensor(1.5))

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] → [..., out]."""
        return functional.linear(x, self.weight * self.gain, self.bias)


class ChannelsFirstNorm(nn.LayerNorm):
    """Layer normalization over axis 1 of maps, as in ConvNeXt."""

    def forward(self, x: Tensor) -> Tensor:
        """[batch, channels, height, width] → the same shape."""
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ActedNorm(nn.LayerNorm):
    """Layer normalization with an activation behind it."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., width] → the same shape."""
        return functional.gelu(super().forward(x))


class OffsetNorm(nn.RMSNorm):
    """RMS normalization whose gain is 1 + weight, as Gemma's is."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., width] → the same shape."""
        assert self.weight is not None
        return functional.rms_norm(x, self.normalized_shape, 1 + self.weight, 1e-6)


def _convolutions(conv: type[nn.Conv2d], norm: Callable[[int], nn.Module], linear: type[nn.Linear] = nn.Linear) -> nn.Module:
    padding = {} if conv is SamePadding else {"padding": 1}
    return nn.Sequential(
        conv(1, 8, 3, stride=2, **padding), norm(8), nn.ReLU(), conv(8, 16, 3, **padding), norm(16), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), linear(16, 12), nn.ReLU(), linear(12, 4),
    )  # fmt: skip


class _Residual(nn.Module):
    """x + down(gelu(up(norm(x))))."""

    def __init__(self, width: int, norm: Callable[[int], nn.Module], linear: type[nn.Linear]) -> None:
        super().__init__()
        self.norm, self.up, self.down = norm(width), linear(width, 2 * width), linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """[..., width] → the same shape."""
        return x + self.down(functional.gelu(self.up(self.norm(x))))


def _vectors(norm: Callable[[int], nn.Module], linear: type[nn.Linear] = nn.Linear) -> nn.Module:
    blocks = (_Residual(16, norm, linear) for _ in range(3))
    return nn.Sequential(nn.Linear(10, 16), nn.Sequential(*blocks), linear(16, 2))


IMAGES: dict[str, Callable[[], nn.Module]] = {
    "norm_act": lambda: _convolutions(nn.Conv2d, NormAct),
    "squashed_norm": lambda: _convolutions(nn.Conv2d, SquashedNorm),
    "standardized": lambda: _convolutions(Standardized, nn.BatchNorm2d),
    "same_padding": lambda: _convolutions(SamePadding, nn.BatchNorm2d),
    "channels_first": lambda: _convolutions(nn.Conv2d, ChannelsFirstNorm),
    "scaled_head": lambda: _convolutions(nn.Conv2d, nn.BatchNorm2d, ScaledLinear),
}
VECTORS: dict[str, Callable[[], nn.Module]] = {
    "scaled_linear": lambda: _vectors(nn.LayerNorm, ScaledLinear),
    "acted_norm": lambda: _vectors(ActedNorm),
    "offset_norm": lambda: _vectors(OffsetNorm),
}


def _stirred(build: Callable[[], nn.Module]) -> nn.Module:
    model = build()
    return stirred_copy(model) or model


def own_layers(kind: str, *, trained: bool = True) -> Workload:
    """A small network with layers of one kind.

    Args:
        kind: a key of `OWN_LAYERS`.
        trained: whether the model passes as trained.
    """
    build, make = (IMAGES[kind], of_images) if kind in IMAGES else (VECTORS[kind], of_vectors)
    return make(lambda: _stirred(build), (48, 24, 24), trained, 0, kind)


OWN_LAYERS = (*IMAGES, *VECTORS)
