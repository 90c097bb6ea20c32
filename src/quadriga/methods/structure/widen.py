"""Widening: a larger network that begins as the same function, to be a teacher for what is cut out of it later."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from quadriga.core.axes import AxisGraph, opened
from quadriga.core.axes.graph import one_by_one
from quadriga.core.axes.grow import grow
from quadriga.core.errors import BadInput, NotApplicable
from quadriga.core.method import Family, Method, Numerics
from quadriga.core.setup import Setup

log = logging.getLogger(__name__)
KINDS = ("conv", "linear", "recurrent", "embedding")


@dataclass(frozen=True, kw_only=True)
class Widen(Method):
    """Make layers wider by copying units, so that the outputs stay as they are and more can be learned.

    Latency and bytes grow: it stands in front of a `train` step. Behind that, `distill` with `teacher = "present"` and a method
    that cuts make the trained large network the teacher of a small one. Heads of attentions keep their number.

    Args:
        factor: new width over old, above 1; 2 copies every unit once.
        only: layers to act on: globs of names, comma-separated.

    Source: Chen et al. 2016, Net2Net, arXiv:1511.05641.
    """

    family = Family.STRUCTURE
    numerics = Numerics.CHANGED
    source = "arXiv:1511.05641"
    requires = frozenset({"FLOAT_WEIGHTS"})
    search: ClassVar = {"factor": (2.0, 1.5)}

    factor: float = 2.0
    only: str = "*"

    def __post_init__(self) -> None:
        if not 1 < self.factor <= 16:
            raise BadInput(f"widen.factor is {self.factor!r}", "it is the new width over the old one, above 1 and at most 16")

    def apply(self, setup: Setup) -> Setup:
        generator = torch.Generator().manual_seed(setup.context.seed)
        with opened(setup.model):
            graph = AxisGraph.trace(setup.model, setup.context.example)
            matching = [g for g in graph.groups() if g.kind in KINDS and g.matches(self.only)]
            copies = {
                g: torch.arange(round((self.factor - 1) * g.size)) % g.size for g in matching if not g.fixed and not g.split
            }
            if not copies:
                reasons = "; ".join(f"{g.name}: {g.fixed or g.split}" for g in matching[:3])
                raise NotApplicable(f"no width can grow ({reasons or 'no layer matches'})")
            for reason in one_by_one(lambda some: grow(graph, some, generator), copies)[1]:
                log.info("widen leaves %s", reason)
        return replace(setup, model=graph.model)
