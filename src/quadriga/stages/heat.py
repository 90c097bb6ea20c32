"""A heat: runtimes that were fastest beside other work are timed again in turn, alone, before one of them is the finalist.

The search times each candidate while other trials run. That is enough to tell twice from half, and says little of how many
threads pay, or which of two runtimes of nearly one speed is the faster on a quiet machine. Where one thread is faster for one
example, and more for a batch, an ending has a number of threads for each.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

from quadriga.core.recipe import Recipe, Step, step
from quadriga.core.slots import RuntimeSpec
from quadriga.core.trial import Status, Trial
from quadriga.measure.timings import Timings
from quadriga.search.allocate import SAFE, Candidate
from quadriga.search.space import Space
from quadriga.stages.explore import Explorer
from quadriga.stages.state import Study
from quadriga.stages.timing import timed

SHARE, ALONE = 0.08, 0.15  # of the budget; the second where hardware is all that is searched
SCORING = 0.04  # of the budget, from that: for the quality of what comes out fastest
CLEARLY = 0.05  # gain, as a natural logarithm: less is not worth what one batch size loses for the other
NEAR = 1.8  # times as slow as the leader, by the search's timing, and still in the heat
ONE, EITHER = step("threads", count=1), step("threads", count=0, single=1)
ENDINGS = 3  # each with one thread and with as many as its runtime takes

Steps = tuple[Step, ...]


def share(study: Study) -> float:
    """Seconds of the budget that a heat takes."""
    asked = study.options.minimize == "latency" and "hardware" in study.options.families and not study.short
    return (ALONE if study.options.hardware_alone else SHARE) * study.options.budget if asked else 0.0


def heat(study: Study, explorer: Explorer, reserve: float) -> None:
    """Time the fastest endings of the best candidate; what is faster than it and holds the floor takes its place.

    Args:
        study: nothing is under way.
        explorer: whose search is over; its candidates' gains become those that are measured here.
        reserve: seconds of budget to be left.
    """
    leader = next(iter(explorer.finalists()), None)
    if leader is None or not share(study):
        return
    if (kept := study.store.get("heat")) is None:
        recipes = field_of(study.space, explorer, leader)
        kept = [r.plain() for r in _run(study, explorer, leader, recipes, reserve + SCORING * study.options.budget)]
        study.store.put("heat", kept)
    ranked = [explorer.retimed(Recipe.from_plain(plain)) for plain in kept]
    late = reserve - SCORING * study.options.budget  # a faster runtime is worth some of the ablation's time
    for candidate in sorted(ranked, key=lambda c: -c.gain):
        if candidate.gain <= leader.gain + CLEARLY:
            break
        if _scored(study, explorer, candidate, leader, late) and _qualifies(explorer, candidate):
            break
    for candidate in ranked:
        if 0 < candidate.gain - leader.gain <= CLEARLY:
            candidate.gain = leader.gain - 1e-9  # behind the leader, which stays


def field_of(space: Space, explorer: Explorer, leader: Candidate) -> list[Recipe]:
    """The leader, and its network with the endings that were nearly as fast or faster wherever they were tried."""
    front, own = parts(space, leader.recipe)
    known = [c for c in explorer.candidates.values() if c.gain > 0 and not (c.scores and not _qualifies(explorer, c))]
    best: dict[str, float] = {}  # network → gain of its fastest ending
    for c in known:
        network = Recipe(parts(space, c.recipe)[0]).hash
        best[network] = max(best.get(network, 0.0), c.gain)
    merits: dict[tuple[str, ...], tuple[float, Steps]] = {}  # of endings that differ in fields alone, the fastest
    for c in known:
        first, ending = parts(space, c.recipe)
        merit, kind = c.gain - (leader.gain if first == front else best[Recipe(first).hash]), tuple(s.method for s in ending)
        if kind not in merits or merit > merits[kind][0]:
            merits[kind] = merit, ending
    near = sorted((m for m in merits.values() if m[0] > -math.log(NEAR)), key=lambda m: -m[0])
    found = {leader.recipe.hash: leader.recipe}
    for ending in [own, *(e for _, e in near if e != own)][:ENDINGS]:
        for recipe in (Recipe((*front, *e), leader.recipe.name) for e in threaded(ending)):
            if space.illegal(recipe) is None:
                found.setdefault(recipe.hash, recipe)
    return list(found.values())


def parts(space: Space, recipe: Recipe) -> tuple[Steps, Steps]:
    """A recipe's steps before its last hardware steps, and these without their number of threads."""
    end = len(recipe.steps)
    while end and not recipe.steps[end - 1].is_train and _hardware(space, recipe.steps[end - 1]):
        end -= 1
    return recipe.steps[:end], tuple(s for s in recipe.steps[end:] if s.method != "threads")


def _hardware(space: Space, one: Step) -> bool:
    return bool(space.cards[one.method]["family"] == "hardware")


def threaded(ending: Steps) -> list[Steps]:
    """An ending as it is, and with one thread."""
    return [ending, (*ending[:-1], ONE, *ending[-1:])]


def _run(study: Study, explorer: Explorer, leader: Candidate, recipes: list[Recipe], reserve: float) -> list[Recipe]:
    """Build and time them; those that were timed, whose costs are known to the explorer from then on."""
    study.say("search", f"timing {len(recipes)} endings of the best network alone")
    folders = {r.hash: _build(study, explorer, r) for r in recipes}
    for trial in study.collect_all(reserve):
        if trial.stage == "cost":
            explorer.costs[trial.recipe.hash] = trial
    study.forget()
    arms = {name: {"kind": "folder", "path": str(f)} for name, f in folders.items() if (f / "load.py").is_file()}
    if leader.recipe.hash not in arms or len(arms) < 2 or study.budget.left < reserve:
        return []
    left = max(5.0, study.budget.left - reserve)
    timings = timed(study, arms, restarts=3, blocks=4, block_seconds=0.03, seed=2, budget=left)
    done = [r for r in recipes if r.hash in arms and r.hash not in timings.errors]
    done = [r for r in done if _note(study, explorer, leader, r, timings)]
    return [*done, *_joined(study, explorer, done)]


def _build(study: Study, explorer: Explorer, recipe: Recipe) -> Path:
    """Order it to be built, and its cost to be measured if it is not known."""
    part = study.space.cost_part(recipe)
    name, task = f"heat-{part.hash}", "build" if part.hash in explorer.costs else "cost"
    study.submit(task, task, part, limit=study.patience(60), args={"name": name})
    return study.folder / "built" / name


def _note(study: Study, explorer: Explorer, leader: Candidate, recipe: Recipe, timings: Timings) -> bool:
    """Acknowledge its cost anew, with its speed as a multiple of the leader's; False where it was not timed."""
    part = study.space.cost_part(recipe)
    first = explorer.costs[study.space.cost_part(leader.recipe).hash]
    ratios = {b: timings.ratio(leader.recipe.hash, recipe.hash, b) for b in study.batches}
    if part.hash not in explorer.costs or not explorer.costs[part.hash].ok or None in ratios.values():
        return False
    speeds = {f"speed/{b}": first.values[f"speed/{b}"] * r.value for b, r in ratios.items() if r is not None}
    if recipe != leader.recipe:
        _acknowledge(study, explorer, recipe, {**explorer.costs[part.hash].values, **speeds})
    return True


def _joined(study: Study, explorer: Explorer, done: list[Recipe]) -> list[Recipe]:
    """Endings that are faster on one thread for one example, and on all for a batch, with a number of threads for each."""
    found, timed_ones = [], {r.hash for r in done}
    for most in (r for r in done if RuntimeSpec(r.steps[-1].method).by_batch):
        one, both = (Recipe((*most.steps[:-1], threads, most.steps[-1]), most.name) for threads in (ONE, EITHER))
        if one.hash in timed_ones and study.space.illegal(both) is None:
            values = _of_either(*(explorer.costs[study.space.cost_part(r).hash].values for r in (one, most)))
            if values is not None:
                _acknowledge(study, explorer, both, values)
                found.append(both)
    return found


def _of_either(one: Mapping[str, float], most: Mapping[str, float]) -> dict[str, float] | None:
    """The costs with one thread for one example, and with most for more; None where either number is as good for both."""
    apart = {key: math.log(one[key] / most[key]) for key in most if key.startswith("speed/")}
    first = apart.pop("speed/1", 0.0)
    if not apart or first <= CLEARLY or max(apart.values()) >= -CLEARLY:
        return None
    return {**most, "speed/1": one["speed/1"]}


def _acknowledge(study: Study, explorer: Explorer, recipe: Recipe, values: Mapping[str, float]) -> None:
    """Its cost, as the heat found it, is what the explorer goes by from now on."""
    part = study.space.cost_part(recipe)
    trial = Trial(len(study.trials), "cost", part, study.options.seed, Status.COMPLETE, "", values, {"heat": True})
    study.add(trial)
    explorer.costs[part.hash] = trial


def _scored(study: Study, explorer: Explorer, candidate: Candidate, leader: Candidate, reserve: float) -> bool:
    """Whether its quality is known, at the leader's training length; it is measured if time is left."""
    rung = explorer.rung(leader)
    if rung not in candidate.scores and not candidate.dead and study.budget.left > reserve:
        explorer.train(candidate, rung, 0.0, reserve)
        for trial in study.collect_all(reserve):
            explorer.remember(trial)
        study.forget()
    return rung in candidate.scores


def _qualifies(explorer: Explorer, candidate: Candidate) -> bool:
    return explorer.allocator.chance(candidate) >= SAFE
