"""Depthwise-separable substitution: a kernel for each channel, then a mixture of channels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from quadriga.core.errors import BadInput, NotApplicable
from quadriga.core.method import Family, Method, Numerics
from quadriga.core.setup import Setup
from quadriga.methods.structure._replace import Layer, kind_of, plain_layers, replace_layers


def separate(conv: nn.Conv1d | nn.Conv2d, rank: int = 1) -> tuple[nn.Module, nn.Module]:
    """The depthwise and the pointwise convolution that together are nearest to a dense one.

    For each input channel the matrix [out, kernel positions] is replaced by its best one of that rank (Eckart–Young).
    With a kernel for each position the two are the dense layer.

    Args:
        conv: weight[out, in, k…], one group.
        rank: kernels for each input channel.

    Returns:
        depthwise (in → in·rank, with kernel, stride and padding, without bias) and pointwise (1×1, with the bias).

    Example:
        >>> first, second = separate(nn.Conv2d(8, 16, 3, padding=1))
        >>> first.weight.shape, second.weight.shape
        (torch.Size([8, 1, 3, 3]), torch.Size([16, 8, 1, 1]))
    """
    weight = conv.weight.data
    out, inside = weight.shape[:2]
    u, s, v = torch.linalg.svd(weight.double().flatten(2).transpose(0, 1), full_matrices=False)  # [in, out, positions]
    half = s[:, :rank].sqrt()
    like: dict[str, Any] = {"device": weight.device, "dtype": weight.dtype}
    geometry: dict[str, Any] = {k: getattr(conv, k) for k in ("kernel_size", "stride", "padding", "dilation", "padding_mode")}
    first = kind_of(conv)(inside, inside * rank, groups=inside, bias=False, **geometry, **like)
    second = kind_of(conv)(inside * rank, out, 1, bias=conv.bias is not None, **like)
    first.weight.data.copy_((half[:, :, None] * v[:, :rank]).reshape(first.weight.shape))
    second.weight.data.copy_((u[:, :, :rank] * half[:, None]).permute(1, 0, 2).reshape(second.weight.shape))
    if conv.bias is not None and second.bias is not None:
        second.bias.data.copy_(conv.bias.data)
    return first, second


def weights_ratio(weight: Tensor, rank: int) -> float:
    """Weights, and products, of the two layers as a share of the dense one's.

    Example:
        >>> weights_ratio(torch.ones(64, 8, 3, 3), 1)
        0.1267361111111111
    """
    out, inside = weight.shape[:2]
    positions = weight[0, 0].numel()
    return (inside * rank * positions + out * inside * rank) / (out * inside * positions)


@dataclass(frozen=True, kw_only=True)
class Depthwise(Method):
    """Replace dense convolutions by depthwise-separable ones, starting from the best fit to their weights.

    Training has to follow. Layers with 1×1 kernels, with groups or few input channels, tied ones, and those where it saves
    nothing are left.

    Args:
        rank: kernels for each input channel.
        least: fewest input channels of a layer; the first layer of a network has too few to be worth it.
        only: layers to act on: globs of names, comma-separated.

    Source: Howard et al. 2017, MobileNets, arXiv:1704.04861; Guo et al. 2018, arXiv:1808.06634 (the fit).
    """

    family = Family.STRUCTURE
    numerics = Numerics.CHANGED
    source = "arXiv:1704.04861"
    requires = frozenset({"FLOAT_WEIGHTS"})
    search: ClassVar = {"rank": (1, 2)}

    rank: int = 1
    least: int = 4
    only: str = "*"

    def __post_init__(self) -> None:
        for name in ("rank", "least"):
            if getattr(self, name) < 1:
                raise BadInput(f"depthwise.{name} is {getattr(self, name)!r}", "give at least 1")

    def apply(self, setup: Setup) -> Setup:
        layers = {n: m for n, m in plain_layers(setup.model, self.only) if not isinstance(m, nn.Linear)}
        return replace_layers(setup, layers, self._make, "depthwise replaces no layer", "dense convolution")

    def _make(self, name: str, layer: Layer) -> nn.Module:
        assert not isinstance(layer, nn.Linear)
        positions, share = layer.weight[0, 0].numel(), weights_ratio(layer.weight, self.rank)
        if positions == 1:
            raise NotApplicable(f"{name} has a kernel of one position")
        if layer.in_channels < self.least:
            raise NotApplicable(f"{name} has {layer.in_channels} input channels, fewer than {self.least}")
        if share >= 1 or self.rank > min(layer.out_channels, positions):
            raise NotApplicable(f"{name} would have {share:.2f} of its weights at rank {self.rank}")
        return nn.Sequential(*separate(layer, self.rank))
