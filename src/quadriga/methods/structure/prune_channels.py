"""Channel pruning: take out the least important channels of all coupled layers, in one shot."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from quadriga.core.axes import AxisGraph, select
from quadriga.core.axes.importance import best
from quadriga.core.errors import BadInput, NotApplicable
from quadriga.core.method import Family, Method, Numerics
from quadriga.core.setup import Setup
from quadriga.methods.structure._scores import Importance, score_of, widths

log = logging.getLogger(__name__)
KINDS = ("conv", "linear", "recurrent")


@dataclass(frozen=True, kw_only=True)
class PruneChannels(Method):
    """Remove the least important output channels of convolutional, Linear and recurrent layers, with all that reads them.

    Heads of attentions, embeddings and the model's outputs stay.

    Args:
        ratio: share of channels that go, in (0, 1).
        importance: "magnitude" (L2 norm over all coupled weights), "taylor" (squared gradient times weight) or "hessian"
            (curvature times squared weight), both from calibration data, or "bn_scale" (scale of the batch normalization;
            layers without one stay).
        scope: "global" ranks the channels of all layers together, "layer" takes the same share of each.
        round_to: widths are rounded to the nearest multiple.
        only: layers to act on: globs of names, comma-separated.

    Source: Fang et al. 2023, DepGraph, arXiv:2301.12900; Molchanov et al. 2019, arXiv:1906.10771 (taylor);
    Liu et al. 2017, arXiv:1708.06519 (bn_scale);
    LeCun et al. 1990, Optimal Brain Damage (hessian).
    """

    family = Family.STRUCTURE
    numerics = Numerics.CHANGED
    source = "arXiv:2301.12900"
    requires = frozenset({"FLOAT_WEIGHTS"})
    search: ClassVar = {
        "ratio": (0.5, 0.3, 0.7),
        "importance": ("magnitude", "taylor", "hessian", "bn_scale"),
        "scope": ("global", "layer"),
    }

    ratio: float = 0.5
    importance: Importance = "magnitude"
    scope: Literal["global", "layer"] = "global"
    round_to: int = 1
    only: str = "*"

    def __post_init__(self) -> None:
        if not 0 < self.ratio < 1:
            raise BadInput(f"prune_channels.ratio is {self.ratio!r}", "it is the share that goes, between 0 and 1")
        if self.round_to < 1:
            raise BadInput(f"prune_channels.round_to is {self.round_to!r}", "give at least 1")

    def apply(self, setup: Setup) -> Setup:
        graph = AxisGraph.trace(setup.model, setup.context.example)
        score = score_of(self.importance, graph, setup)
        scores = {g: s for g in select(graph.groups(), self.only, KINDS) if (s := score(g)) is not None}
        if not scores:
            reasons = [f"{g.name}: {g.fixed or g.split or g.kind}" for g in graph.groups() if g.matches(self.only)]
            detail = "no width has a batch normalization" if self.importance == "bn_scale" else "; ".join(reasons[:3])
            raise NotApplicable(f"no channels can be pruned ({detail or 'no layer matches'})")
        kept = widths(scores, self.ratio, self.scope, self.round_to)
        choices = {g: best(s, kept[g]) for g, s in scores.items() if kept[g] < g.size}
        if not choices:
            raise NotApplicable(f"at ratio {self.ratio} and round_to {self.round_to} no width changes")
        for reason in graph.cut_each(choices)[1]:
            log.info("prune_channels leaves %s", reason)
        return replace(setup, model=graph.model)
