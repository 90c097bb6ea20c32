"""How much a unit matters, summed over everything that is cut with it; and which units stay."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from quadriga.core.axes.graph import AxisGraph
from quadriga.core.axes.groups import Group, Member

Score = Callable[[Group], Tensor | None]  # → float64 [units], higher matters more; None where it does not apply


def magnitude(graph: AxisGraph) -> Score:
    """L2 norm of all weights of the unit, in all coupled layers (DepGraph, Fang et al. 2023, arXiv:2301.12900)."""

    def score(group: Group) -> Tensor | None:
        return _sum(group, lambda m: m.tensor.data.double().square()).sqrt()

    return score


def taylor(graph: AxisGraph, gradients: Mapping[str, Tensor]) -> Score:
    """Squared first-order change of the loss when the unit goes: Σ over layers of (Σ gradient · weight)².

    Source: Molchanov et al. 2019, arXiv:1906.10771, equation 8, with their group contribution.
    """

    def slope(member: Member) -> Tensor:
        found = [gradients[n] for n in member.names if n in gradients]
        product = torch.zeros_like(member.tensor) if not found else member.tensor.data * found[0].to(member.tensor.device)
        return product.double()

    return lambda group: _sum(group, slope, lambda v: v.square())


def hessian(graph: AxisGraph, curvature: Mapping[str, Tensor]) -> Score:
    """How much the loss rises when the unit goes, going by the Hessian's diagonal h: ½ Σ h · weight² over all layers.

    Source: LeCun et al. 1990, Optimal Brain Damage.
    """

    def rise(member: Member) -> Tensor:
        found = [curvature[n] for n in member.names if n in curvature]
        weight = member.tensor.data.double()
        return torch.zeros_like(weight) if not found else 0.5 * found[0].to(weight) * weight.square()

    return lambda group: _sum(group, rise)


def bn_scale(graph: AxisGraph) -> Score:
    """Absolute scale of the unit's batch normalization (Network Slimming, Liu et al. 2017, arXiv:1708.06519)."""
    norms = {id(m.weight) for m in graph.model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.affine}

    def score(group: Group) -> Tensor | None:
        if not any(id(m.tensor) in norms for m in group.members):
            return None
        return _sum(group, lambda m: m.tensor.data.double().abs() * float(id(m.tensor) in norms))

    return score


def _sum(group: Group, values: Callable[[Member], Tensor], after: Callable[[Tensor], Tensor] = lambda v: v) -> Tensor:
    """Add up over members: `values` sum within a unit's slice of one member, then `after`, then over members."""
    total = torch.zeros(group.size, dtype=torch.float64)
    for member in group.members:
        if not isinstance(member.tensor, nn.Parameter) or not member.tensor.is_floating_point():
            continue
        slices = values(member).movedim(member.dim, 0).reshape(len(member.units), -1).sum(1).cpu()
        here = member.units >= 0
        total += after(torch.zeros(group.size, dtype=torch.float64).index_add_(0, member.units[here], slices[here]))
    return total


def best(scores: Tensor, width: int) -> Tensor:
    """The `width` units with the highest scores, in their own order; equal scores keep the first.

    Example:
        >>> best(torch.tensor([1., 3., 2.]), 2)
        tensor([1, 2])
    """
    return scores.argsort(descending=True, stable=True)[:width].sort().values


def rounded(width: float, size: int, multiple: int = 1) -> int:
    """The nearest multiple, at least one multiple, at most the size that there is.

    Example:
        >>> rounded(120 * 0.667, 120), rounded(0.2, 6), rounded(11, 16, 8), rounded(15, 16, 8), rounded(1, 6, 8)
        (80, 1, 8, 16, 6)
    """
    return min(size, max(multiple, round(width / multiple) * multiple))
