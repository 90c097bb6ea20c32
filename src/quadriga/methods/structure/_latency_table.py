"""Latency against width: pieces of the network measured at a few widths, and a staircase fitted through them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, product

import numpy as np
from scipy.optimize import nnls
from torch import nn

from quadriga.core.axes.importance import rounded
from quadriga.core.batch import Tree
from quadriga.core.errors import NotApplicable
from quadriga.core.setup import Arm
from quadriga.core.slots import RuntimeSpec
from quadriga.methods.structure._granules import Grain
from quadriga.methods.structure._latency_pieces import Piece

Array = np.ndarray
Time = Callable[[Sequence[Arm], RuntimeSpec], list[float]]
LEAST = 0.1  # of each group stays
BLOCKS = (1, 8, 16)  # kernels compute so many channels at once; which of them, the fit finds
SMALL = 0.03  # of the pieces' time: the cheapest pieces, together, that are taken as constant


def candidates(size: int, steps: int, grain: Grain | None = None) -> list[int]:
    """Widths to choose from: even steps, and the multiples of 8 (of 4, in narrow groups) beside them.

    With granules only whole ones, and the full width: at others a runtime may be slower than at the full one, and a law fitted
    through them would be wrong everywhere.

    Example:
        >>> candidates(20, 4), candidates(4, 8), candidates(64, 4, Grain(16, 8))
        ([2, 4, 5, 8, 10, 15, 16, 20], [1, 2, 3, 4], [8, 16, 32, 48, 64])
    """
    least, near = max(1, math.ceil(LEAST * size)), 8 if size >= 32 else 4
    even = [size * k / steps for k in range(1, steps + 1)]
    found = {least, *(round(w) for w in even), *(round(w / near) * near for w in even)}
    return sorted({grain.near(w, size) if grain else rounded(w, size) for w in found if least <= w <= size})


@dataclass(frozen=True)
class Table:
    """Predicted latency of every choice of widths, as a share of the latency of the whole network at full width.

    Args:
        widths: for each group its widths, ascending; the last is the full one.
        single: for each group the cost of each of its widths.
        pair: for two groups (numbers ascending) that meet in a layer, the cost of each pair of widths.
        constant: what no width changes, so that the cost at full width is 1.
    """

    widths: list[list[int]]
    single: list[Array]
    pair: Mapping[tuple[int, int], Array]
    constant: float

    def cost(self, choice: Sequence[int]) -> float:
        """The cost of one choice: for each group the index of its width."""
        alone = sum(float(costs[i]) for costs, i in zip(self.single, choice, strict=True))
        return self.constant + alone + sum(float(m[choice[g], choice[h]]) for (g, h), m in self.pair.items())


@dataclass
class Meter:
    """Times pieces and whole networks in the runtime that the recipe ends in, always beside the network as it stands."""

    time: Time
    spec: RuntimeSpec
    model: nn.Module
    inputs: Tree
    batch: int
    builds: int = 0

    def ratios(self, models: Sequence[nn.Module]) -> list[float]:
        """Latencies of whole networks over that of the network as it stands."""
        whole, *others = self._seconds([(self.model, self.inputs), *((m, self.inputs) for m in models)], self.spec)
        return [seconds / whole for seconds in others]

    def shares(self, jobs: Sequence[tuple[Piece, dict[int, int]]]) -> list[float]:
        """Latencies of pieces over that of the network as it stands; NaN where the runtime takes no such piece alone."""
        found, whole = [math.nan] * len(jobs), math.nan
        for spec in dict.fromkeys(map(str, map(self._spec, jobs))):
            mine = [k for k, job in enumerate(jobs) if str(self._spec(job)) == spec]
            seconds = self._each([jobs[k] for k in mine], self._spec(jobs[mine[0]]))
            whole = seconds[0] if math.isnan(whole) or self._spec(jobs[mine[0]]) == self.spec else whole
            for k, one in zip(mine, seconds[1:], strict=True):
                found[k] = one
        return [one / whole for one in found]

    def _spec(self, job: tuple[Piece, dict[int, int]]) -> RuntimeSpec:
        """A piece alone is quantized where it is in the whole; what compiles for a minute a layer is timed uncompiled."""
        quant = self.spec.quant
        acts = quant is not None and quant.activations != "none" and job[0].quantized
        quant = replace(quant, keep_float=()) if quant is not None and acts else None
        return replace(self.spec, quant=quant, name="eager" if self.spec.name == "inductor" else self.spec.name)

    def _each(self, jobs: Sequence[tuple[Piece, dict[int, int]]], spec: RuntimeSpec) -> list[float]:
        """Seconds of the network and of each piece; where one cannot be realised, each is tried alone."""
        whole, arms = (self.model, self.inputs), [piece.build(kept, self.batch) for piece, kept in jobs]
        try:
            return self._seconds([whole, *arms], spec)
        except NotApplicable:
            found = self._seconds([whole], spec)
        for arm in arms:
            try:
                found += self._seconds([arm], spec)
            except NotApplicable:
                found.append(math.nan)
        return found

    def _seconds(self, arms: Sequence[Arm], spec: RuntimeSpec) -> list[float]:
        self.builds += len(arms)
        return self.time(arms, spec)


def measure(pieces: Sequence[Piece], widths: list[list[int]], meter: Meter) -> Table:
    """The table of a network: pieces of equal geometry are measured once, and those that take no time not at all.

    Args:
        pieces: of the network at full width.
        widths: for each group the widths to choose from, ascending.
        meter: what times them.
    """
    kinds: dict[str, list[Piece]] = {}
    for piece in pieces:
        kinds.setdefault(piece.key, []).append(piece)
    full = {g: w[-1] for g, w in enumerate(widths)}
    once = meter.shares([(same[0], full) for same in kinds.values()])
    chosen = _worthwhile(list(kinds.values()), once)
    jobs: list[tuple[Piece, dict[int, int]]] = []
    spans = []
    for same in chosen:
        mine = points([widths[g] for g in same[0].groups])
        spans.append((len(jobs), mine))
        jobs += [(same[0], {**full, **dict(zip(same[0].groups, kept, strict=True))}) for kept in mine]
    shares = meter.shares(jobs) if jobs else []
    table = Table(widths, [np.zeros(len(w)) for w in widths], {}, 0.0)
    for same, (start, mine) in zip(chosen, spans, strict=True):
        found = shares[start : start + len(mine)]
        good = [k for k, share in enumerate(found) if math.isfinite(share)]
        if good:
            law = fit([mine[k] for k in good], [found[k] for k in good], _positions(same[0]))
            for piece in same:
                table = _add(table, piece, law)
    return replace(table, constant=1.0 - table.cost([len(w) - 1 for w in widths]))


def _worthwhile(kinds: list[list[Piece]], once: list[float]) -> list[list[Piece]]:
    total = [len(same) * (0.0 if math.isnan(share) else share) for same, share in zip(kinds, once, strict=True)]
    order = sorted(range(len(kinds)), key=lambda k: total[k])
    little = np.cumsum([total[k] for k in order]) <= SMALL * sum(total)
    dropped = {k for k, small in zip(order, little.tolist(), strict=True) if small}
    return [same for k, same in enumerate(kinds) if k not in dropped]


def _positions(piece: Piece) -> list[tuple[int, int]]:
    """For each group of a piece its units, and the positions of one unit in a dimension, the fewest there are."""
    found = []
    for g in piece.groups:
        full = piece.shapes.full[g]
        parts = [
            n
            for node in piece.nodes
            for m in (node, *node.all_input_nodes)
            for s in piece.shapes.sizes(m)
            for h, n in s.parts
            if h == g
        ]
        found.append((full, max(1, min(parts) // full)))
    return found


def points(widths: Sequence[Sequence[int]]) -> list[tuple[int, ...]]:
    """Widths of each group at which a piece is measured: along each group, and all together, off the multiples too.

    Example:
        >>> points([[2, 4, 8, 11, 16]])
        [(16,), (8,), (4,), (2,), (11,)]
    """
    full = tuple(w[-1] for w in widths)
    half, quarter, odd = (tuple(_near(w, share, off) for w in widths) for share, off in ((0.5, 0), (0.25, 0), (0.65, 1)))
    found = [full, half, quarter]
    if len(widths) == 1:
        found += [(widths[0][0],), odd]
    else:
        for g in range(len(widths)):
            found += [(*full[:g], some[g], *full[g + 1 :]) for some in (half, odd)[: 2 if len(widths) == 2 else 1]]
    return list(dict.fromkeys(found))


def _near(widths: Sequence[int], share: float, off: int) -> int:
    """The width nearest to a share of the full one; with `off`, no multiple of 4 if there is another."""
    pool = [w for w in widths[:-1] if off and w % 4] or list(widths[:-1]) or list(widths)
    return min(pool, key=lambda w: abs(w - share * widths[-1]))


@dataclass(frozen=True)
class Law:
    """Cost as a sum of products of widths, each rounded up to a block or not; all coefficients at least 0."""

    positions: list[tuple[int, int]]
    terms: list[tuple[tuple[int, int], ...]]  # a term: factors (group, block); () is the constant
    weights: Array

    def term(self, factors: tuple[tuple[int, int], ...], kept: Sequence[float]) -> float:
        """The value of one term with these units kept."""
        value = 1.0
        for g, block in factors:
            full, each = self.positions[g]
            value *= math.ceil(each * kept[g] / block) * block / (each * full)
        return value

    def __call__(self, kept: Sequence[float]) -> float:
        """The cost with these units kept."""
        return sum(float(w) * self.term(t, kept) for w, t in zip(self.weights, self.terms, strict=True) if w > 0)


def fit(kept: Sequence[Sequence[int]], costs: Sequence[float], positions: list[tuple[int, int]]) -> Law:
    """Fit a law by non-negative least squares, so that it never says that wider is faster.

    Args:
        kept: units of each group at each measured point.
        costs: measured there.
        positions: for each group its full units, and the channels that one unit stands for.

    Example:
        >>> law = fit([(16,), (12,), (8,), (4,), (2,)], [5., 5., 3., 3., 3.], [(16, 1)])
        >>> round(law((9,)), 3), round(law((7,)), 3)
        (5.0, 3.0)
    """
    groups = range(len(positions))
    blocks = BLOCKS if len(positions) <= 2 else (1,)
    terms: list[tuple[tuple[int, int], ...]] = [(), *(((g, p),) for g in groups for p in blocks)]
    terms += [((g, 1), (g, 1)) for g in groups]
    terms += [((g, p), (h, q)) for g, h in combinations(groups, 2) for p, q in product(blocks, blocks)]
    law = Law(positions, terms, np.zeros(len(terms)))
    matrix = np.array([[law.term(t, k) for t in terms] for k in kept])
    scale = max(costs) or 1.0
    weights, _ = nnls(matrix, np.array(costs) / scale)
    return replace(law, weights=weights * scale)


def _add(table: Table, piece: Piece, law: Law) -> Table:
    """The table with one more piece, its law written out over the widths of one group, or of each two."""
    single, pair = [c.copy() for c in table.single], dict(table.pair)
    for weight, factors in zip(law.weights, law.terms, strict=True):
        own = sorted({g for g, _ in factors})
        if weight <= 0 or not own:
            continue
        groups = [piece.groups[g] for g in own]
        values = [[_value(law, factors, own, kept) for kept in product(*(table.widths[g] for g in groups))]]
        grid = weight * np.array(values).reshape([len(table.widths[g]) for g in groups])
        if len(groups) == 1:
            single[groups[0]] = single[groups[0]] + grid
            continue
        key = (min(groups), max(groups))
        pair[key] = pair.get(key, 0.0) + (grid if key == tuple(groups) else grid.T)
    return replace(table, single=single, pair=pair)


def _value(law: Law, factors: tuple[tuple[int, int], ...], own: list[int], kept: Sequence[int]) -> float:
    where = dict(zip(own, kept, strict=True))
    return law.term(factors, [where.get(g, 0) for g in range(len(law.positions))])
