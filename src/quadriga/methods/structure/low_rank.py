"""Low rank: a matrix as the product of two thin ones."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from quadriga.core.axes import Patch, Reference, check_interface
from quadriga.core.errors import BadInput, NotApplicable
from quadriga.core.method import Family, Method, Numerics
from quadriga.core.setup import Setup

Layer = nn.Linear | nn.Conv1d | nn.Conv2d


def factorize(layer: Layer, rank: int) -> tuple[Layer, Layer]:
    """The best approximation of a layer by two of that rank: `up(down(x)) ≈ layer(x)` (Eckart–Young).

    Args:
        layer: a Linear with weight[m, n], or a convolution with weight[m, channels, k…] and one group, read as
            a matrix [m, n] with n = channels·k…; then `down` has the kernel, stride and padding, and `up` is 1×1.
        rank: from 1 to min(m, n).

    Returns:
        down (n → rank, without bias) and up (rank → m, with the layer's bias); singular values are shared evenly.

    Raises:
        ValueError: the rank is out of range, or the convolution has groups.

    Example:
        >>> down, up = factorize(nn.Linear(32, 24), 6)
        >>> down.weight.shape, up.weight.shape
        (torch.Size([6, 32]), torch.Size([24, 6]))
    """
    matrix = layer.weight.data.flatten(1)
    if not 1 <= rank <= min(matrix.shape) or getattr(layer, "groups", 1) != 1:
        raise ValueError(f"rank {rank} for {layer}; give 1 to {min(matrix.shape)}, and a convolution with one group")
    u, s, v = torch.linalg.svd(matrix.double(), full_matrices=False)
    root = s[:rank].sqrt()
    down, up = _pair(layer, rank)
    down.weight.data.copy_((root[:, None] * v[:rank]).reshape(down.weight.shape))
    up.weight.data.copy_((u[:, :rank] * root).reshape(up.weight.shape))
    if layer.bias is not None and up.bias is not None:
        up.bias.data.copy_(layer.bias.data)
    return down, up


def _pair(layer: Layer, rank: int) -> tuple[Layer, Layer]:
    like: dict[str, Any] = {"device": layer.weight.device, "dtype": layer.weight.dtype}
    bias = layer.bias is not None
    if isinstance(layer, nn.Linear):
        return nn.Linear(layer.in_features, rank, bias=False, **like), nn.Linear(rank, layer.out_features, bias=bias, **like)
    geometry: dict[str, Any] = {k: getattr(layer, k) for k in ("kernel_size", "stride", "padding", "dilation", "padding_mode")}
    down = type(layer)(layer.in_channels, rank, bias=False, **geometry, **like)
    return down, type(layer)(rank, layer.out_channels, 1, bias=bias, **like)


def break_even(weight: Tensor) -> float:
    """The rank m·n / (m + n) from which on two factors hold as many numbers, and cost as many products, as one matrix.

    Example:
        >>> break_even(torch.ones(100, 100))
        50.0
    """
    m, n = weight.flatten(1).shape
    return m * n / (m + n)


def rank_by_energy(weight: Tensor, energy: float) -> int:
    """The least rank that keeps this share of the squared singular values."""
    squares = torch.linalg.svdvals(weight.data.flatten(1).double()).square()
    share = squares.cumsum(0) / squares.sum().clamp_min(1e-300)
    return min(len(squares), int((share < energy).sum()) + 1)


@dataclass(frozen=True, kw_only=True)
class LowRank(Method):
    """Replace Linear and convolution layers by two thin ones where that pays.

    A layer is left alone when it is tied, when its rank reaches break-even, or when the model reads its weight directly.

    Args:
        energy: share of the squared singular values that each layer keeps, in (0, 1).
        ratio: instead of energy, the share of its weights that each layer keeps, in (0, 1).
        only: layers to act on: globs of names, comma-separated.

    Source: Denton et al. 2014, arXiv:1404.0736; Eckart and Young 1936.
    """

    family = Family.STRUCTURE
    numerics = Numerics.CHANGED
    source = "arXiv:1404.0736"
    requires = frozenset({"FLOAT_WEIGHTS"})
    search: ClassVar = {"energy": (0.9, 0.8, 0.95)}

    energy: float = 0.9
    ratio: float | None = None
    only: str = "*"

    def __post_init__(self) -> None:
        for name in ("energy", "ratio"):
            if (value := getattr(self, name)) is not None and not 0 < value < 1:
                raise BadInput(f"low_rank.{name} is {value!r}", "it is a share between 0 and 1")

    def apply(self, setup: Setup) -> Setup:
        model, example = setup.model, setup.context.example
        reference, done, reasons = Reference.of(model, example), 0, []
        for name, layer in candidates(model, self.only):
            rank, limit = self._rank(layer), break_even(layer.weight)
            if rank >= limit:
                reasons.append(f"{name} needs rank {rank}, break-even is {limit:.1f}")
                continue
            patch = Patch()
            patch.module(model, name, nn.Sequential(*factorize(layer, rank)))
            try:
                check_interface(model, example, reference)
                done += 1
            except NotApplicable as error:
                patch.undo()
                reasons.append(f"{name}: {error.reason}")
        if not done:
            why = "; ".join(reasons[:4]) or "no untied Linear or convolution matches"
            raise NotApplicable(f"low rank pays in no layer: {why}")
        return replace(setup, model=model)

    def _rank(self, layer: Layer) -> int:
        if self.ratio is not None:
            return max(1, int(self.ratio * break_even(layer.weight)))
        return rank_by_energy(layer.weight, self.energy)


def candidates(model: nn.Module, only: str = "*") -> Iterator[tuple[str, Layer]]:
    """Plain Linear and convolution layers with one group whose parameters are not tied and not called for by two names."""
    names = [(n, m) for n, m in model.named_modules(remove_duplicate=False)]
    uses: dict[int, int] = {}
    for _, tensor in model.named_parameters(remove_duplicate=False):
        uses[id(tensor)] = uses.get(id(tensor), 0) + 1
    for name, module in names:
        if not name or type(module) not in (nn.Linear, nn.Conv1d, nn.Conv2d) or getattr(module, "groups", 1) != 1:
            continue
        if all(uses[id(p)] == 1 for p in module.parameters()) and any(fnmatchcase(name, p.strip()) for p in only.split(",")):
            yield name, module
