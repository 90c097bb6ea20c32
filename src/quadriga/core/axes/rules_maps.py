"""Rules of operators on maps: pooling, resampling, and channels that turn into pixels and back."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from quadriga.core.axes.reshape import whole
from quadriga.core.axes.units import Axes, Dim
from quadriga.core.axes.walk import Walk, rule


@rule("max_pool1d", "max_pool2d", "max_pool3d", "avg_pool1d", "avg_pool2d", "avg_pool3d", "adaptive_avg_pool1d")
@rule("adaptive_avg_pool2d", "adaptive_avg_pool3d", "adaptive_max_pool1d", "adaptive_max_pool2d", "adaptive_max_pool3d")
@rule("upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d", "upsample_linear1d", "upsample_bilinear2d")
@rule("upsample_trilinear3d", "_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa", "_upsample_nearest_exact1d")
@rule("upsample_bicubic2d", "_upsample_nearest_exact2d", "max_pool2d_with_indices", "max_pool1d_with_indices")
def spatial(walk: Walk, node: fx.Node, a: dict[str, Any]) -> Any:
    """Height and width change; batch and channels stay."""
    axes = walk.axes(a["self"] if "self" in a else a["input"])
    value = node.meta["val"]
    if any(isinstance(d, Tensor) for d in axes[2:]):
        return None
    kept: Axes = [*axes[:2], *([None] * len(axes[2:]))]
    return [list(kept) for _ in value] if isinstance(value, tuple | list) else kept


@rule("grid_sampler", "grid_sampler_2d", "grid_sampler_3d")
def grid_sampler(walk: Walk, node: fx.Node, a: dict[str, Any]) -> Any:
    """Pixels picked by coordinates."""
    walk.pin(a["grid"], f"it holds coordinates at {walk.where(node)}")
    return spatial(walk, node, {"self": a["input"]})


@rule("pixel_shuffle")
def pixel_shuffle(walk: Walk, node: fx.Node, a: dict[str, Any]) -> Axes:
    """r² channels in a row become the r · r pixels of one, so they go together."""
    *rest, channels, _, _ = walk.axes(a["self"])
    return [*rest, _together(walk, channels, a["upscale_factor"] ** 2), None, None]


@rule("pixel_unshuffle")
def pixel_unshuffle(walk: Walk, node: fx.Node, a: dict[str, Any]) -> Axes:
    """r · r pixels of a channel become r² channels in a row."""
    *rest, channels, _, _ = walk.axes(a["self"])
    return [*rest, _repeated(channels, a["downscale_factor"] ** 2), None, None]


@rule("im2col")
def im2col(walk: Walk, node: fx.Node, a: dict[str, Any]) -> Axes:
    """The pixels under a kernel, channel by channel, become features."""
    *rest, channels, _, _ = walk.axes(a["self"])
    height, width = a["kernel_size"]
    return [*rest, _repeated(channels, height * width), None]


@rule("col2im")
def col2im(walk: Walk, node: fx.Node, a: dict[str, Any]) -> Axes:
    """`im2col` in reverse, overlaps summed."""
    *rest, features, _ = walk.axes(a["self"])
    height, width = a["kernel_size"]
    return [*rest, _together(walk, features, height * width), None, None]


@rule("channel_shuffle")
def channel_shuffle(walk: Walk, node: fx.Node, a: dict[str, Any]) -> Axes:
    """Groups of channels are interleaved; they lose the same positions, so that their number stays."""
    batch, channels, *rest = walk.axes(a["self"])
    if not isinstance(channels, Tensor):
        return [batch, channels, *rest]
    sizes = (a["groups"], len(channels) // a["groups"])
    whole(walk.units, channels, sizes, 1)
    return [batch, channels.reshape(sizes).t().reshape(-1), *rest]


def _together(walk: Walk, dim: Dim, count: int) -> Dim:
    """One unit for every `count` in a row."""
    return whole(walk.units, dim, (len(dim) // count, count), 0) if isinstance(dim, Tensor) else dim


def _repeated(dim: Dim, count: int) -> Dim:
    return torch.repeat_interleave(dim, count) if isinstance(dim, Tensor) else dim
