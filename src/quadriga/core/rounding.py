"""Rounding to integers, simulated in float: of weights, of activations, and the range that activations are rounded in."""

from __future__ import annotations

import torch
from torch import Tensor

CLIPS = 40  # candidate ranges
PERCENTILE = 0.9999  # of the values, that a range of this kind covers
SAMPLE = 1 << 16  # values that decide a range


def round_weight(weight: Tensor, axis: int = 0, bits: int = 8) -> Tensor:
    """Symmetric rounding, one scale per slice along an axis: |error| ≤ scale / 2 = max|slice| / (2ᵇ − 2).

    The gradient passes as if nothing was rounded.

    Args:
        weight: float, of any shape.
        axis: of the output channels.
        bits: of the integers.

    Example:
        >>> round_weight(torch.tensor([[1.0, 0.3], [0.0, 0.0]]), bits=2)
        tensor([[1., 0.],
                [0., 0.]])

    Source: Krishnamoorthi 2018, arXiv:1806.08342; Bengio et al. 2013, arXiv:1308.3432 (straight-through gradient).
    """
    top = 2 ** (bits - 1) - 1
    peak = weight.detach().abs().amax([d for d in range(weight.dim()) if d != axis]).float()
    scale = torch.where(peak > 0, peak / top, 1.0)
    zeros = torch.zeros(len(scale), dtype=torch.int32, device=weight.device)
    return torch.fake_quantize_per_channel_affine(weight, scale, zeros, axis, -top, top)


def round_activation(values: Tensor, low: Tensor | float, high: Tensor | float) -> Tensor:
    """Rounding to 256 levels from low to high, zero among them; values outside are clipped and have no gradient.

    Args:
        values: float, of any shape.
        low, high: of the range; it is widened until it holds zero.

    Example:
        >>> round_activation(torch.tensor([0.0, 0.6, 9.0]), 0.0, 255.0)
        tensor([0., 1., 9.])
    """
    ends = [torch.as_tensor(end, dtype=torch.float32, device=values.device) for end in (low, high)]
    low, high = ends[0].clamp(max=0.0), ends[1].clamp(min=0.0)
    scale = ((high - low) / 255).clamp(min=torch.finfo(torch.float32).tiny * 256)
    zero = (-low / scale).round().clamp(0, 255).to(torch.int32)
    return torch.fake_quantize_per_tensor_affine(values, scale, zero, 0, 255)


def value_range(values: Tensor, kind: str = "minmax") -> tuple[float, float]:
    """The range in which seen values are to be rounded.

    Args:
        values: seen ones, float, of any shape; more than 65,536 are thinned out, except for "minmax".
        kind: "minmax" covers all of them; "percentile" leaves out one in 10,000 on each side; "mse" has the smallest mean
            squared error among ranges that are a share of the first.

    Raises:
        ValueError: another kind, or no values.

    Example:
        >>> wide = torch.cat([torch.linspace(-1, 1, 10_000), torch.tensor([50.0])])
        >>> value_range(wide)
        (-1.0, 50.0)
        >>> value_range(wide, "mse")[1] < 50
        True

    Source: Nagel et al. 2021, arXiv:2106.08295, section 3.1.
    """
    if kind not in ("minmax", "percentile", "mse"):
        raise ValueError(f'no kind of range "{kind}"; there are "minmax", "percentile" and "mse"')
    if not values.numel():
        raise ValueError("there are no values")
    values = values.detach().float().flatten()
    low, high = (float(end) for end in values.aminmax())
    if kind == "minmax":
        return low, high
    values = thinned(values, SAMPLE)
    if kind == "percentile":
        ends = torch.quantile(values, torch.tensor([1 - PERCENTILE, PERCENTILE], device=values.device))
        return float(ends[0]), float(ends[1])
    shares = torch.linspace(1 / CLIPS, 1.0, CLIPS).tolist()
    return min(((low * s, high * s) for s in shares), key=lambda ends: float(_squared_error(values, *ends)))


def thinned(values: Tensor, most: int) -> Tensor:
    """At most so many of the values [n], the same ones every time, drawn by chance.

    Every k-th would be the same few places of each picture: the range of a ResNet's activations came out so much too narrow
    that static int8 lost 11 points.

    Example:
        >>> thinned(torch.arange(100.0), 4).shape, thinned(torch.arange(3.0), 4)
        (torch.Size([4]), tensor([0., 1., 2.]))
    """
    if len(values) <= most:
        return values
    places = torch.randint(len(values), (most,), generator=torch.Generator().manual_seed(0))
    return values[places.to(values.device)]


def _squared_error(values: Tensor, low: float, high: float) -> Tensor:
    return (round_activation(values, low, high) - values).square().mean()
