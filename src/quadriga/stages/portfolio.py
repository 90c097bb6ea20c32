"""The shipped recipes as this workload can have them: a step that it cannot carry is left out, and told of."""

from __future__ import annotations

from collections.abc import Iterable

from quadriga.core.method import REMEDIES
from quadriga.core.recipe import Recipe
from quadriga.core.trial import Trial
from quadriga.stages.state import Study

EDITED = " · "  # in the name of a recipe that the search made of another
NAMED = 3  # recipes that a note names; of the others it gives the number


def adapted(study: Study, recipes: Iterable[Recipe]) -> list[Recipe]:
    """The recipes without the steps that need a fact which is lacking here, each once, behind the training it starts from."""
    found: dict[str, Recipe] = {}
    for recipe in recipes:
        for index, fact in study.space.lacking(recipe).items():
            leave_out(study, recipe, str(recipe.steps[index]), _why(fact))
        fit = study.space.tuned(study.space.complete(study.space.adapt(recipe)))
        found.setdefault(fit.hash, fit)
    return list(found.values())


def _why(fact: str) -> str:
    return f"{fact} is lacking" + (f": {REMEDIES[fact]}" if fact in REMEDIES else "")


def refused_step(recipe: Recipe, trial: Trial, first: int) -> int | None:
    """The number of the step that a trial was refused for, in the recipe that the trial stood for; None where no step can go.

    Args:
        recipe: the candidate; the trial's may be its cost part, or have another length.
        first: steps before it are the baseline's own.

    Example:
        >>> from quadriga.core.recipe import step
        >>> recipe = Recipe((step("shrink", kernel=3), step("train"), step("shrink", features=0.5)))
        >>> trial = Trial(0, "cost", recipe, info={"step": "shrink", "place": 0})
        >>> refused_step(recipe, trial, 0), refused_step(recipe, trial, 1)
        (0, 2)
    """
    place, name = trial.info.get("place"), trial.info.get("step")
    very = trial.recipe.plain()[place] if place is not None and place < len(trial.recipe.steps) else None
    alike = [i for i, s in enumerate(recipe.steps) if i >= first and s.method == name and not s.is_train]
    return next(iter([i for i in alike if recipe.steps[i].plain() == very][-1:] or alike[-1:]), None)


def leave_out(study: Study, recipe: Recipe, what: str, why: str) -> None:
    """Note that something of a recipe was left out. Of one that the search made up itself nothing is noted: they are many.

    Args:
        what: a step, or what it did not do.
        why: the fact that stands in the way.
    """
    if EDITED not in recipe.name:
        study.left_out.setdefault((what, why), {})[recipe.name or str(recipe)] = None


def left_out(study: Study) -> list[str]:
    """A line for each step that was left out for one reason, with the recipes that it was left out of."""
    return [f"left out of {_some(list(names))}: {what}, since {why}" for (what, why), names in study.left_out.items()]


def _some(names: list[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(f'"{name}"' for name in names[:NAMED]) + more
