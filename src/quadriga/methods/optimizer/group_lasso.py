"""Group lasso on the axis graph: whole units shrink together, to exact zeros, and can be cut without changing outputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from quadriga.core.axes import AxisGraph, Group, Member, select
from quadriga.core.batch import Tree
from quadriga.core.errors import BadInput, NotApplicable
from quadriga.core.method import Family, Method, Numerics
from quadriga.core.setup import Setup
from quadriga.methods.optimizer._penalty import rate, skipped, wrapped

KINDS = ("conv", "linear", "recurrent")


@dataclass(frozen=True, kw_only=True)
class GroupLasso(Method):
    """After each step, shrink every unit by the factor max(1 - lr · amount · √count / norm, 0).

    A unit is what channel pruning would cut together: its rows in every layer that produces it, its norm's scale and bias, and
    its columns in every layer that reads it; count and norm are of all these weights. Units that reach zero are taken out
    by `prune_channels(zeros=true)` after the train step, and outputs stay what they were. A weight between two layers
    belongs to a unit of each, and both factors multiply it. Averages of weights (schedule-free, `ema`, `swa`) do not become
    zero.

    Args:
        amount: positive, per unit of learning rate; over a train step a unit loses about (sum of the rates) · amount of its
            root mean square weight, unless the loss holds it.
        only: layers to act on: globs of names, comma-separated.

    Source: Yuan & Lin 2006, doi:10.1111/j.1467-9868.2005.00532.x, equation 2.4; Wen et al. 2016, arXiv:1608.03665 (channels of
    networks); Parikh & Boyd 2014, section 6.5.4 (the proximal step); units as in Fang et al. 2023, arXiv:2301.12900.
    """

    family = Family.OPTIMIZER
    numerics = Numerics.CHANGED
    source = "https://doi.org/10.1111/j.1467-9868.2005.00532.x, arXiv:1608.03665"
    search: ClassVar = {"amount": (1e-3, 1e-2, 1e-1)}
    requires = frozenset({"TRAIN_DATA"})

    amount: float = 1e-3
    only: str = "*"

    def __post_init__(self) -> None:
        if not self.amount > 0:
            raise BadInput(f"group_lasso.amount is {self.amount}", "give a positive number")

    def apply(self, setup: Setup) -> Setup:
        example = setup.context.example
        planned = self.widths(setup.model, example)

        def change(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
            known = planned if fits(planned, model) else self.widths(model, example)  # a later step may have changed it
            for group in optimizer.param_groups:
                group["group_l1"] = self.amount
            optimizer.register_step_post_hook(UnitShrink(known, model, optimizer))

        return wrapped(setup, "group_l1", change)

    def widths(self, model: nn.Module, example: Tree) -> list[Width]:
        """The widths that may be cut and are trained as a whole, by the names of their weights."""
        groups = select(AxisGraph.trace(model, example).groups(), self.only, KINDS)
        found = [width_of(g) for g in groups if all(m.tensor.requires_grad for m in weights_of(g))]
        if not found:
            raise NotApplicable("there is no width of convolutions, Linear or recurrent layers that may be cut and is trained")
        return found


@dataclass(frozen=True)
class Width:
    """Where the units of a width are.

    Args:
        size: number of units.
        slices: (name of a parameter, its dimension, int64 unit at each position of that dimension, −1 for none).
    """

    size: int
    slices: tuple[tuple[str, int, Tensor], ...]


def weights_of(group: Group) -> list[Member]:
    """The members that are trained, as buffers are not."""
    return [m for m in group.members if isinstance(m.tensor, nn.Parameter) and m.tensor.is_floating_point()]


def width_of(group: Group) -> Width:
    """A group of the axis graph without its tensors."""
    return Width(group.size, tuple((m.names[0], m.dim, m.units) for m in weights_of(group)))


def fits(widths: Sequence[Width], model: nn.Module) -> bool:
    """Whether a model has the parameters of these widths."""
    shapes = {name: p.shape for name, p in model.named_parameters(remove_duplicate=False)}
    slices = [one for width in widths for one in width.slices]
    return all(name in shapes and dim < len(shapes[name]) and shapes[name][dim] == len(units) for name, dim, units in slices)


def group_shrink(norms: Tensor, thresholds: Tensor) -> Tensor:
    """The factors of block soft-thresholding, max(1 - threshold / norm, 0).

    Example:
        >>> group_shrink(torch.tensor([4.0, 0.5, 0.0]), torch.tensor([1.0, 1.0, 0.0]))
        tensor([0.7500, 0.0000, 1.0000])
    """
    return (1 - thresholds / norms.clamp_min(torch.finfo(norms.dtype).tiny)).clamp_min(0)


class UnitShrink:
    """A step hook that shrinks all units of some widths, by their norms before any of them shrinks.

    Args:
        widths: of the model.
        model: whose parameters they are.
        optimizer: a width goes by the rate of the group that its first weight is in.
    """

    def __init__(self, widths: Sequence[Width], model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        named = dict(model.named_parameters(remove_duplicate=False))
        self.parts = [(named[name], dim) for width in widths for name, dim, _ in width.slices]
        starts = torch.tensor([0, *(width.size for width in widths)]).cumsum(0)
        self.count = int(starts[-1])
        index = [(u, int(start)) for w, start in zip(widths, starts[:-1], strict=True) for _, _, u in w.slices]
        place = torch.cat([torch.where(u < 0, self.count, u + start) for u, start in index])
        each = torch.cat([torch.full((p.shape[dim],), p.numel() / p.shape[dim]) for p, dim in self.parts])
        roots = torch.zeros(self.count + 1).index_add_(0, place, each).sqrt()[: self.count]
        owners = {id(p): g for g, group in enumerate(optimizer.param_groups) for p in group["params"]}
        owner = torch.tensor([owners[id(named[w.slices[0][0]])] for w in widths for _ in range(w.size)])
        device = self.parts[0][0].device
        self.roots = [(roots * (owner == g)).to(device) for g in range(len(optimizer.param_groups))]
        self.order, self.place = place.argsort(stable=True).to(device), place.to(device)
        self.lengths = place.bincount(minlength=self.count + 1).to(device)

    @torch.no_grad()
    def __call__(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        """One proximal step."""
        if skipped(optimizer):
            return
        thresholds = torch.zeros_like(self.roots[0])
        for group, roots in zip(optimizer.param_groups, self.roots, strict=True):
            thresholds += rate(group) * group["group_l1"] * roots
        factors = group_shrink(self.norms(), thresholds)
        factors = torch.cat([factors, factors.new_ones(1)])[self.place]  # 1 for what belongs to no unit
        for (p, dim), factor in zip(self.parts, factors.split([p.shape[dim] for p, dim in self.parts]), strict=True):
            p.mul_(factor.view([-1 if d == dim else 1 for d in range(p.dim())]))

    def norms(self) -> Tensor:
        """Of all units: summed in a fixed order, so that equal runs are equal on a GPU too."""
        squares = torch.cat([slice_norms(p, dim) for p, dim in self.parts]).square()
        return torch.segment_reduce(squares[self.order], "sum", lengths=self.lengths)[: self.count].sqrt()


def slice_norms(weight: Tensor, dim: int) -> Tensor:
    """The norm at each position of a dimension, in at least single precision."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    others = [d for d in range(weight.dim()) if d != dim]
    return torch.linalg.vector_norm(weight, dim=others, dtype=wide) if others else weight.abs().to(wide)
