"""One recipe trained by several processes, of which the first one goes on alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from quadriga.core import world
from quadriga.core.errors import BadInput
from quadriga.core.recipe import Recipe, step
from quadriga.core.trial import Status
from quadriga.methods import available
from quadriga.parallel import group
from quadriga.workloads.identity import same, write

if TYPE_CHECKING:
    from quadriga.engine.tasks import Desk


def planned(recipe: Recipe) -> Recipe:
    """The recipe with data parallelism in front, if none of its steps says how processes train together."""
    if any(not s.is_train and available()[s.method].ranks for s in recipe.steps):
        return recipe
    return replace(recipe, steps=(step("data_parallel"), *recipe.steps))


def follow(desk: Desk, recipe: Recipe, args: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """All train steps, by all processes, which then part; the task's result, in each of them.

    Raises:
        BadInput: a process made another workload than the first.
    """
    group.join()
    agree(desk)
    told = desk.do("follow", {**(args or {}), "recipe": recipe.plain(), "hash": recipe.hash})
    group.leave()
    return told


def agree(desk: Desk) -> None:
    """Every process has to have the first one's workload, or none of them trains.

    Raises:
        BadInput: in all of them, with what differs in the first that found it.
    """
    key = group.same(lambda: write(desk.workload, desk.folder))
    problems = group.gathered(_otherwise(desk, key))
    if found := next((p for p in problems if p), None):
        raise BadInput(*found)


def _otherwise(desk: Desk, key: str) -> tuple[str, str] | None:
    """The problem and its remedy where this process has another workload than that of a key."""
    try:
        same(desk.workload, desk.folder, key)
    except BadInput as error:
        return error.problem, error.remedy
    return None


def do(desk: Desk, task: str, args: Mapping[str, Any]) -> dict[str, Any]:
    """A task that trains: the ranks train, data-parallel unless the recipe says how, and the first one measures.

    Ranks may run on GPUs that are not the first ones of their machine; which they are is told by their environment.
    """
    told = follow(desk, planned(Recipe.from_plain(args["recipe"])), args)
    return desk.do(task, args) if told["status"] == Status.COMPLETE and world.found().first else told
