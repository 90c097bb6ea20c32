"""Which candidate to train next, and how long: expected gain over the incumbent per unit of training.

Successive halving decides by rank alone; here a rung's measured quality is turned into the chance that the
candidate still passes the floor at the longest training that there is time for, and that chance is weighed with what it
would gain. A candidate that is cheaper than the incumbent and may still pass is trained, as long as its curve rises and
the budget lasts; one that cannot win any more is not.
Rungs and promotion follow Li et al. 2020 (ASHA, arXiv:1810.05934), the weighing Jones et al. 1998 (expected
improvement).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from statistics import NormalDist, median

from quadriga.core.recipe import Recipe
from quadriga.search.curve import Curve
from quadriga.search.space import trained_epochs

PHI = NormalDist().cdf
SAFE = 0.8  # chance of passing the sealed test from which a candidate counts as qualified
SURE = 0.98  # chance above which the incumbent is not trained further
SHARED = 0.7  # of a shorter training is part of the longer one: the stable phase, without its decay
LEAST = 0.005  # gain over the incumbent, as a natural logarithm, that is worth a training


@dataclass(frozen=True)
class Score:
    """A rung's result on val, against the baseline.

    Args:
        difference: of quality, positive is better, in the metric's unit.
        sd: standard deviation of the paired differences per example, same unit.
    """

    difference: float
    sd: float


@dataclass
class Candidate:
    """A template recipe, what it gains in the objective, and how far it was trained.

    Args:
        recipe: the template.
        gain: natural logarithm of the objective's improvement over the baseline.
        scores: by rung.
        trains: whether it has train steps of its own; one that has not is measured once, at the top.
        dead: why it is out, or "".
        running: whether a trial of it is under way.
        price: of training it, in trainings of the baseline; None: as its rung says.
        epoch: seconds that an epoch of its training took; 0 before any.
    """

    recipe: Recipe
    gain: float
    scores: dict[int, Score] = field(default_factory=dict)
    trains: bool = True
    dead: str = ""
    running: bool = False
    price: float | None = None
    epoch: float = 0.0


@dataclass(frozen=True)
class Bar:
    """What a candidate has to reach on val so that the sealed test can prove the floor.

    Args:
        margin: the loss that the floor allows, in the metric's unit.
        z: normal quantile of the test's level.
        n_val, n_test: examples.
    """

    margin: float
    z: float
    n_val: int
    n_test: int

    def slack(self, score: Score) -> float:
        """Expected lower bound on test, plus the margin: ≥ 0 is expected to pass."""
        return score.difference + self.margin - self.z * score.sd / math.sqrt(self.n_test)

    def chance(self, score: Score, growth: float = 0.0, doubt: float = 0.0) -> float:
        """Probability of passing the test, given the val score and a further expected growth with its doubt."""
        noise = math.hypot(score.sd * math.sqrt(1 / self.n_val + 1 / self.n_test), doubt)
        slack = self.slack(score) + growth
        return PHI(slack / noise) if noise > 0 else float(slack >= 0)


def _plan(candidate: Candidate) -> list[tuple[str, str]]:
    """A recipe's steps, however long they train."""
    return [(s.method, str({k: v for k, v in s.fields.items() if k != "epochs"})) for s in candidate.recipe.steps]


class Allocator:
    """Chooses the next (candidate, rung).

    Args:
        bar: what has to be reached.
        rungs: epochs of each rung.
        reach: (candidate) → the longest rung that it can still be trained to; by default the top. A candidate that is there
            goes no further, and others are judged by what they may reach.
    """

    def __init__(self, bar: Bar, rungs: Sequence[float], reach: Callable[[Candidate], int] | None = None) -> None:
        self.bar, self.rungs = bar, tuple(rungs)
        self.top = len(self.rungs) - 1
        self.reach = reach or (lambda candidate: self.top)

    def chance(self, candidate: Candidate) -> float:
        """The chance that a candidate passes as it is, at the longest training that it had; 0 before any."""
        if candidate.dead or not candidate.scores:
            return 0.0
        return self.bar.chance(candidate.scores[max(candidate.scores)])

    def qualified(self, candidates: Iterable[Candidate], chance: float = SAFE) -> list[Candidate]:
        """Those that pass with at least this chance as they are; best gain first."""
        return sorted((c for c in candidates if c.gain > 0 and self.chance(c) >= chance), key=lambda c: -c.gain)

    def next(self, candidates: Sequence[Candidate]) -> tuple[Candidate, int, float] | None:
        """The most promising (candidate, rung, value); then the incumbent, to make it safer; None when nothing can win."""
        safe = self.qualified(candidates)
        incumbent = safe[0].gain if safe else 0.0
        curve = self._curve(candidates)
        best: tuple[Candidate, int, float] | None = None
        for candidate in candidates:
            if not self.open(candidate):
                continue
            rung = self._rung(candidate)
            value = self._value(candidate, candidates, incumbent, curve) / self._price(candidate, rung)
            if value > 1e-4 and (best is None or value > best[2]):
                best = (candidate, rung, value)
        if best is None and safe and self._can_grow(safe[0]):
            return safe[0], self._rung(safe[0]), 0.0
        return best

    def open(self, candidate: Candidate) -> bool:
        """Whether a further training of it can begin."""
        return not (candidate.dead or candidate.running or self.done(candidate)) and self._rung(candidate) <= self._end(
            candidate
        )

    def done(self, candidate: Candidate) -> bool:
        """Whether all is known of it that there is to know."""
        return self.top in candidate.scores

    def _end(self, candidate: Candidate) -> int:
        return self.top if not candidate.trains else self.reach(candidate)

    def _curve(self, candidates: Iterable[Candidate]) -> Curve:
        return Curve(self.rungs, (c.scores for c in candidates if c.trains), self.bar.n_val)

    def _can_grow(self, candidate: Candidate) -> bool:
        return self.open(candidate) and self.chance(candidate) < SURE

    def _rung(self, candidate: Candidate) -> int:
        return self.top if not candidate.trains else max(candidate.scores, default=-1) + 1

    def _price(self, candidate: Candidate, rung: int) -> float:
        if not candidate.trains:
            return 0.02
        if candidate.price is not None:
            return candidate.price
        done = self.rungs[rung - 1] if rung else 0.0
        return (self.rungs[rung] - SHARED * done) / self.rungs[-1]

    def _value(self, candidate: Candidate, others: Sequence[Candidate], incumbent: float, curve: Curve) -> float:
        improvement = candidate.gain - incumbent
        if improvement <= LEAST:
            return 0.0
        if candidate.scores:
            return improvement * self._expected(candidate, self._end(candidate), curve)
        return improvement * self._prior(candidate, others, curve)

    def _expected(self, candidate: Candidate, to: int, curve: Curve, more: float = 0.0) -> float:
        """The chance that a candidate passes at a rung, going by where it stands; `more` doubts that as well."""
        mean, doubt = curve.growth(candidate.scores, to) if candidate.trains else (0.0, 0.0)
        return self.bar.chance(candidate.scores[max(candidate.scores)], mean, math.hypot(doubt, more))

    def _prior(self, candidate: Candidate, others: Sequence[Candidate], curve: Curve) -> float:
        """The chance of an untried candidate: from itself at another length, else from those with the most steps in common."""
        if (known := self._at_another_length(candidate, others)) is not None:
            return known
        mine, end = {str(s) for s in candidate.recipe.steps}, self._end(candidate)
        near: list[tuple[float, float]] = []
        for other in others:
            if not other.scores:
                continue
            theirs = {str(s) for s in other.recipe.steps}
            unlike = 2 * other.scores[max(other.scores)].sd / math.sqrt(self.bar.n_val)
            near.append((len(mine & theirs) / len(mine | theirs), self._expected(other, end, curve, unlike)))
        near.sort(reverse=True)
        if not near:
            return 0.5
        weights = [share + 0.05 for share, _ in near[:3]]
        return 0.1 + 0.8 * sum(w * p for w, (_, p) in zip(weights, near[:3], strict=True)) / sum(weights)

    def _at_another_length(self, candidate: Candidate, others: Sequence[Candidate]) -> float | None:
        """Its chance, going by the length nearest to its own at which it was trained; None where it never was."""
        length = trained_epochs(candidate.recipe)
        tried = [o for o in others if o.scores and _plan(o) == _plan(candidate)]
        if not tried or not length:
            return None
        near = min(tried, key=lambda o: abs(math.log(length / trained_epochs(o.recipe))))
        score = near.scores[max(near.scores)]
        rise = self._rise(others) * math.log(length / trained_epochs(near.recipe))
        return self.bar.chance(score, rise, abs(rise) / 2)

    def _rise(self, candidates: Sequence[Candidate]) -> float:
        """By how much quality rises where training gets e times as long: the median over pairs of lengths, else a guess."""
        tried = [(c, c.scores[max(c.scores)]) for c in candidates if c.scores]
        seen = []
        for (one, less), (other, more) in combinations(tried, 2):
            ratio = trained_epochs(other.recipe) / (trained_epochs(one.recipe) or 1.0)
            if _plan(one) == _plan(other) and ratio > 0 and abs(math.log(ratio)) > 0.1:
                seen.append((more.difference - less.difference) / math.log(ratio))
        return median(seen) if seen else 3 * median(s.sd for _, s in tried) / math.sqrt(self.bar.n_val)
