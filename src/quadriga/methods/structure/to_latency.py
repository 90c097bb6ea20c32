"""To a target latency: widths chosen by a table of latency against width, and corrected on the whole network."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from quadriga.core.axes import AxisGraph, Group, opened
from quadriga.core.axes.importance import best
from quadriga.core.batch import resize
from quadriga.core.computed import computed
from quadriga.core.copies import copy_model
from quadriga.core.errors import BadInput, NotApplicable
from quadriga.core.method import Family, Method, Numerics
from quadriga.core.setup import Setup, undecided
from quadriga.methods.structure._granules import Grain, RoundTo, check_round_to, of_groups
from quadriga.methods.structure._latency_pieces import pieces
from quadriga.methods.structure._latency_solve import Choice, Round, approach, solve
from quadriga.methods.structure._latency_table import Array, Meter, Time, candidates, measure
from quadriga.methods.structure._scores import Importance, score_of

log = logging.getLogger(__name__)
KINDS = ("conv", "linear", "recurrent", "embedding")
ROUNDS = 8
ENDS = (0.0, 0.25, 0.5)  # shares of all widths that are measured first: the smallest network need not be the fastest
FINE = 48  # a network of few groups has so many widths in all, or no choice would come near the target


def worth(scores: Tensor, widths: Sequence[int], layers: int) -> Array:
    """What each width of a group is worth: layers · ln(share of the importance that its best units hold).

    A signal passes the layers one after the other, so shares multiply and logarithms add; and the last units of a layer
    are worth more than the first ones of another, so no layer is emptied for the sake of the rest.

    Args:
        scores: [units] importance, ≥ 0, that adds up over units (a squared norm).
        widths: ascending.
        layers: how many layers have this width; each counts once.

    Example:
        >>> worth(torch.tensor([3., 1.]), [1, 2], 1).round(3).tolist()
        [-0.288, 0.0]
    """
    kept = scores.double().sort(descending=True).values.cumsum(0)
    if not kept[-1] > 0:  # nothing is known, so units count alike
        kept = torch.arange(1, len(scores) + 1, dtype=torch.float64)
    return layers * (kept / kept[-1])[torch.tensor(widths) - 1].clamp_min(1e-6).log().numpy()


@dataclass(frozen=True, kw_only=True)
class ToLatency(Method):
    """Make the network as fast as asked: choose every width so that the latency in the recipe's own runtime meets a target.

    Each costly layer is measured alone at a few widths, in the runtime that the recipe ends in. An integer program picks the
    widths that keep most importance within a budget; the network so cut is timed against the network as it stands, and the
    budget is corrected until the ratio is within half the tolerance. Widths are those of convolutions, linear, recurrent and
    embedding layers (residual streams too) and the number of heads; at least a tenth of each stays. It is refused, with the
    nearest ratio that was reached, if none is within the tolerance. In the runtime inductor layers alone are timed uncompiled.

    Args:
        target: latency wanted, as a share of that of the network as it stands, in (0, 1).
        batch: examples per call.
        importance: which units stay: "magnitude" (L2 norm over all coupled weights), "taylor" (squared gradient times
            weight) or "hessian" (curvature times squared weight), both from calibration data, or "bn_scale" (scale of the
            batch normalization; other layers stay).
        tolerance: allowed relative difference between the measured ratio and the target.
        steps: widths per group to choose from, multiples of 8 beside them; more where there are few groups.
        round_to: widths are multiples of this, or stay. "auto": the steps of width that the recipe's runtime takes at full
            speed in its precision, measured once on a machine. A table gives them by kind of layer.
        widths: layer → units to keep, as decided before; then nothing is measured, and target and batch do not matter.
        only: layers to act on: globs of names, comma-separated.

    Source: Shen et al. 2021, HALP, arXiv:2110.10811, for importance under a latency table as a knapsack; here with both
    widths of a layer in the table, and corrected by measuring.
    """

    family = Family.STRUCTURE
    numerics = Numerics.CHANGED
    source = "arXiv:2110.10811"
    requires = frozenset({"FLOAT_WEIGHTS"})
    search: ClassVar = {"target": (0.5, 0.7, 0.35), "importance": ("magnitude", "taylor", "hessian", "bn_scale")}

    target: float = 0.5
    batch: int = 1
    importance: Importance = "magnitude"
    tolerance: float = 0.1
    steps: int = 8
    round_to: RoundTo = "auto"
    widths: Mapping[str, int] | None = None
    only: str = "*"

    def __post_init__(self) -> None:
        for name in ("target", "tolerance"):
            if not 0 < getattr(self, name) < 1:
                raise BadInput(f"to_latency.{name} is {getattr(self, name)!r}", "it is a share between 0 and 1")
        for name, least in (("batch", 1), ("steps", 2)):
            if getattr(self, name) < least:
                raise BadInput(f"to_latency.{name} is {getattr(self, name)!r}", f"give at least {least}")
        check_round_to(self.name, self.round_to)
        for layer, width in (self.widths or {}).items():
            if not isinstance(width, int) or width < 1:
                raise BadInput(f"to_latency.widths has {layer} = {width!r}", "give the number of units that stay")

    def apply(self, setup: Setup) -> Setup:
        with opened(setup.model):
            return self._cut(setup, AxisGraph.trace(setup.model, setup.context.example))

    def _cut(self, setup: Setup, graph: AxisGraph) -> Setup:
        scores = self._scores(graph, setup)
        widths = dict(self.widths) if self.widths is not None else self._decide(setup, graph, scores)
        choices = named(graph, scores, widths)
        if not choices:
            raise NotApplicable("no width would change")
        for reason in graph.cut_each(choices)[1]:
            log.info("to_latency leaves %s", reason)
        return replace(setup, model=graph.model)

    def _scores(self, graph: AxisGraph, setup: Setup) -> dict[Group, Tensor]:
        """Importance of the units of every group that may be cut."""
        free = [g for g in graph.groups() if g.kind in KINDS and not g.fixed and g.matches(self.only)]
        score = score_of(self.importance, graph, setup)
        found = {g: s if self.importance in ("taylor", "hessian") else s.square() for g in free if (s := score(g)) is not None}
        if not found:
            reasons = [f"{g.name}: {g.fixed or g.kind}" for g in graph.groups() if g.matches(self.only)]
            detail = "no width has a batch normalization" if free else "; ".join(reasons[:3])
            raise NotApplicable(f"no width can be cut ({detail or 'no layer matches'}){computed(setup.model)}")
        return found

    def _decide(self, setup: Setup, graph: AxisGraph, scores: Mapping[Group, Tensor]) -> dict[str, int]:
        """The widths, measured once; another process is told what was found."""
        asked = json.dumps({k: getattr(self, k) for k in self.fields() if k != "widths"}, sort_keys=True)

        def measured() -> dict[str, Any]:
            if setup.context.time is None:
                raise NotApplicable("to_latency measures, and there is no clock here", "run it in a study, or give widths")
            apart = replace(setup, context=replace(setup.context, decide=undecided))  # the widths are what is kept
            grain = of_groups(self.round_to, graph.model, scores, apart)
            return _Search(self, setup, graph, scores, setup.context.time, grain).found()

        found = setup.context.decide(f"to_latency {asked}", measured)
        if found["refused"]:
            raise NotApplicable(found["refused"], found["remedy"])
        return found["widths"]


def named(graph: AxisGraph, scores: Mapping[Group, Tensor], widths: Mapping[str, int]) -> dict[Group, Tensor]:
    """The units to keep of each group that one of the layers names: the most important ones.

    Raises:
        NotApplicable: a layer has no width that can be cut, or fewer units than are to stay.
    """
    choices = {}
    for layer, width in widths.items():
        known = [g for g in scores if g.name == layer] or [g for g in scores if layer in g.layers]
        group = known[0] if known else None
        if group is None or width > group.size:
            size = f" has {group.size} units, not {width}" if group else " has no width that can be cut"
            raise NotApplicable(f"{layer}{size}", "give widths of this very network")
        if width < group.size:
            choices[group] = best(scores[group], width)
    return choices


class _Search:
    """Measures, solves and corrects; `found` is plain data."""

    def __init__(
        self,
        method: ToLatency,
        setup: Setup,
        graph: AxisGraph,
        scores: Mapping[Group, Tensor],
        time: Time,
        grain: Mapping[str, Grain],
    ) -> None:
        self.method, self.graph, self.scores, self.grain = method, graph, scores, grain
        self.spec = replace(setup.context.runtime, storage="plain")
        inputs = resize(setup.context.example, method.batch)
        self.meter = Meter(time, self.spec, setup.model, inputs, method.batch)
        self.reasons: list[str] = []
        self.groups: list[Group] = []
        self.sizes: list[list[int]] = []

    def found(self) -> dict[str, Any]:
        """Widths and the log of every round; or why no network meets the target."""
        m = self.method
        self._offer(list(self.scores))
        full = tuple(len(w) - 1 for w in self.sizes)
        alike = list(dict.fromkeys(map(self._alike, ENDS)))
        ends = dict(zip(alike, self.meter.ratios([self._cut(c) for c in alike]), strict=True))
        if min(ends.values()) > m.target * (1 + m.tolerance):
            return self._refuse(f"the smallest network that is allowed has {ends[alike[0]]:.2f}×", ends, [], None)
        keep_float = self.spec.quant.keep_float if self.spec.quant else ()
        table = measure(pieces(self.graph, self.groups, keep_float), self.sizes, self.meter)
        values = [worth(self.scores[g], w, len(g.layers)) for g, w in zip(self.groups, self.sizes, strict=True)]
        how: list[str] = []

        def choose(budget: float) -> Choice:
            choice, told = solve(values, table, budget)
            how.append(told)
            return choice

        known = [(table.cost(full), 1.0, full), *((table.cost(c), r, c) for c, r in ends.items())]
        rounds = approach(m.target, m.tolerance, known, choose, table.cost, self._ratio, ROUNDS)
        made = [(r.measured, r.choice) for r in rounds] + [(r, c) for c, r in ends.items()]
        ratio, choice = min(made, key=lambda pair: abs(pair[0] / m.target - 1))
        if abs(ratio / m.target - 1) > m.tolerance:
            return self._refuse(f"after {len(rounds)} rounds", dict((c, r) for r, c in made), rounds, how)
        return self._row(choice, ratio, rounds, how)

    def _alike(self, share: float) -> Choice:
        """The same share of every width, as near as its choices come."""
        return tuple(int(np.argmin([abs(x - share * w[-1]) for x in w])) for w in self.sizes)

    def _offer(self, groups: list[Group]) -> None:
        """The groups that can be cut, in half and to the least, and the widths that each offers."""
        steps = max(self.method.steps, FINE // len(groups))
        sizes = {g: candidates(g.size, steps, self.grain[g.name]) for g in groups}
        groups = [g for g in groups if len(sizes[g]) > 1]
        for share in (0.5, 0.0):
            widths = {g: next(w for w in sizes[g] if w >= share * g.size) for g in groups}
            groups = self._cuttable({g: w for g, w in widths.items() if w < g.size})
        if not groups:
            raise NotApplicable("; ".join(self.reasons[:3]) or "every width has one choice only")
        self.groups, self.sizes = groups, [sizes[g] for g in groups]

    def _cuttable(self, widths: Mapping[Group, int]) -> list[Group]:
        """Those that can be cut to these widths together; why others cannot is kept."""
        choices = {g: best(self.scores[g], width) for g, width in widths.items()}
        try:
            self.graph.cut_all(choices).undo()
            return list(choices)
        except NotApplicable:
            good: dict[Group, Tensor] = {}
        for group, keep in choices.items():
            try:
                self.graph.cut_all({**good, group: keep}).undo()
                good[group] = keep
            except NotApplicable as error:
                self.reasons.append(f"{group.name}: {error.reason}")
        return list(good)

    def _widths(self, choice: Choice) -> dict[Group, int]:
        return {g: w[i] for g, w, i in zip(self.groups, self.sizes, choice, strict=True)}

    def _cut(self, choice: Choice) -> nn.Module:
        """A copy of the network with these widths; the network itself is cut for a moment only."""
        choices = {g: best(self.scores[g], w) for g, w in self._widths(choice).items() if w < g.size}
        if not choices:
            return copy_model(self.graph.model)
        patch, _ = self.graph.cut_each(choices)
        try:
            return copy_model(self.graph.model)
        finally:
            patch.undo()

    def _ratio(self, choice: Choice) -> float:
        return self.meter.ratios([self._cut(choice)])[0]

    def _refuse(self, why: str, made: Mapping[Choice, float], rounds: Sequence[Round], how: list[str] | None) -> dict[str, Any]:
        choice, ratio = min(made.items(), key=lambda pair: abs(pair[1] / self.method.target - 1))
        text = f"latency {self.method.target:g}× cannot be met in {self.spec.name} at batch {self.method.batch}: {why}; "
        row = self._row(choice, ratio, rounds, how or [])
        return {**row, "refused": f"{text}nearest reachable is {ratio:.2f}×", "remedy": f"use target = {ratio:.2f}"}

    def _row(self, choice: Choice, ratio: float, rounds: Sequence[Round], how: list[str]) -> dict[str, Any]:
        log.info("to_latency reaches %.3f in %d rounds", ratio, len(rounds))
        return {
            "refused": "", "remedy": "", "ratio": ratio, "runtime": self.spec.name, "builds": self.meter.builds,
            "widths": {g.name: w for g, w in self._widths(choice).items()},
            "rounds": [{k: v for k, v in asdict(r).items() if k != "choice"} for r in rounds],
            "solver": sorted(set(how)), "left": self.reasons,
        }  # fmt: skip
