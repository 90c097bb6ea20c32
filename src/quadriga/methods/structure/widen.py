"""Widening: a larger network that begins as the same function, to be a teacher for what is cut out of it later."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import nn

from quadriga.core.axes import AxisGraph, Group, opened
from quadriga.core.axes.graph import one_by_one
from quadriga.core.axes.grow import grow
from quadriga.core.errors import BadInput, NotApplicable
from quadriga.core.method import Family, Method, Numerics
from quadriga.core.setup import Setup
from quadriga.methods.structure._granules import RoundTo, check_round_to, of_groups

log = logging.getLogger(__name__)
KINDS = ("conv", "linear", "recurrent", "embedding")


@dataclass(frozen=True, kw_only=True)
class Widen(Method):
    """Make layers wider by copying units, so that the outputs stay as they are and more can be learned.

    Latency and bytes grow: it stands in front of a `train` step. Behind that, `distill` with `teacher = "present"` and a method
    that cuts make the trained large network the teacher of a small one. Heads of attentions keep their number.

    Args:
        factor: new width over old, above 1; 2 copies every unit once.
        round_to: new widths are rounded to the nearest multiple that is wider, save where a norm averages over the units and
            all get equally many copies. "auto": the steps of width that the recipe's runtime takes at full speed in its
            precision, measured once on a machine. A table gives them by kind of layer.
        only: layers to act on: globs of names, comma-separated.

    Source: Chen et al. 2016, Net2Net, arXiv:1511.05641.
    """

    family = Family.STRUCTURE
    numerics = Numerics.CHANGED
    source = "arXiv:1511.05641"
    requires = frozenset({"FLOAT_WEIGHTS"})
    search: ClassVar = {"factor": (2.0, 1.5)}

    factor: float = 2.0
    round_to: RoundTo = "auto"
    only: str = "*"

    def __post_init__(self) -> None:
        if not 1 < self.factor <= 16:
            raise BadInput(f"widen.factor is {self.factor!r}", "it is the new width over the old one, above 1 and at most 16")
        check_round_to(self.name, self.round_to)

    def apply(self, setup: Setup) -> Setup:
        generator = torch.Generator().manual_seed(setup.context.seed)
        with opened(setup.model):
            graph = AxisGraph.trace(setup.model, setup.context.example)
            matching = [g for g in graph.groups() if g.kind in KINDS and g.matches(self.only)]
            free = [g for g in matching if not g.fixed and not g.split]
            grain = of_groups(self.round_to, graph.model, free, setup)
            copies = {g: torch.arange(self._width(g, graph.model, grain[g.name].step) - g.size) % g.size for g in free}
            if not copies:
                reasons = "; ".join(f"{g.name}: {g.fixed or g.split}" for g in matching[:3])
                raise NotApplicable(f"no width can grow ({reasons or 'no layer matches'})")
            for reason in one_by_one(lambda some: grow(graph, some, generator), copies)[1]:
                log.info("widen leaves %s", reason)
        return replace(setup, model=graph.model)

    def _width(self, group: Group, model: nn.Module, grain: int) -> int:
        """The new width: at least the next multiple, or as many copies of each unit as were asked for."""
        asked = group.size + round((self.factor - 1) * group.size)
        if grain == 1 or (asked % group.size == 0 and _averaged(model, group)):
            return asked
        return max(round(asked / grain), group.size // grain + 1) * grain


def _averaged(model: nn.Module, group: Group) -> bool:
    """Whether a layer norm, a group norm or the like takes a mean over the units."""
    layers = (model.get_submodule(n.rpartition(".")[0]) for m in group.members for n in m.names)
    return any("norm" in type(layer).__name__.lower() and not hasattr(layer, "running_mean") for layer in layers)
