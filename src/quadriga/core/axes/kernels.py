"""Smaller convolution kernels with inherited weights, and the layers behind them built anew where the map grows."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from quadriga.core.axes.derive import derive
from quadriga.core.axes.fields import refresh
from quadriga.core.axes.graph import AxisGraph
from quadriga.core.axes.patch import Patch
from quadriga.core.axes.rewrite import settle
from quadriga.core.errors import NotApplicable


def recentre(block: Tensor, sizes: Sequence[int]) -> Tensor:
    """Crop or zero-pad the last axes to `sizes`, centre on centre.

    Where the difference is odd, the centres lie half a step apart and each new value is the mean of its two neighbours.

    Args:
        block: [..., *old sizes].
        sizes: the new ones, one for each of the last axes.

    Example:
        >>> import torch
        >>> recentre(torch.tensor([1., 2., 3., 4., 5.]), [3]), recentre(torch.tensor([1., 3.]), [3])
        (tensor([2., 3., 4.]), tensor([0.5000, 2.0000, 1.5000]))
    """
    for axis, size in zip(range(-len(sizes), 0), sizes, strict=True):
        block = _recentre_one(block.movedim(axis, -1), size).movedim(-1, axis)
    return block


def _recentre_one(block: Tensor, size: int) -> Tensor:
    excess = block.shape[-1] - size
    if excess % 2:
        padded = nn.functional.pad(block, (1, 1))
        block, excess = (padded[..., 1:] + padded[..., :-1]) / 2, excess + 1
    half = excess // 2
    return block[..., half : half + size] if half >= 0 else nn.functional.pad(block, (-half, -half))


def smaller_kernels(graph: AxisGraph, kernel: int, only: str = "*") -> Patch:
    """Shrink every kernel that is larger, by a centre crop, in place.

    Padding shrinks by the same amount, so that padded convolutions keep their map. Where there is none left to take, the map
    grows (5→3 without padding: 5×5 becomes 7×7 and so on), and a Linear that reads the flattened map is built for the new size:
    each of its old spatial weight blocks is placed in the centre of the new one (`recentre`), zeros around it. Kernels of a
    stride larger than the new size stay, since they would skip pixels; so do those with reflecting padding.

    Args:
        graph: traced from the model as it is; trace again afterwards.
        kernel: the new size along each axis that is larger.
        only: globs of layer names, comma-separated.

    Raises:
        NotApplicable: no kernel is larger, or a later layer cannot take the new map.
    """
    layers = [m for name, m in graph.model.named_modules() if _can_shrink(m, kernel) and _matches(name, only)]
    if not layers:
        raise NotApplicable(f"no convolution that may shrink has a kernel larger than {kernel}")
    patch, before = Patch(), {}
    try:
        for layer in layers:
            sizes = [min(k, kernel) for k in layer.kernel_size]
            if not isinstance(layer.padding, str):
                patch.attr(layer, "padding", _padding(layer, sizes))
            if id(layer.weight) not in before:  # a tied weight is cropped once
                before[id(layer.weight)] = tuple(layer.weight.shape)
                patch.data(layer.weight, recentre(layer.weight.data, sizes))
        refresh(graph.model, before, patch)
        for layer in layers:
            _mirror_padding(layer, patch)
        _rebuild_inputs(graph, patch)
        settle(graph, patch)
    except NotApplicable:
        patch.undo()
        raise
    return patch


def _can_shrink(module: nn.Module, kernel: int) -> bool:
    if not isinstance(module, _ConvNd) or isinstance(module, _ConvTransposeNd) or module.padding_mode != "zeros":
        return False
    larger = [stride for stride, size in zip(module.stride, module.kernel_size, strict=True) if size > kernel]
    return bool(larger) and max(larger) <= kernel


def _matches(name: str, only: str) -> bool:
    return any(fnmatchcase(name, p.strip()) for p in only.split(","))


def _padding(layer: _ConvNd, sizes: Sequence[int]) -> tuple[int, ...]:
    assert not isinstance(layer.padding, str)
    geometry = zip(layer.padding, layer.kernel_size, sizes, layer.dilation, strict=True)
    return tuple(max(0, p - d * (k - n) // 2) for p, k, n, d in geometry)


def _mirror_padding(layer: _ConvNd, patch: Patch) -> None:
    """Convolutions keep their padding a second time, per side."""
    if isinstance(layer.padding, str):
        sides = [0, 0] * len(layer.kernel_size)
        if layer.padding == "same":
            for k, (size, dilation) in enumerate(zip(layer.kernel_size, layer.dilation, strict=True)):
                total, at = dilation * (size - 1), 2 * (len(layer.kernel_size) - 1 - k)
                sides[at], sides[at + 1] = total // 2, total - total // 2
    else:
        sides = [p for p in reversed(layer.padding) for _ in range(2)]
    patch.attr(layer, "_reversed_padding_repeated_twice", type(layer._reversed_padding_repeated_twice)(sides))


def _rebuild_inputs(graph: AxisGraph, patch: Patch) -> None:
    inputs = derive(graph.traced, graph.walk).inputs
    states = {id(t): t for t in graph.traced.states.values()}
    before = {key: tuple(states[key].shape) for key in inputs}
    for key, (old, new) in inputs.items():
        weight = states[key]
        if len(old) != len(new):
            raise NotApplicable(f"{graph.traced.names[key][0]} reads a map that changed its rank")
        patch.data(weight, recentre(weight.data.reshape(len(weight), *old), new).reshape(len(weight), -1))
    refresh(graph.model, before, patch)
