"""Recipes that differ in their numbers of threads alone, and the number for each batch size."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from quadriga.core.recipe import Recipe, Step, step
from quadriga.core.slots import RuntimeSpec
from quadriga.search.space import Space

CLEARLY = 0.05  # gain, as a natural logarithm: less is not worth what one batch size loses for the other
ONE = step("threads", count=1)

Steps = tuple[Step, ...]
Timed = tuple[Recipe, Mapping[str, float]]  # with its costs, "speed/1" and others


def parts(space: Space, recipe: Recipe) -> tuple[Steps, Steps]:
    """A recipe's steps before its last hardware steps, and these without their number of threads."""
    end = len(recipe.steps)
    while end and not recipe.steps[end - 1].is_train and space.cards[recipe.steps[end - 1].method]["family"] == "hardware":
        end -= 1
    return recipe.steps[:end], tuple(s for s in recipe.steps[end:] if s.method != "threads")


def bare(space: Space, recipe: Recipe) -> Recipe:
    """The recipe without a number of threads in its ending: what those have in common that differ in it alone."""
    front, ending = parts(space, recipe)
    return Recipe((*front, *ending), recipe.name)


def threaded(ending: Steps) -> list[Steps]:
    """An ending as it is, and with one thread."""
    return [ending, (*ending[:-1], ONE, *ending[-1:])]


def joined(space: Space, timed: Sequence[Timed]) -> list[Timed]:
    """Recipes with a number of threads for one example and one for a batch, where each is clearly faster with its own.

    Args:
        space: says what is legal.
        timed: recipes, and what they cost; those of one ending are looked at together.

    Returns:
        recipes that nobody has timed, with the costs of the two that each is made of.
    """
    groups: dict[str, list[Timed]] = {}
    for recipe, values in timed:
        groups.setdefault(bare(space, recipe).hash, []).append((recipe, values))
    return [made for group in groups.values() if (made := _join(space, group)) is not None]


def _join(space: Space, group: Sequence[Timed]) -> Timed | None:
    largest = max((k for k in group[0][1] if k.startswith("speed/")), key=lambda k: int(k.partition("/")[2]))
    one, most = (max(group, key=lambda timed, key=key: timed[1][key]) for key in ("speed/1", largest))  # type: ignore[misc]
    network, single = bare(space, one[0]), _threads(one[0])
    both = (*network.steps[:-1], step("threads", count=_threads(most[0]), single=single), *network.steps[-1:])
    recipe, apart = Recipe(both, network.name), min(_apart(one, most, "speed/1"), _apart(most, one, largest))
    if not single or apart <= CLEARLY or not RuntimeSpec(network.steps[-1].method).by_batch or space.illegal(recipe):
        return None
    return recipe, {**most[1], "speed/1": one[1]["speed/1"]}


def _apart(fast: Timed, slow: Timed, key: str) -> float:
    return math.log(fast[1][key] / slow[1][key])


def _threads(recipe: Recipe) -> int:
    """Its number of threads, or 0 where the runtime has its own."""
    return next((int(s.fields.get("count", 1)) for s in reversed(recipe.steps) if s.method == "threads"), 0)
