"""Which widths to keep under a budget of latency: an integer program, a greedy stand-in, and the correction by measuring."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_matrix

from quadriga.methods.structure._latency_table import Array, Table

Choice = tuple[int, ...]  # for each group the index of its width


def solve(values: Sequence[Array], table: Table, budget: float, seconds: float = 20.0) -> tuple[Choice, str]:
    """The choice of widths that is worth most within a budget.

    Args:
        values: for each group the worth of each of its widths.
        table: costs.
        budget: bound of `table.cost`.
        seconds: time limit; the best found by then is taken.

    Returns:
        the choice and how it was found: "milp", or "greedy: " and why. Where nothing fits, the smallest widths.

    Example:
        >>> table = Table([[1, 2], [1, 2]], [np.array([1., 2.]), np.array([1., 4.])], {}, 0.0)
        >>> solve([np.array([0., 1.]), np.array([0., 1.])], table, 3.0)
        ((1, 0), 'milp')
    """
    program = _Program(values, table)
    whole = np.arange(program.size) < program.starts[-1]
    try:
        found = milp(
            -program.worth, constraints=program.limits(budget), integrality=whole.astype(int), bounds=Bounds(0, 1),
            options={"time_limit": seconds, "mip_rel_gap": 1e-3},
        )  # fmt: skip
    except ValueError as error:
        return greedy(values, table, budget), f"greedy: {error}"
    if found.x is None:
        return greedy(values, table, budget), f"greedy: {found.message}"
    return tuple(int(found.x[s:e].argmax()) for s, e in pairwise(program.starts)), "milp"


class _Program:
    """The integer program: one binary for each width of each group, of which one is 1.

    For two groups that meet in a layer there is one variable for each pair of widths, whose sums along both groups are those
    binaries, so that the pairs are exact though they are continuous.
    """

    def __init__(self, values: Sequence[Array], table: Table) -> None:
        self.table = table
        self.starts: list[int] = np.cumsum([0, *map(len, values)]).tolist()
        self.size, self.costs = self.starts[-1], np.concatenate(table.single)
        self.rows: list[list[tuple[int, float]]] = []  # equations: (variable, coefficient)
        self.right: list[float] = []
        for start, end in pairwise(self.starts):
            self._equal([(k, 1.0) for k in range(start, end)], 1.0)
        for (g, h), matrix in table.pair.items():
            self._pairs(self.starts[g], self.starts[h], matrix)
        self.worth = np.concatenate([*values, np.zeros(self.size - self.starts[-1])])

    def _equal(self, row: list[tuple[int, float]], value: float) -> None:
        self.rows.append(row)
        self.right.append(value)

    def _pairs(self, first: int, second: int, matrix: Array) -> None:
        """Variables of two groups whose binaries begin at `first` and `second`."""
        place = self.size + np.arange(matrix.size).reshape(matrix.shape)
        self.size += matrix.size
        self.costs = np.concatenate([self.costs, matrix.flatten()])
        for start, lines in ((first, place), (second, place.T)):
            for k, line in enumerate(lines.tolist()):
                self._equal([*((p, 1.0) for p in line), (start + k, -1.0)], 0.0)

    def limits(self, budget: float) -> list[LinearConstraint]:
        """All equations, and the bound of the cost."""
        entries = [(r, c, value) for r, row in enumerate(self.rows) for c, value in row]
        rows, columns, data = zip(*entries, strict=True)
        matrix = coo_matrix((data, (rows, columns)), shape=(len(self.right), self.size)).tocsr()
        cost = LinearConstraint(self.costs[None], -np.inf, budget - self.table.constant)
        return [LinearConstraint(matrix, self.right, self.right), cost]


def greedy(values: Sequence[Array], table: Table, budget: float) -> Choice:
    """From full width, always the step down that loses least for the latency that it saves, until the budget holds."""
    choice = [len(v) - 1 for v in values]
    while (cost := table.cost(choice)) > budget and any(choice):
        steps = []
        for g, i in enumerate(choice):
            for j in range(i):
                saved = cost - table.cost([*choice[:g], j, *choice[g + 1 :]])
                lost = float(values[g][i] - values[g][j])
                steps.append((lost / saved if saved > 1e-12 else np.inf, -j, g, j))
        _, _, g, j = min(steps)
        choice[g] = j
    return tuple(choice)


@dataclass(frozen=True)
class Round:
    """One solve and its measurement: the budget asked for, the table's and the calibrated prediction, what was measured."""

    budget: float
    table: float
    predicted: float
    measured: float
    choice: Choice


def approach(
    target: float,
    tolerance: float,
    known: Sequence[tuple[float, float, Choice]],
    choose: Callable[[float], Choice],
    cost: Callable[[Choice], float],
    measure: Callable[[Choice], float],
    rounds: int = 8,
) -> list[Round]:
    """Solve and measure in turn until the measured ratio is within half the tolerance of the target.

    The first budget is read off the line through what is known; then the nearest measured choices on either side of the
    target hold the next one between them.

    Args:
        target: ratio wanted.
        tolerance: allowed relative difference.
        known: (table's cost, measured ratio, choice) of networks measured before, the smallest and the full one among them.
        choose: budget → choice.
        cost: choice → the table's cost.
        measure: choice → ratio.
        rounds: at most so many.

    Returns:
        every round in order; empty if nothing had to be measured, because the smallest network is within the tolerance.
    """
    line = sorted({c: r for c, r, _ in known}.items())
    seen = {choice: ratio for _, ratio, choice in known}
    low, high = line[0][0], line[-1][0]  # budgets whose networks are faster and slower than the target
    below, above = line[0][1], line[-1][1]
    log: list[Round] = []
    budget = _inverse(line, target)
    for _ in range(4 * rounds):
        choice = choose(budget)
        if choice not in seen:
            predicted = float(np.interp(cost(choice), [c for c, _ in line], [r for _, r in line]))
            seen[choice] = measure(choice)
            log.append(Round(budget, cost(choice), predicted, seen[choice], choice))
        ratio = seen[choice]
        if abs(ratio / target - 1) <= tolerance / 2 or len(log) >= rounds or high - low < 1e-4:
            break
        if ratio > target:
            high, above = min(budget, cost(choice)), ratio
        else:
            low, below = max(low, budget), ratio
        if high <= low:
            low = max(line[0][0], high - 0.5 * abs(high - line[0][0]))
        share = (target - below) / (above - below) if above > below else 0.5
        budget = low + min(0.9, max(0.1, share)) * (high - low)
    return log


def _inverse(line: Sequence[tuple[float, float]], target: float) -> float:
    """The cost at which a polyline through (cost, ratio) reaches the target; ratios are made to rise with cost first."""
    costs, ratios = zip(*line, strict=True)
    rising = np.maximum.accumulate(np.array(ratios)) + 1e-9 * np.arange(len(ratios))
    return float(np.interp(target, rising, costs))
