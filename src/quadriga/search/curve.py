"""How quality rises with the length of training: seen in the candidate itself, else in others, else guessed."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from statistics import median
from typing import Protocol

FADES = 0.7  # of a slope is left at the next length, before anything was seen: curves flatten
LEAST, MOST = 0.3, 1.5  # that is believed of what was seen: two scores of one network differ by chance


class Score(Protocol):
    """A quality on val, against the baseline; fields as in `allocate.Score`."""

    @property
    def difference(self) -> float: ...
    @property
    def sd(self) -> float: ...


Scores = Mapping[int, Score]  # by rung


class Curve:
    """The further rise that is to be expected of a candidate.

    Slopes are in units of quality for each e-fold of training, between one rung and the next that was measured. How they fade
    from rung to rung is a fact of the workload more than of a candidate, and taken from all: where the baseline itself would
    gain much by longer training, as a language model after one epoch, they rise.

    Args:
        rungs: epochs of each rung, rising.
        tried: scores of all candidates.
        n_val: examples that were scored.

    Example:
        >>> from quadriga.search.allocate import Score
        >>> curve = Curve((1.0, math.e), [{0: Score(-2.0, 10.0), 1: Score(-1.0, 10.0)}], 2500)
        >>> round(curve.growth({0: Score(-3.0, 10.0)}, 1)[0], 3)
        1.0
    """

    def __init__(self, rungs: Sequence[float], tried: Iterable[Scores], n_val: int) -> None:
        self.rungs = rungs
        known = [scores for scores in tried if scores]
        self.unit = 2 * median([s.sd for scores in known for s in scores.values()] or [1.0]) / math.sqrt(n_val)
        self.seen: dict[int, list[float]] = {}
        ratios = [FADES]
        for scores in known:
            slopes = self._slopes(scores)
            for rung, slope in slopes:
                self.seen.setdefault(rung, []).append(slope)
            ratios += [min(max(b / a, LEAST), MOST) for (_, a), (_, b) in pairwise(slopes) if a > self.unit]
        self.fades = median(ratios)

    def growth(self, scores: Scores, to: int) -> tuple[float, float]:
        """Expected rise from the last rung that was scored to rung `to`, and its standard deviation; 0 and 0 at that rung."""
        last = max(scores)
        if to <= last:
            return 0.0, 0.0
        slope, doubt = self._slope(scores, last)
        length = sum(self.fades**k * self._folds(rung, rung + 1) for k, rung in enumerate(range(last, to)))
        return slope * length, math.hypot(doubt * length, self.unit / 2)

    def _slope(self, scores: Scores, last: int) -> tuple[float, float]:
        """The slope after a rung and its doubt: its own, faded; else the median of others; else a guess."""
        if own := self._slopes(scores):
            slope = own[-1][1]
            return max(slope, 0.0) * self.fades, max(abs(slope) / 2, self.unit / 2)
        if self.seen:
            near = min(self.seen, key=lambda rung: abs(rung - last))
            found = median(self.seen[near]) * self.fades ** max(0, last - near)
            return max(found, 0.0), max(abs(found) / 2, self.unit / math.sqrt(len(self.seen[near])))
        return self.unit, self.unit

    def _slopes(self, scores: Scores) -> list[tuple[int, float]]:
        """(rung, slope from it to the next that was scored)."""
        known = sorted(r for r in scores if r < len(self.rungs))
        pairs = pairwise(known)
        return [(a, (scores[b].difference - scores[a].difference) / self._folds(a, b)) for a, b in pairs]

    def _folds(self, a: int, b: int) -> float:
        return math.log(self.rungs[b] / self.rungs[a])
