"""PyTorch's operations of convolutional networks in tinygrad, with PyTorch's derivatives at kinks and ties."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch

from quadriga.core.errors import NotApplicable

Array = Any  # a tinygrad.Tensor
ELSEWHERE = "train this network with PyTorch"
aten = torch.ops.aten


def conv2d(x: Array, weight: Array, bias: Array = None, stride: Any = 1, padding: Any = 0, *rest: Any) -> Array:
    """x: [batch, in, height, width] → [batch, out, ...]; `rest` is dilation and groups; padding may be "same" or "valid"."""
    dilation, groups = (*rest, *(1, 1)[len(rest) :])
    dilation = _pair(dilation)
    if padding == "same":  # the odd one is put at the end
        high, wide = (d * (k - 1) for d, k in zip(dilation, weight.shape[2:], strict=True))
        sides = (wide // 2, wide - wide // 2, high // 2, high - high // 2)
    else:
        high, wide = _pair(0 if padding == "valid" else padding)
        sides = (wide, wide, high, high)
    return x.conv2d(weight, bias, groups=groups, stride=_pair(stride), dilation=dilation, padding=sides)


def linear(x: Array, weight: Array, bias: Array = None) -> Array:
    """x: [..., in] → [..., out]."""
    y = x @ weight.transpose()
    return y if bias is None else y + bias


def max_pool2d(x: Array, size: Any, stride: Any = (), padding: Any = 0, dilation: Any = 1, ceil: bool = False) -> Array:
    """The gradient goes to the first of equal maxima, as PyTorch's does; tinygrad's own would be shared among them."""
    from tinygrad import Tensor

    _refuse(ceil, "max_pool2d with ceil_mode")
    size = _pair(size)
    high, wide = _pair(padding)
    padded = x.pad((wide, wide, high, high), value=-math.inf) if high or wide else x
    windows = padded._pool(size, _pair(stride or size), _pair(dilation)).flatten(-2)
    first = windows.detach().argmax(-1, keepdim=True)
    return (Tensor.arange(windows.shape[-1]) == first).where(windows, 0).sum(-1)


def avg_pool2d(x: Array, size: Any, stride: Any = (), padding: Any = 0, ceil: bool = False, *rest: Any) -> Array:
    """x: [batch, channels, height, width]; without padding, so that every window is full."""
    _refuse(ceil or any(_pair(padding)), "avg_pool2d with padding or ceil_mode")
    return x._pool(_pair(size), _pair(stride or size)).mean((-2, -1))


def adaptive_avg_pool2d(x: Array, size: Sequence[int]) -> Array:
    """x: [batch, channels, height, width], whose sides are multiples of `size`."""
    sides = tuple(x.shape[2:])
    _refuse(any(a % b for a, b in zip(sides, size, strict=True)), f"adaptive_avg_pool2d of {sides} to {tuple(size)}")
    window = tuple(a // b for a, b in zip(sides, size, strict=True))
    return x._pool(window, window).mean((-2, -1))


def batch_norm(
    x: Array, weight: Array, bias: Array, mean: Array, var: Array, training: bool, momentum: float, eps: float
) -> Any:
    """Returns (y, -, -, running mean, running variance); the variance of the batch is biased in y, unbiased in the running."""
    assert training, "the export writes another operation in evaluation mode"
    shape, axes = (1, -1, *[1] * (x.ndim - 2)), (0, *range(2, x.ndim))
    count = math.prod(x.shape[a] for a in axes)
    now, spread = x.mean(axes), x.var(axes, correction=0)
    running_mean = now.detach() * momentum + mean * (1 - momentum)
    running_var = spread.detach() * (momentum * count / (count - 1)) + var * (1 - momentum)
    y = (x - now.reshape(shape)) * (spread + eps).rsqrt().reshape(shape)
    y = y if weight is None else y * weight.reshape(shape)
    return (y if bias is None else y + bias.reshape(shape)), None, None, running_mean, running_var


def hardtanh(x: Array, low: float = -1.0, high: float = 1.0) -> Array:
    """Clamp; the derivative at both ends is 0. ReLU6 is one."""
    return ((x > low) & (x < high)).where(x, x.detach().clip(low, high))


def add(x: Array, y: Array, *, alpha: float = 1) -> Array:
    """x + alpha · y."""
    return x + (y if alpha == 1 else y * alpha)


def mean(x: Array, axes: Sequence[int], keepdim: bool = False, **kind: Any) -> Array:
    """Over the axes."""
    return x.mean(tuple(axes), keepdim=keepdim)


def _pair(value: Any) -> tuple[int, int]:
    values = tuple(value) if isinstance(value, list | tuple) else (value,)
    return (values[0], values[-1])


def _refuse(unable: bool, what: str) -> None:
    if unable:
        raise NotApplicable(f"OpenCL training has no {what}", ELSEWHERE)


OPERATIONS: dict[Any, Callable[..., Any]] = {
    aten.conv2d.default: conv2d,
    aten.conv2d.padding: conv2d,
    aten.linear.default: linear,
    aten.relu.default: lambda x: (x > 0).where(x, 0),
    aten.hardtanh.default: hardtanh,
    aten.relu6.default: lambda x: hardtanh(x, 0.0, 6.0),
    aten.sigmoid.default: lambda x: x.sigmoid(),
    aten.tanh.default: lambda x: x.tanh(),
    aten.max_pool2d.default: max_pool2d,
    aten.avg_pool2d.default: avg_pool2d,
    aten.adaptive_avg_pool2d.default: adaptive_avg_pool2d,
    aten._native_batch_norm_legit_functional.default: batch_norm,
    aten.mean.dim: mean,
    aten.add.Tensor: add,
    aten.mul.Tensor: lambda x, y: x * y,
    aten.view.default: lambda x, shape: x.reshape(tuple(shape)),
    aten.sym_size.int: lambda x, axis: x.shape[axis],
    **{f: f for f in (operator.getitem, operator.add, operator.sub, operator.mul, operator.floordiv)},
}
