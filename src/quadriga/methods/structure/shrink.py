"""Simplify: smaller kernels, fewer filters, narrower and fewer layers and blocks, with the weights inherited."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import ClassVar

from quadriga.core.axes import AxisGraph, Group, Patch, opened, select
from quadriga.core.axes.chain import fewer_hidden
from quadriga.core.axes.importance import best, magnitude
from quadriga.core.axes.kernels import smaller_kernels
from quadriga.core.errors import BadInput, NotApplicable
from quadriga.core.method import Family, Method, Numerics
from quadriga.core.setup import Setup
from quadriga.core.stacks import Block, blocks_of
from quadriga.methods.structure._granules import RoundTo, check_round_to, of_groups
from quadriga.methods.structure._stacks import take_out

log = logging.getLogger(__name__)
Stage = Callable[[AxisGraph, Setup], object]
FILTERS, FEATURES = ("conv",), ("linear", "recurrent")


def narrow(graph: AxisGraph, groups: list[Group], width: Callable[[Group], int]) -> Patch:
    """Keep the units of the largest weights (L2 over all coupled layers) in each group, in place.

    Args:
        graph: traced from the model as it is.
        groups: the widths to narrow.
        width: how many units of a group stay.

    Raises:
        NotApplicable: no width changes, or none can be cut.
    """
    score = magnitude(graph)
    choices = {}
    for group in groups:
        scores = score(group)
        if width(group) < group.size and scores is not None:
            choices[group] = best(scores, width(group))
    if not choices:
        raise NotApplicable("no width would change")
    patch, refused = graph.cut_each(choices)
    for reason in refused:
        log.info("shrink leaves %s", reason)
    return patch


def fewer_blocks(graph: AxisGraph, ratio: float, only: str = "*") -> list[str]:
    """Take the last blocks out of every stack, in place; those that the model does not let go stay.

    Args:
        graph: traced from the model as it is; trace again afterwards.
        ratio: share of each stack's blocks that stay, rounded; at least one does.
        only: blocks to act on: globs of names, comma-separated.

    Returns:
        names of the blocks that went.

    Raises:
        NotApplicable: none can go.
    """
    stacks: dict[int, list[Block]] = {}
    for block in blocks_of(graph.model):
        if any(fnmatchcase(block.name, glob.strip()) for glob in only.split(",")):
            stacks.setdefault(id(block.stack), []).append(block)
    gone, reasons = list[str](), list[str]()
    for blocks in stacks.values():
        for block in blocks[max(1, round(len(blocks) * ratio)) :][::-1]:
            try:
                take_out(block, graph.check)
                gone.append(block.name)
            except NotApplicable as error:
                reasons.append(f"{block.name}: {error.reason}")
    if not gone:
        raise NotApplicable("; ".join(reasons[:3]) or "shrink.blocks: no stack holds more blocks than should stay")
    return gone


@dataclass(frozen=True, kw_only=True)
class Shrink(Method):
    """Make the network smaller by hand; every shape behind a changed one is derived again.

    Kernels are cropped to their centre, and padding with them; without padding the map grows, and the FC layer that
    reads it is built for the new size, its old weights in the centre. Widths keep the units with the largest weights.
    Order: kernels, blocks, hidden layers, widths. A field that finds nothing is passed over (and told of); if none finds
    anything, it is refused with the reasons.

    Args:
        kernel: new size of all larger convolution kernels.
        filters: ratio of a convolution's filters that stay.
        features: ratio of the hidden features of Linear and recurrent layers that stay.
        embeddings: ratio of an embedding's features that stay, with all that is added to them (the stream of a transformer).
        blocks: ratio of the blocks of each stack (ModuleList or Sequential) that stay; the last ones go.
        width: absolute width instead of a ratio; needs `only`.
        hidden: number of hidden Linear layers that stay in the chain before the output; the first ones do.
        only: layers to act on (kernels and widths): globs of names, comma-separated.
        round_to: widths are rounded to the nearest multiple, and what is no wider stays. "auto": the steps of width that the
            recipe's runtime takes at full speed in its precision, measured once on a machine; an absolute `width` is then
            taken as it is. A table gives them by kind of layer.

    Source: LeCun et al. 1990, Optimal Brain Damage, for structure with inherited weights; Li et al. 2017,
    arXiv:1608.08710, for filters by norm; coupled layers as in Fang et al. 2023, arXiv:2301.12900.
    """

    family = Family.STRUCTURE
    numerics = Numerics.CHANGED
    source = "arXiv:1608.08710"
    requires = frozenset({"FLOAT_WEIGHTS"})
    search: ClassVar = {
        "kernel": (3,),
        "filters": (1.0, 0.75, 0.67, 0.5),
        "features": (0.67, 0.5, 0.4, 0.25),
        "embeddings": (1.0, 0.75, 0.5),
        "blocks": (1.0, 0.75, 0.5),
    }

    kernel: int | None = None
    filters: float = 1.0
    features: float = 1.0
    embeddings: float = 1.0
    blocks: float = 1.0
    width: int | None = None
    hidden: int | None = None
    only: str = "*"
    round_to: RoundTo = "auto"

    def __post_init__(self) -> None:
        for name in ("filters", "features", "embeddings", "blocks"):
            if not 0 < getattr(self, name) <= 1:
                raise BadInput(f"shrink.{name} is {getattr(self, name)!r}", "it is the ratio that stays, above 0 and at most 1")
        for name, least in (("kernel", 1), ("width", 1), ("hidden", 0)):
            if (value := getattr(self, name)) is not None and value < least:
                raise BadInput(f"shrink.{name} is {value!r}", f"give at least {least}")
        check_round_to(self.name, self.round_to)
        if self.width is not None and self.only == "*":
            raise BadInput(f"shrink.width is {self.width} for every layer", 'name the layers with only = "..."')

    def apply(self, setup: Setup) -> Setup:
        stages = self._stages()
        if not stages:
            raise NotApplicable(
                "shrink was given nothing to change", "give kernel, filters, features, embeddings, blocks, width or hidden"
            )
        with opened(setup.model):
            self._shrink(setup, stages)
        return replace(setup, model=setup.model)

    @staticmethod
    def _shrink(setup: Setup, stages: Sequence[Stage]) -> None:
        reasons = []
        for stage in stages:
            graph = AxisGraph.trace(setup.model, setup.context.example)  # every stage sees the model as it is by then
            try:
                stage(graph, setup)
            except NotApplicable as error:
                reasons.append(str(error))
        if len(reasons) == len(stages):
            raise NotApplicable("; ".join(reasons))
        for reason in reasons:
            setup.context.leave(reason)

    def _stages(self) -> list[Stage]:
        stages: list[Stage] = []
        if self.kernel is not None:
            kernel = self.kernel
            stages.append(lambda graph, setup: smaller_kernels(graph, kernel, self.only))
        if self.blocks < 1:
            stages.append(lambda graph, setup: fewer_blocks(graph, self.blocks, self.only))
        if self.hidden is not None:
            hidden = self.hidden
            stages.append(lambda graph, setup: fewer_hidden(graph, hidden))
        if self.filters < 1:
            stages.append(lambda graph, setup: self._narrow(graph, setup, FILTERS, "filters", self.filters))
        if self.features < 1:
            stages.append(lambda graph, setup: self._narrow(graph, setup, FEATURES, "features", self.features))
        if self.embeddings < 1:
            stages.append(lambda graph, setup: self._narrow(graph, setup, ("embedding",), "embeddings", self.embeddings))
        if self.width is not None:
            stages.append(lambda graph, setup: self._narrow(graph, setup, FILTERS + FEATURES, "width", None))
        return stages

    def _narrow(self, graph: AxisGraph, setup: Setup, kinds: tuple[str, ...], field: str, ratio: float | None) -> Patch:
        groups = select(graph.groups(), self.only, kinds)
        if not groups:
            raise NotApplicable(f"shrink.{field}: {_why_none(graph, self.only, kinds)}")
        asked = 1 if ratio is None and self.round_to == "auto" else self.round_to
        grain = of_groups(asked, graph.model, groups, setup)

        def width(group: Group) -> int:
            return grain[group.name].near(group.size * ratio if ratio else self.width or 1, group.size)

        try:
            return narrow(graph, groups, width)
        except NotApplicable as error:
            raise NotApplicable(f"shrink.{field}: {error.reason}", error.remedy) from error


def _why_none(graph: AxisGraph, only: str, kinds: tuple[str, ...]) -> str:
    """Why no width was found: the first one that matches and is fixed gives the reason."""
    found = [g for g in graph.groups() if g.matches(only) and g.kind in kinds]
    if found:
        return f"{found[0].name}: {found[0].fixed or found[0].split}"
    named = [f"{g.name} is {g.kind}" for g in graph.groups() if g.matches(only)]
    return f'no width of kind {" or ".join(kinds)} matches "{only}"' + (f" ({named[0]})" if named else "")
