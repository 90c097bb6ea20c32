"""Grouped substitution: a dense layer in which each group of outputs reads its own group of inputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from quadriga.core.errors import BadInput, NotApplicable
from quadriga.core.method import Family, Method, Numerics
from quadriga.core.setup import Setup
from quadriga.methods.structure._granules import RoundTo, check_round_to, granules
from quadriga.methods.structure._moments import Moments, moments
from quadriga.methods.structure._replace import Layer, kind_of, plain_layers, replace_layers

Conv = nn.Conv1d | nn.Conv2d
BATCHES = 8  # of calibration data
SIDES = ("grouped_in", "grouped_out")


def in_groups(conv: Conv, groups: int, seen: Moments) -> Conv:
    """The convolution in groups whose outputs are nearest to the dense one's, in the mean square over the data seen.

    Each output becomes the regression of what it was on the inputs of its own group, with an intercept if there is a bias.

    Args:
        conv: weight[out, in, k…], one group.
        groups: divides both channel counts.
        seen: moments of the patches that the layer reads.

    Returns:
        a convolution with `groups`, 1 / groups of the weights.
    """
    weight, centre = conv.weight.data.double().flatten(1), seen.mean
    second = seen.second()
    if conv.bias is not None:
        second = second - centre.outer(centre)
    like: dict[str, Any] = {"device": conv.weight.device, "dtype": conv.weight.dtype, "bias": conv.bias is not None}
    geometry: dict[str, Any] = {k: getattr(conv, k) for k in ("kernel_size", "stride", "padding", "dilation", "padding_mode")}
    new = kind_of(conv)(conv.in_channels, conv.out_channels, groups=groups, **geometry, **like)
    parts = [_regress(w, second, own) for w, own in zip(weight.chunk(groups), _own(weight.shape[1], groups), strict=True)]
    new.weight.data.copy_(torch.cat(parts).reshape(new.weight.shape))
    if conv.bias is not None and new.bias is not None:
        means = [
            w @ centre - p @ centre[own]
            for w, p, own in zip(weight.chunk(groups), parts, _own(weight.shape[1], groups), strict=True)
        ]
        new.bias.data.copy_(conv.bias.data + torch.cat(means))
    return new


def _own(width: int, groups: int) -> list[slice]:
    size = width // groups
    return [slice(g * size, (g + 1) * size) for g in range(groups)]


def _regress(weight: Tensor, second: Tensor, own: slice) -> Tensor:
    """The weights on `own` inputs that predict weight · x best: weight · M[:, own] · M[own, own]⁻¹."""
    return torch.linalg.solve(second[own, own], second[own] @ weight.T).T


@dataclass(frozen=True, kw_only=True)
class Grouped(Method):
    """Replace dense convolutions by grouped ones, starting from the best fit to their outputs on calibration data.

    Training has to follow. Layers whose channels `groups` does not divide, depthwise and grouped ones, and tied ones are left;
    so are those whose channels are whole granules, and those of a group would not be.

    Args:
        groups: number of groups.
        round_to: the granule of the channels of a group. "auto": the steps of width that the recipe's runtime takes
            at full speed in its precision, measured once on a machine. A table gives them by kind of layer.
        only: layers to act on: globs of names, comma-separated.

    Source: Xie et al. 2017, ResNeXt, arXiv:1611.05431; the fit is a regression.
    """

    family = Family.STRUCTURE
    numerics = Numerics.CHANGED
    source = "arXiv:1611.05431"
    requires = frozenset({"FLOAT_WEIGHTS"})
    search: ClassVar = {"groups": (2, 4)}

    groups: int = 2
    round_to: RoundTo = "auto"
    only: str = "*"

    def __post_init__(self) -> None:
        if self.groups < 2:
            raise BadInput(f"grouped.groups is {self.groups!r}", "give at least 2")
        check_round_to(self.name, self.round_to)

    def apply(self, setup: Setup) -> Setup:
        layers = {n: m for n, m in plain_layers(setup.model, self.only) if not isinstance(m, nn.Linear)}
        seen = moments(setup.model, layers, setup.context.calibration[:BATCHES])
        grain = granules(self.round_to, SIDES if layers else (), setup)

        def make(name: str, layer: Layer) -> nn.Module:
            assert not isinstance(layer, nn.Linear)
            if layer.in_channels % self.groups or layer.out_channels % self.groups:
                channels = f"{layer.in_channels} → {layer.out_channels}"
                raise NotApplicable(f"{name} ({channels} channels) does not divide into {self.groups} groups")
            for width, side in zip((layer.in_channels, layer.out_channels), SIDES, strict=True):
                own, step = width // self.groups, grain[side].step
                if width % step == 0 and grain[side].up(own) != own:
                    raise NotApplicable(f"{name} would have groups of {own} channels, off the step {step}")
            if name not in seen:
                raise NotApplicable(f"{name} is never called")
            return in_groups(layer, self.groups, seen[name])

        return replace_layers(setup, layers, make, "grouped replaces no layer", "dense convolution")
