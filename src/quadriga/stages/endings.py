"""The hardware steps that a recipe ends in: numbers of threads, and two endings joined, for one example and for a batch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import permutations

from quadriga.core.recipe import Recipe, Step, step
from quadriga.core.slots import RuntimeSpec
from quadriga.search.lead import Steps, parts
from quadriga.search.space import Space

CLEARLY = 0.05  # gain, as a natural logarithm: less is not worth what one batch size loses for the other
PAIRS = 3  # the fastest, of those that could be joined
ONE, JOINT = step("threads", count=1), step("batch_of_one")

Timed = tuple[Recipe, Mapping[str, float]]  # with its costs, "speed/1" and others


def bare(ending: Iterable[Step]) -> Steps:
    """An ending without numbers of threads: what those have in common that compute the same."""
    return tuple(s for s in ending if s.method != "threads")


def apart(space: Space, recipe: Recipe) -> tuple[Steps, Steps]:
    """A recipe's steps before its ending, and the bare ending."""
    front, ending = parts(space, recipe)
    return front, bare(ending)


def threadless(space: Space, recipe: Recipe) -> Recipe:
    """The recipe without a number of threads in its ending."""
    front, ending = apart(space, recipe)
    return Recipe((*front, *ending), recipe.name)


def threaded(ending: Steps) -> list[Steps]:
    """A bare ending as it is, and with one thread."""
    return [ending, (*ending[:-1], ONE, *ending[-1:])]


def halves(space: Space, recipe: Recipe) -> list[Recipe]:
    """The recipe as a batch of one runs by it, and as larger batches do; itself where they are the same."""
    front, ending = parts(space, recipe)
    if JOINT not in ending:
        return [recipe]
    at = ending.index(JOINT)
    return [Recipe((*front, *ending[:at]), recipe.name), Recipe((*front, *ending[at + 1 :]), recipe.name)]


def joined(
    space: Space, timed: Sequence[Timed], able: Callable[[Mapping[str, float]], bool] = lambda values: True
) -> list[Timed]:
    """Recipes with one ending for one example and another for a batch, each clearly faster where it is used.

    Args:
        space: says what is legal.
        timed: recipes of one network, and what they cost.
        able: whether costs are within the user's limits: two endings may have too many bytes together.

    Returns:
        at most `PAIRS` recipes that nobody has timed, the fastest first, with the costs of the two that each is made of.
    """
    sizes = sorted(int(k.partition("/")[2]) for k in (timed[0][1] if timed else ()) if k.startswith("speed/"))
    if len(sizes) < 2 or sizes[0] != 1:
        return []
    most = f"speed/{sizes[-1]}"
    made = []
    for one, more in permutations(timed, 2):
        if min(_gain(one, more, "speed/1"), _gain(more, one, most)) > CLEARLY and (recipe := _join(space, one[0], more[0])):
            made.append((recipe, _costs(space, one, more)))
    made = [pair for pair in made if able(pair[1])]
    return sorted(made, key=lambda pair: -pair[1]["speed/1"] * pair[1][most])[:PAIRS]


def _gain(fast: Timed, slow: Timed, key: str) -> float:
    return math.log(fast[1][key] / slow[1][key])


def _join(space: Space, one: Recipe, more: Recipe) -> Recipe | None:
    """Both endings in one recipe; None where they could not be in one process, or would not be what was timed."""
    (front, first), (_, second) = parts(space, one), parts(space, more)
    shared = [s for s in first if space.cards[s.method]["common"]]
    torch = [bool(e) and RuntimeSpec(e[-1].method).by_torch for e in (first, second)]
    if torch[1] and (any(s not in second for s in shared) or (torch[0] and _threads(first) != _threads(second))):
        return None
    recipe = Recipe((*front, *first, JOINT, *(s for s in second if s not in shared)), more.name)
    return None if space.illegal(recipe) else recipe


def _threads(ending: Steps) -> list[Step]:
    return [s for s in ending if s.method == "threads"]


def _costs(space: Space, one: Timed, more: Timed) -> dict[str, float]:
    """Each batch size at its speed; the bytes of both, which are the same files if they differ in threads alone."""
    same = apart(space, one[0]) == apart(space, more[0])
    size = more[1]["bytes"] + (0.0 if same else one[1]["bytes"])
    return {**more[1], "speed/1": one[1]["speed/1"], "bytes": size}
