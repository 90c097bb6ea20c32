"""Tie equal-shaped blocks of a stack, or equal-shaped layers: fewer weights, each used several times."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from quadriga.core.axes import Patch, Reference, check_interface
from quadriga.core.errors import BadInput, NotApplicable
from quadriga.core.method import Family, Method, Numerics
from quadriga.core.plain import is_plain
from quadriga.core.setup import Setup
from quadriga.core.stacks import Block, blocks_of
from quadriga.methods.structure._replace import plain_layers

Slot = tuple[nn.Module, str]  # a module and the name of its parameter


class Adapted(nn.Linear):
    """A Linear whose weight is shared, with a low-rank difference of its own: y = (W + up · down) x + b.

    Args:
        like: takes its bias; the weight is given later.
        weight: the shared one, [out, in].
        difference: what this use should add to it, [out, in]; its best approximation of that rank is the start.
        rank: of the difference.
    """

    def __init__(self, like: nn.Linear, weight: nn.Parameter, difference: Tensor, rank: int) -> None:
        super().__init__(like.in_features, like.out_features, bias=False, device="meta")
        u, s, v = torch.linalg.svd(difference.double(), full_matrices=False)
        root = s[:rank].sqrt()
        self.weight, self.bias = weight, like.bias
        self.down = nn.Parameter((root[:, None] * v[:rank]).to(weight.dtype))
        self.up = nn.Parameter((u[:, :rank] * root).to(weight.dtype))

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] → [..., out]."""
        return super().forward(x) + functional.linear(functional.linear(x, self.down), self.up)


def runs(blocks: Sequence[Block], sets: int) -> list[list[Block]]:
    """Cut a stack into runs of neighbours of one class and equal shapes, as evenly as can be, `sets` for each kind of block.

    Example:
        >>> stack = nn.ModuleList(nn.Sequential(nn.Linear(2, 2)) for _ in range(5))
        >>> [len(run) for run in runs([Block(str(i), stack, m) for i, m in enumerate(stack)], 2)]
        [3, 2]
    """
    alike: list[list[Block]] = []
    for block in blocks:
        if alike and block.stack is alike[-1][-1].stack and _shapes(block.module) == _shapes(alike[-1][-1].module):
            alike[-1].append(block)
        else:
            alike.append([block])
    return parted(alike, sets)


def layers_alike(model: nn.Module, only: str = "*") -> list[list[Block]]:
    """Linear and convolution layers that may be tied, by equal class, shapes and geometry, wherever they stand, in order."""
    alike: dict[str, list[Block]] = {}
    for name, layer in plain_layers(model, only):
        alike.setdefault(f"{layer} {_shapes(layer)}", []).append(Block(name, None, layer))
    return list(alike.values())


def parted(alike: Sequence[list[Block]], sets: int) -> list[list[Block]]:
    """Each list cut into so many, as evenly as can be; those of one block are left out."""
    cut: list[list[Block]] = []
    for kind in alike:
        parts = min(sets, len(kind))
        ends = [-(-len(kind) * k // parts) for k in range(parts + 1)]
        cut += [kind[a:b] for a, b in pairwise(ends)]
    return [run for run in cut if len(run) > 1]


def _shapes(module: nn.Module) -> list[Any]:
    return [type(module), *((n, tuple(p.shape), p.dtype) for n, p in module.named_parameters(remove_duplicate=False))]


def tie(model: nn.Module, run: Sequence[Block], rank: int, patch: Patch) -> None:
    """Let all blocks of a run use the first one's matrices, set to the mean; vectors (norms, biases) stay their own.

    Args:
        model: that holds them.
        rank: of each Linear's own difference from the mean; 0 for none.
        patch: records the changes.
    """
    for name, first in list(run[0].module.named_parameters()):
        if first.dim() < 2:
            continue
        slots = [_slot(block.module, name) for block in run]
        if len({module._parameters[key].requires_grad for module, key in slots}) > 1:  # type: ignore[union-attr]
            raise NotApplicable(f"{run[0].name} to {run[-1].name} are frozen in part", "freeze all of them, or none")
        values = [module._parameters[key].data.clone() for module, key in slots]  # type: ignore[union-attr]
        mean = torch.stack([v.double() for v in values]).mean(0).to(first.dtype)
        patch.data(first, mean)
        for block, (module, key), value in zip(run, slots, values, strict=True):
            path = f"{block.name}.{name}".rpartition(".")[0]
            if rank and is_plain(module, nn.Linear) and rank < min(value.shape):
                patch.module(model, path, Adapted(module, first, value - mean, rank))
            else:
                patch.parameter(module, key, first)


def _slot(module: nn.Module, name: str) -> Slot:
    path, _, key = name.rpartition(".")
    return module.get_submodule(path), key


@dataclass(frozen=True, kw_only=True)
class TieLayers(Method):
    """Let equal-shaped neighbours in a stack of blocks share their matrices and kernels, as ALBERT's layers do.

    Where no stack has any, Linear and convolution layers of equal shape share one weight. The shared weight starts from the
    mean; norms and biases stay each block's own, and blocks with a weight that is tied already are left. Fewer bytes, the same
    latency.

    Args:
        sets: different sets of weights that stay in each run of equal blocks; with 1 all of them share.
        rank: of a difference that each Linear adds to the shared weight for itself, initialised from what it was; 0 for none.
        only: blocks, or single layers, to act on: globs of names, comma-separated.

    Source: Lan et al. 2020, ALBERT, arXiv:1909.11942; Bae et al. 2025, Relaxed Recursive Transformers, arXiv:2410.20672 (rank).
    """

    family = Family.STRUCTURE
    numerics = Numerics.CHANGED
    source = "arXiv:1909.11942"
    requires = frozenset({"FLOAT_WEIGHTS"})
    search: ClassVar = {"sets": (1, 2), "rank": (0, 4)}

    sets: int = 1
    rank: int = 0
    only: str = "*"

    def __post_init__(self) -> None:
        for name, least in (("sets", 1), ("rank", 0)):
            if getattr(self, name) < least:
                raise BadInput(f"tie_layers.{name} is {getattr(self, name)!r}", f"give at least {least}")

    def apply(self, setup: Setup) -> Setup:
        model = setup.model
        blocks = [b for b in blocks_of(model) if any(fnmatchcase(b.name, g.strip()) for g in self.only.split(","))]
        found, reasons = runs(_outermost(blocks), self.sets), list[str]()
        found = found or parted(layers_alike(model, self.only), self.sets)
        if not found:
            raise NotApplicable(
                f"no stack holds neighbours of one class and equal shapes, and no two layers are alike{self._at}"
            )
        reference, done = Reference.of(model, setup.context.example), 0
        for run in found:
            patch, before = Patch(), sum(p.numel() for p in model.parameters())
            try:
                _untied(model, run)
                tie(model, run, self.rank, patch)
                check_interface(model, setup.context.example, reference)
                if sum(p.numel() for p in model.parameters()) >= before:
                    raise NotApplicable(f"{run[0].name} to {run[-1].name} have no matrices to share, or the rank is too high")
                done += 1
            except NotApplicable as error:
                patch.undo()
                reasons.append(error.reason)
        if not done:
            raise NotApplicable("; ".join(reasons[:3]))
        return replace(setup, model=model)

    @property
    def _at(self) -> str:
        return "" if self.only == "*" else f" at {self.only}"


def _outermost(blocks: Sequence[Block]) -> list[Block]:
    """Blocks that lie in no other block."""
    names = [b.name for b in blocks]
    return [b for b in blocks if not any(b.name.startswith(f"{n}.") for n in names)]


def _untied(model: nn.Module, run: Sequence[Block]) -> None:
    uses: dict[int, list[str]] = defaultdict(list)
    for name, p in model.named_parameters(remove_duplicate=False):
        uses[id(p)].append(name)
    for block in run:
        for p in block.module.parameters():
            if len(uses[id(p)]) > 1:
                raise NotApplicable(f"{' and '.join(uses[id(p)][:2])} are tied already")
