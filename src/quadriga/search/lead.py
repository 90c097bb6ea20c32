"""Which runtime and precision the recipes of the portfolio end in: those of the unchanged network that is fastest."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable

from quadriga.core.recipe import Recipe, Step
from quadriga.search.allocate import Allocator, Candidate
from quadriga.search.space import Space

LIKELY = 0.3  # chance of passing from which an ending is good enough to train with: further training may give what it takes
NEAR = 1.5  # times as fast as the best ending of another runtime: then the changed network is costed in both
Steps = tuple[Step, ...]


def parts(space: Space, recipe: Recipe) -> tuple[Steps, Steps]:
    """A recipe's steps before its last hardware steps, and these."""
    end = len(recipe.steps)
    while end and not recipe.steps[end - 1].is_train and space.cards[recipe.steps[end - 1].method]["family"] == "hardware":
        end -= 1
    return recipe.steps[:end], recipe.steps[end:]


class Lead:
    """What is learnt of the unchanged network's runtimes and precisions, for recipes that change the network.

    The best ending depends on machine and task, and is found in seconds, without training; so a recipe that has to be trained
    gets it from the start, and its widths are those that this very runtime computes fast.

    Args:
        space: says what is hardware.
        allocator: says who holds the floor.
    """

    def __init__(self, space: Space, allocator: Allocator) -> None:
        self.space, self.allocator = space, allocator

    def changes(self, recipe: Recipe) -> bool:
        """Whether a recipe does more than execute the baseline in another way."""
        return bool(parts(self.space, recipe)[0][self.space.fixed(recipe) :])

    def same_network(self, one: Recipe, other: Recipe) -> bool:
        """Whether two recipes differ in their endings alone, and these in their runtimes."""
        (front, ending), (first, last) = parts(self.space, one), parts(self.space, other)
        return front == first and bool(ending) and bool(last) and ending[-1].method != last[-1].method

    def _unchanged(self, candidates: Iterable[Candidate]) -> list[Candidate]:
        """The unchanged network in its runtimes and precisions, the fastest first, without those that are too bad."""
        able = (c for c in candidates if not c.trains and not c.dead and not self.changes(c.recipe))
        found = [c for c in able if not c.scores or self.allocator.chance(c) >= LIKELY]
        return sorted(found, key=lambda c: -c.gain)

    def open(self, candidates: Collection[Candidate], costed: Iterable[Recipe]) -> bool:
        """Whether something is under way that may still be the best.

        Args:
            candidates: so far.
            costed: recipes whose costs are being measured.
        """
        best = next(iter(self._unchanged(candidates)), None)
        return any(not self.changes(r) for r in costed) or (best is not None and not best.scores)

    def ended(self, recipe: Recipe, candidates: Iterable[Candidate]) -> list[Recipe]:
        """The recipe with the best ending in the place of its own, and with the best of another runtime where that is near.

        A changed network may be faster in the other; their costs are measured in seconds, and training is shared where widths
        are equal. As it is, alone, where nothing is known.
        """
        known = [c for c in self._unchanged(candidates) if c.scores]
        found: dict[str, Steps] = {}
        for c in known:
            ending = parts(self.space, c.recipe)[1]
            if ending and known[0].gain - c.gain < math.log(NEAR):
                found.setdefault(ending[-1].method, ending)
        front = parts(self.space, recipe)[0]
        return [Recipe((*front, *ending), recipe.name) for ending in [*found.values()][:2]] or [recipe]
