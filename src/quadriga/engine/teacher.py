"""Who teaches: the workload's own model as it comes trained, or as its baseline trains it."""

from __future__ import annotations

from collections.abc import Iterable

from quadriga.core.method import Method
from quadriga.core.recipe import Recipe, step
from quadriga.core.workload import Workload
from quadriga.methods import build
from quadriga.parallel import group

TEACHER = "TEACHER"


def can_teach(workload: Workload) -> bool:
    """Whether a workload has a teacher for its recipes: a model that comes trained, or a baseline that trains it.

    Example:
        >>> from quadriga.testing import tiny_mlp
        >>> can_teach(tiny_mlp(trained=True)), can_teach(tiny_mlp())
        (True, True)
    """
    baseline = workload.baseline or Recipe()
    trains = workload.train is not None and any(s.is_train for s in baseline.steps)
    return (workload.trained or trains) and not asks(built(baseline))


def asks(methods: Iterable[Method | None]) -> list[str]:
    """Names of the methods that need a teacher; None stands for a train step."""
    return [m.name for m in methods if m is not None and TEACHER in m.needs()]


def pupils(workload: Workload, recipe: Recipe) -> list[str]:
    """Names of a recipe's methods that learn from a baseline which has to be trained apart, since the recipe has it not."""
    baseline = workload.baseline or Recipe()
    own = tuple(s for s in recipe.steps if s.is_train or not build(s).lays_out())
    if not any(s.is_train for s in baseline.steps) or own[: len(baseline.steps)] == baseline.steps:
        return []
    return asks(built(recipe)) if can_teach(workload) else []


def lesson(workload: Workload, recipe: Recipe) -> Recipe:
    """The recipe that makes the teacher: the baseline, laid out over processes as the recipe that learns from it."""
    baseline = workload.baseline or Recipe()
    if not group.together():
        return baseline
    plan = tuple(s for s in recipe.steps if not s.is_train and build(s).ranks and build(s).lays_out())
    return Recipe((*(plan or (step("data_parallel"),)), *baseline.steps), baseline.name)


def built(recipe: Recipe) -> list[Method | None]:
    """A recipe's methods; None for train steps."""
    return [None if s.is_train else build(s) for s in recipe.steps]
