"""Hidden-unit pruning: narrower feed-forward blocks, while what passes between the blocks keeps its width."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor, nn

from quadriga.core.axes import AxisGraph, Group
from quadriga.core.computed import computed
from quadriga.core.errors import BadInput, NotApplicable
from quadriga.core.method import Family, Method, Numerics
from quadriga.core.setup import Setup
from quadriga.methods.structure._gradual import check_gradual
from quadriga.methods.structure._granules import Grain, RoundTo, check_round_to, of_groups
from quadriga.methods.structure._scores import widths
from quadriga.methods.structure._units import prune, why_not


def hidden_groups(graph: AxisGraph, only: str = "*") -> list[Group]:
    """Widths between Linear layers alone: produced by Linears that read the same, so that no residual sum is among them.

    Two Linears that gate one another (SwiGLU) make one width together.

    Example:
        >>> from torch import nn, randn
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 2))
        >>> [g.name for g in hidden_groups(AxisGraph.trace(net, randn(2, 4)))]
        ['0', '2']
    """
    groups = graph.groups()
    reads = {id(m.tensor): g for g in groups for m in g.members if not m.producer and m.tensor.dim() == 2}
    free = [g for g in groups if g.kind == "linear" and not g.fixed and not g.split and g.matches(only)]
    return [g for g in free if len(_sources(g, reads)) == 1]


def _sources(group: Group, reads: Mapping[int, Group]) -> set[Group | None]:
    """The widths that its producers read. In a residual sum they differ: one reads what is outside, another what is inside."""
    return {reads.get(id(m.tensor)) for m in group.members if m.producer}


@dataclass(frozen=True, kw_only=True)
class PruneHidden(Method):
    """Remove the least important hidden units of feed-forward blocks and perceptrons.

    The stream between the blocks of a transformer, embeddings, heads of attentions and convolutions keep their widths.

    Args:
        ratio: share of hidden units that go, in (0, 1).
        importance: "magnitude" (L2 norm over all weights of the unit), "taylor" (squared gradient times weight) or "hessian"
            (curvature times squared weight), both from calibration data.
        scope: "layer" takes the same share of each block, "global" ranks the units of all blocks together.
        round_to: units go in granules of so many, the least important granules first; one at least stays in each layer.
            "auto": the steps of width that the recipe's runtime takes at full speed in its precision, measured once on a
            machine. A table gives them by kind of layer ("dense_out", "linear_in", …).
        gradual: part of the train step that follows in which ever more units are set to zero, from 0 (cut at once) to 1;
            at the end they are cut. "taylor" and "hessian" then go by the gradients of that training.
        only: layers to act on: globs of names, comma-separated.

    Source: Xia et al. 2022, CoFi, arXiv:2204.00408 (intermediate dimensions); Molchanov et al. 2019, arXiv:1906.10771 (taylor);
    Zhu & Gupta 2017, arXiv:1710.01878 (gradual).
    """

    family = Family.STRUCTURE
    numerics = Numerics.CHANGED
    source = "arXiv:2204.00408"
    requires = frozenset({"FLOAT_WEIGHTS"})
    writes = frozenset({"training"})
    search: ClassVar = {
        "ratio": (0.5, 0.25, 0.7),
        "importance": ("magnitude", "taylor", "hessian"),
        "scope": ("layer", "global"),
        "gradual": (0.0, 0.7),
    }

    ratio: float = 0.5
    importance: Literal["magnitude", "taylor", "hessian"] = "magnitude"
    scope: Literal["layer", "global"] = "layer"
    round_to: RoundTo = "auto"
    gradual: float = 0.0
    only: str = "*"

    def __post_init__(self) -> None:
        if not 0 < self.ratio < 1:
            raise BadInput(f"prune_hidden.ratio is {self.ratio!r}", "it is the share that goes, between 0 and 1")
        check_round_to(self.name, self.round_to)
        check_gradual(self.name, self.gradual)

    def needs(self) -> frozenset[str]:
        """Gradual pruning takes place in training."""
        return self.requires | ({"TRAIN_DATA"} if self.gradual else set())

    def groups(self, graph: AxisGraph) -> list[Group]:
        """Widths between Linear layers."""
        found = hidden_groups(graph, self.only)
        if not found:
            detail = why_not(graph.groups()) or "no layer matches"
            raise NotApplicable(f"no width lies between Linear layers ({detail}){computed(graph.model)}")
        return found

    def grain(self, model: nn.Module, groups: Collection[Group], setup: Setup) -> dict[str, Grain]:
        """What `round_to` says."""
        return of_groups(self.round_to, model, groups, setup)

    def kept(self, scores: Mapping[Group, Tensor], ratio: float, grain: Mapping[Group, Grain]) -> dict[Group, int]:
        """How many units of each width stay."""
        return widths(scores, ratio, self.scope, grain)

    def apply(self, setup: Setup) -> Setup:
        return prune(self, setup)
