"""Share kernels: every 2-D kernel of a convolution is a mixture of a few learned ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from quadriga.core.errors import BadInput, NotApplicable
from quadriga.core.method import Family, Method, Numerics
from quadriga.core.setup import Setup
from quadriga.methods.structure._replace import Layer, plain_layers, replace_layers


class SharedKernels(nn.Module):
    """A convolution whose kernels are mixtures: weight[o, i] = Σ_b mix[o, i, b] · basis[b].

    Every channel is convolved with each kernel of the basis, and a 1×1 convolution mixes the results: `bases` / (kh · kw) of
    the weights and products, and a little more.

    Args:
        conv: weight[out, in, kh, kw], one group; the start is the best fit to it.
        bases: kernels in the set. With kh · kw of them it is the convolution itself.

    Example:
        >>> shared = SharedKernels(nn.Conv2d(8, 16, 3, padding=1), 4)
        >>> shared.basis.shape, shared.mix.weight.shape
        (torch.Size([4, 1, 3, 3]), torch.Size([16, 32, 1, 1]))
    """

    def __init__(self, conv: nn.Conv2d, bases: int) -> None:
        super().__init__()
        weight = conv.weight.data
        out, inside, *kernel = weight.shape
        u, s, v = torch.linalg.svd(weight.double().flatten(2).reshape(out * inside, -1), full_matrices=False)
        root = s[:bases].sqrt()
        self.basis = nn.Parameter((root[:, None] * v[:bases]).reshape(bases, 1, *kernel).to(weight))
        self.mix = nn.Conv2d(inside * bases, out, 1, bias=conv.bias is not None, device=weight.device, dtype=weight.dtype)
        self.mix.weight.data.copy_((u[:, :bases] * root).reshape(out, inside * bases, 1, 1))
        if conv.bias is not None and self.mix.bias is not None:
            self.mix.bias.data.copy_(conv.bias.data)
        self.stride, self.dilation = conv.stride, conv.dilation
        self.mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
        self.pad = [] if conv.padding == "valid" else list(conv._reversed_padding_repeated_twice)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, in, height, width] → [batch, out, height', width']."""
        x = functional.pad(x, self.pad, mode=self.mode) if any(self.pad) else x
        channels = x.shape[1]
        basis = self.basis.repeat(channels, 1, 1, 1)
        return self.mix(functional.conv2d(x, basis, stride=self.stride, dilation=self.dilation, groups=channels))


def bases_by_energy(weight: Tensor, energy: float) -> int:
    """The fewest kernels whose mixtures keep this share of the squared weights.

    Example:
        >>> bases_by_energy(torch.ones(4, 4, 3, 3), 0.99)
        1
    """
    squares = torch.linalg.svdvals(weight.double().flatten(2).flatten(0, 1)).square()
    share = squares.cumsum(0) / squares.sum().clamp_min(1e-300)
    return min(len(squares), int((share < energy).sum()) + 1)


@dataclass(frozen=True, kw_only=True)
class ShareKernels(Method):
    """Let the 2-D kernels of each convolution come from a small learned set, by mixture.

    Training may follow. Fewer weights and products; whether it is faster is for the runtime to say. 1×1 kernels, groups, tied
    layers, and those that would not become smaller are left.

    Args:
        energy: share of the squared weights that the mixtures keep, in (0, 1); it decides how many kernels the set has.
        bases: instead of energy, the number of kernels.
        only: layers to act on: globs of names, comma-separated.

    Source: Li et al. 2019, filter basis, arXiv:1908.08932; Chollet 2017 for what it becomes with one kernel, arXiv:1610.02357.
    """

    family = Family.STRUCTURE
    numerics = Numerics.CHANGED
    source = "arXiv:1908.08932"
    requires = frozenset({"FLOAT_WEIGHTS"})
    search: ClassVar = {"bases": (4, 2, 6)}

    energy: float = 0.9
    bases: int | None = None
    only: str = "*"

    def __post_init__(self) -> None:
        if not 0 < self.energy < 1:
            raise BadInput(f"share_kernels.energy is {self.energy!r}", "it is a share between 0 and 1")
        if self.bases is not None and self.bases < 1:
            raise BadInput(f"share_kernels.bases is {self.bases!r}", "give at least 1")

    def apply(self, setup: Setup) -> Setup:
        layers: dict[str, Layer] = {n: m for n, m in plain_layers(setup.model, self.only) if isinstance(m, nn.Conv2d)}
        return replace_layers(setup, layers, self._make, "share_kernels replaces no layer", "dense 2-D convolution")

    def _make(self, name: str, layer: Layer) -> nn.Module:
        assert isinstance(layer, nn.Conv2d)
        positions = layer.weight[0, 0].numel()
        if positions == 1:
            raise NotApplicable(f"{name} has a kernel of one position")
        bases = self.bases or bases_by_energy(layer.weight.data, self.energy)
        if bases > len(layer.weight.flatten(0, 1)):
            raise NotApplicable(f"{name} has fewer kernels than {bases}")
        shared = SharedKernels(layer, bases)
        count = sum(p.numel() for p in shared.parameters())
        if count >= sum(p.numel() for p in layer.parameters()):
            raise NotApplicable(f"{name} would have {count} weights with {bases} kernels of {positions} positions")
        return shared
