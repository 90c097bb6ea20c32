"""Head pruning: take out the least important heads of attentions, with all that reads them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor, nn

from quadriga.core.axes import AxisGraph, Group
from quadriga.core.axes.importance import best
from quadriga.core.computed import computed
from quadriga.core.errors import BadInput, NotApplicable
from quadriga.core.method import Family, Method, Numerics
from quadriga.core.setup import Setup
from quadriga.methods.structure._gradual import check_gradual
from quadriga.methods.structure._granules import Grain
from quadriga.methods.structure._units import prune, why_not


def heads_kept(importance: Tensor, ratio: float) -> Tensor:
    """The heads of one attention that stay: the most important ones, at least one, in their order.

    Args:
        importance: [heads], higher matters more.
        ratio: share of heads that go.

    Example:
        >>> import torch
        >>> heads_kept(torch.tensor([3.0, 1.0, 2.0, 4.0]), 0.5)
        tensor([0, 3])
    """
    return best(importance, max(1, round(len(importance) * (1 - ratio))))


@dataclass(frozen=True, kw_only=True)
class PruneHeads(Method):
    """Remove the least important heads of every attention, whole: queries, keys, values and what reads them.

    In grouped-query attention a key-value head goes with all query heads that use it. An attention whose number of heads
    stands in the code, or whose projections are one tensor, is left; if every one is, the method refuses.

    Args:
        ratio: share of the heads of each attention that go, in (0, 1); at least one stays.
        importance: "magnitude" (L2 norm over all weights of the head), "taylor" (squared gradient times weight) or "hessian"
            (curvature times squared weight), both from calibration data.
        gradual: part of the train step that follows in which ever more heads are set to zero, from 0 (cut at once) to 1;
            at the end they are cut. "taylor" and "hessian" then go by the gradients of that training.
        only: layers to act on: globs of names, comma-separated.

    Example:
        >>> from quadriga.core.setup import Setup
        >>> from quadriga.testing.workloads import tiny_attention
        >>> setup = PruneHeads(ratio=0.5)(Setup.of(tiny_attention()))
        >>> setup.model.query.out_features, setup.model.key.out_features, setup.model.out.in_features
        (8, 4, 8)

    Source: Michel et al. 2019, Are sixteen heads really better than one?, arXiv:1905.10650; Molchanov et al. 2019,
    arXiv:1906.10771 (taylor); Zhu & Gupta 2017, arXiv:1710.01878 (gradual).
    """

    family = Family.STRUCTURE
    numerics = Numerics.CHANGED
    source = "arXiv:1905.10650"
    requires = frozenset({"FLOAT_WEIGHTS"})
    writes = frozenset({"training"})
    search: ClassVar = {"ratio": (0.5, 0.25), "importance": ("magnitude", "taylor", "hessian"), "gradual": (0.0, 0.7)}

    ratio: float = 0.5
    importance: Literal["magnitude", "taylor", "hessian"] = "magnitude"
    gradual: float = 0.0
    only: str = "*"

    def __post_init__(self) -> None:
        if not 0 < self.ratio < 1:
            raise BadInput(f"prune_heads.ratio is {self.ratio!r}", "it is the share that goes, between 0 and 1")
        check_gradual(self.name, self.gradual)

    def needs(self) -> frozenset[str]:
        """Gradual pruning takes place in training."""
        return self.requires | ({"TRAIN_DATA"} if self.gradual else set())

    def groups(self, graph: AxisGraph) -> list[Group]:
        """Attentions whose heads can be told apart and may go."""
        heads = [g for g in graph.groups() if g.split and g.matches(self.only)]
        if not heads:
            raise NotApplicable(f"no layer that matches is cut into heads that can be told apart{computed(graph.model)}")
        if all(g.fixed for g in heads):
            raise NotApplicable(f"no head can be taken out ({why_not(heads)})")
        return [g for g in heads if not g.fixed]

    def grain(self, model: nn.Module, groups: Collection[Group], setup: Setup) -> dict[str, Grain]:
        """A head is a granule."""
        return {}

    def kept(self, scores: Mapping[Group, Tensor], ratio: float, grain: Mapping[Group, Grain]) -> dict[Group, int]:
        """How many heads of each attention stay."""
        return {g: len(heads_kept(s, ratio)) for g, s in scores.items()}

    def apply(self, setup: Setup) -> Setup:
        return prune(self, setup)
