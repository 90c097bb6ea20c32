"""Channel pruning: take out the least important channels of all coupled layers, at once or in the course of training."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor, nn

from quadriga.core.axes import AxisGraph, Group, select
from quadriga.core.computed import computed
from quadriga.core.errors import BadInput, NotApplicable
from quadriga.core.method import Family, Method, Numerics
from quadriga.core.setup import Setup
from quadriga.methods.structure._gradual import check_gradual
from quadriga.methods.structure._granules import Grain, RoundTo, check_round_to, of_groups
from quadriga.methods.structure._scores import Importance, nonzero, widths
from quadriga.methods.structure._units import prune, why_not

KINDS = ("conv", "linear", "recurrent")


@dataclass(frozen=True, kw_only=True)
class PruneChannels(Method):
    """Remove the least important output channels of convolutional, Linear and recurrent layers, with all that reads them.

    Heads of attentions, embeddings and the model's outputs stay.

    Args:
        ratio: share of channels that go, in (0, 1).
        zeros: instead of a share, exactly the channels go that are zero in all their weights, such as `group_lasso` makes.
            Outputs stay what they were, save where something takes a mean over channels, as a LayerNorm does.
        importance: "magnitude" (L2 norm over all coupled weights), "taylor" (squared gradient times weight) or "hessian"
            (curvature times squared weight), both from calibration data, or "bn_scale" (scale of the batch normalization;
            layers without one stay).
        scope: "global" ranks the channels of all layers together, "layer" takes the same share of each.
        round_to: channels go in granules of so many, the least important granules first; one at least stays in each layer.
            "auto": the steps of width that the recipe's runtime takes at full speed in its precision, measured once on a
            machine. A table gives them by kind of layer ("dense_out", "linear_in", …).
        gradual: part of the train step that follows in which ever more channels are set to zero, from 0 (cut at once) to 1;
            at the end they are cut. "taylor" and "hessian" then go by the gradients of that training.
        only: layers to act on: globs of names, comma-separated.

    Source: Fang et al. 2023, DepGraph, arXiv:2301.12900; Molchanov et al. 2019, arXiv:1906.10771 (taylor);
    Liu et al. 2017, arXiv:1708.06519 (bn_scale);
    LeCun et al. 1990, Optimal Brain Damage (hessian); Zhu & Gupta 2017, arXiv:1710.01878 (gradual).
    """

    family = Family.STRUCTURE
    numerics = Numerics.CHANGED
    source = "arXiv:2301.12900"
    requires = frozenset({"FLOAT_WEIGHTS"})
    writes = frozenset({"training"})
    search: ClassVar = {
        "ratio": (0.5, 0.3, 0.7),
        "importance": ("magnitude", "taylor", "hessian", "bn_scale"),
        "scope": ("global", "layer"),
        "gradual": (0.0, 0.7),
    }

    ratio: float = 0.5
    zeros: bool = False
    importance: Importance = "magnitude"
    scope: Literal["global", "layer"] = "global"
    round_to: RoundTo = "auto"
    gradual: float = 0.0
    only: str = "*"

    def __post_init__(self) -> None:
        if not 0 < self.ratio < 1:
            raise BadInput(f"prune_channels.ratio is {self.ratio!r}", "it is the share that goes, between 0 and 1")
        check_round_to(self.name, self.round_to)
        check_gradual(self.name, self.gradual)
        if self.zeros and (self.importance != "magnitude" or self.gradual):
            raise BadInput("prune_channels.zeros goes by weights, at once", 'use importance = "magnitude" and gradual = 0')

    def needs(self) -> frozenset[str]:
        """Gradual pruning takes place in training."""
        return self.requires | ({"TRAIN_DATA"} if self.gradual else set())

    def groups(self, graph: AxisGraph) -> list[Group]:
        """Widths of convolutions, Linear and recurrent layers that may be cut."""
        found = select(graph.groups(), self.only, KINDS)
        if not found:
            matching = [g for g in graph.groups() if g.matches(self.only)]
            raise NotApplicable(f"no channels can be pruned ({why_not(matching) or 'no layer matches'}){computed(graph.model)}")
        return found

    def grain(self, model: nn.Module, groups: Collection[Group], setup: Setup) -> dict[str, Grain]:
        """What `round_to` says."""
        return of_groups(self.round_to, model, groups, setup)

    def kept(self, scores: Mapping[Group, Tensor], ratio: float, grain: Mapping[Group, Grain]) -> dict[Group, int]:
        """How many channels of each width stay."""
        return nonzero(scores, grain) if self.zeros else widths(scores, ratio, self.scope, grain)

    def apply(self, setup: Setup) -> Setup:
        return prune(self, setup)
