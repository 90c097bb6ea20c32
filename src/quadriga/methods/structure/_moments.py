"""First and second moments of what layers read, over calibration data."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from quadriga.core.batch import Batch, call, device_of, evaluating
from quadriga.methods.structure._replace import Layer


@dataclass
class Moments:
    """Sums over rows: what a Linear reads at each position, or the patch under a convolution's kernel.

    Args:
        total: Σ x, float64 [n].
        square: Σ x xᵀ, float64 [n, n].
        count: number of rows.
    """

    total: Tensor
    square: Tensor
    count: int = 0

    def add(self, rows: Tensor) -> None:
        """Count in rows [many, n]."""
        rows = rows.double()
        self.total += rows.sum(0)
        self.square += rows.T @ rows
        self.count += len(rows)

    @property
    def mean(self) -> Tensor:
        """[n]."""
        return self.total / max(self.count, 1)

    def second(self, ridge: float = 1e-6) -> Tensor:
        """E[x xᵀ] with a small share of its mean diagonal added, so that it has an inverse: [n, n]."""
        mean = self.square / max(self.count, 1)
        return mean + ridge * mean.diagonal().mean().clamp_min(1e-30) * torch.eye(
            len(mean), dtype=mean.dtype, device=mean.device
        )


def rows(layer: Layer, x: Tensor) -> Tensor:
    """What each output reads, one a row: x[..., in] → [many, in]; maps → [many, channels · kernel], as `weight.flatten(1)` is.

    Example:
        >>> conv, x = nn.Conv2d(2, 3, 3, padding=1, bias=False), torch.randn(1, 2, 4, 4)
        >>> torch.allclose(rows(conv, x) @ conv.weight.flatten(1).T, conv(x)[0].flatten(1).T, atol=1e-5)
        True
    """
    if isinstance(layer, nn.Linear):
        return x.reshape(-1, x.shape[-1])
    kernel, stride, dilation = ((1,) * (2 - len(t)) + tuple(t) for t in (layer.kernel_size, layer.stride, layer.dilation))
    if layer.padding != "valid":
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        x = functional.pad(x, layer._reversed_padding_repeated_twice, mode=mode)
    x = x.unsqueeze(-2) if isinstance(layer, nn.Conv1d) else x
    found = functional.unfold(x, kernel, dilation=dilation, stride=stride)
    return found.transpose(1, 2).reshape(-1, found.shape[1])


def moments(model: nn.Module, layers: Mapping[str, Layer], batches: Iterable[Batch]) -> dict[str, Moments]:
    """Moments of the inputs of each layer that the model calls, in eval mode; a layer that is never called is left out."""
    found: dict[str, Moments] = {}

    def watch(name: str) -> Any:
        def hook(layer: Layer, args: tuple[Any, ...]) -> None:
            seen = rows(layer, args[0].detach())
            width = seen.shape[1]
            zeros = torch.zeros(width, width, dtype=torch.float64, device=seen.device)
            found.setdefault(name, Moments(zeros[0].clone(), zeros)).add(seen)

        return hook

    with ExitStack() as stack, evaluating(model), torch.no_grad():
        for name, layer in layers.items():
            stack.callback(layer.register_forward_pre_hook(watch(name)).remove)
        for batch in batches:
            call(model, batch.to(device_of(model)).inputs)
    return found
