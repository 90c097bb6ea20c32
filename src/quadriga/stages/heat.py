"""A heat: runtimes that were fastest beside other work are timed again in turn, alone, before one of them is the finalist.

The search times each candidate while other trials run. That is enough to tell twice from half, and says little of how many
threads pay, or which of two runtimes of nearly one speed is the faster on a quiet machine. Where one ending is clearly faster
for one example and another for a batch, the model gets both.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from quadriga.core.folders import BUILT
from quadriga.core.recipe import Recipe, step
from quadriga.core.trial import Status, Trial
from quadriga.measure.timings import Timings
from quadriga.search.allocate import SAFE, Candidate
from quadriga.search.space import Space
from quadriga.stages.endings import CLEARLY, Steps, apart, bare, halves, joined, threaded, threadless
from quadriga.stages.explore import Explorer, over_limit
from quadriga.stages.state import Study
from quadriga.stages.timing import timed

SHARE, ALONE = 0.08, 0.18  # of the budget; the second where hardware is all that is searched
MOST = 90.0  # seconds that it takes beside a search of all families
SCORING = 1 / 3  # of that: for the quality of what comes out fastest
NEAR = 1.8  # times as slow as the leader, by the search's timing, and still in the heat
ENDINGS = 3  # each with one thread and with as many as its runtime takes


def share(study: Study) -> float:
    """Seconds of the budget that a heat takes."""
    asked = study.options.minimize == "latency" and "hardware" in study.options.families and not study.short
    if not asked:
        return 0.0
    return ALONE * study.options.budget if study.options.hardware_alone else min(MOST, SHARE * study.options.budget)


def heat(study: Study, explorer: Explorer, reserve: float) -> None:
    """Time the fastest endings of the best candidate; what is faster than it and holds the floor takes its place.

    Args:
        study: nothing is under way.
        explorer: whose search is over; its candidates' gains become those that are measured here.
        reserve: seconds of budget to be left after the ablation.
    """
    leader = next(iter(explorer.finalists()), None)
    if leader is None or not share(study):
        return
    reserve += explorer.ablating(leader)
    if (kept := study.store.get("heat")) is None:
        recipes = field_of(study.space, explorer, leader)
        kept = [r.plain() for r in _run(study, explorer, leader, recipes, reserve + SCORING * share(study))]
        study.store.put("heat", kept)
    ranked = [explorer.retimed(Recipe.from_plain(plain)) for plain in kept]
    late = reserve - SCORING * share(study)  # a faster runtime is worth some of the ablation's time
    for candidate in sorted(ranked, key=lambda c: -c.gain):
        if candidate.gain <= leader.gain + CLEARLY:
            break
        if _scored(study, explorer, candidate, leader, late) and _qualifies(explorer, candidate):
            break
    for candidate in ranked:
        if 0 < candidate.gain - leader.gain <= CLEARLY:
            candidate.gain = leader.gain - 1e-9  # behind the leader, which stays


def field_of(space: Space, explorer: Explorer, leader: Candidate) -> list[Recipe]:
    """The leader, and its network with the endings that were nearly as fast or faster wherever they were tried, or the
    fastest of this network at one of the batch sizes."""
    front, own = apart(space, leader.recipe)
    known = [c for c in explorer.candidates.values() if c.gain > 0 and not (c.scores and not _qualifies(explorer, c))]
    best: dict[str, float] = {}  # network → gain of its fastest ending
    for c in known:
        network = Recipe(apart(space, c.recipe)[0]).hash
        best[network] = max(best.get(network, 0.0), c.gain)
    merits: dict[tuple[str, ...], tuple[float, Steps]] = {}  # of endings that differ in fields alone, the fastest
    for c in known:
        first, ending = apart(space, c.recipe)
        merit, kind = c.gain - (leader.gain if first == front else best[Recipe(first).hash]), tuple(s.method for s in ending)
        if kind not in merits or merit > merits[kind][0]:
            merits[kind] = merit, ending
    near = sorted((m for m in merits.values() if m[0] > -math.log(NEAR)), key=lambda m: -m[0])
    found = {leader.recipe.hash: leader.recipe}
    fast = [own, *(e for _, e in near if e != own)][:ENDINGS]
    for ending in [*fast, *(e for e in _best_somewhere(space, explorer, front, known) if e not in fast)]:
        for recipe in (Recipe((*front, *e), leader.recipe.name) for e in threaded(ending)):
            if space.illegal(recipe) is None:
                found.setdefault(recipe.hash, recipe)
    return list(found.values())


def _best_somewhere(space: Space, explorer: Explorer, front: Steps, known: list[Candidate]) -> list[Steps]:
    """The fastest ending of a network at each batch size, and of the unchanged one eager PyTorch, where it comes near.

    Beside other work a GPT's decoding step of 32 examples, which copies much memory, was 0.8 times as fast in eager PyTorch as
    in ONNX Runtime, and 1.4 times alone in its process.
    """
    study, tried, eager = explorer.study, [], []
    for c in known:
        first, ending = apart(space, c.recipe)
        if first == front and (cost := explorer.costs.get(space.cost_part(c.recipe).hash)) is not None:
            tried.append((ending, cost.values))
    if front == space.baseline.steps:
        eager = [((*bare(t.recipe.steps), step("eager")), t.values) for t in study.stage("tuned_eager") if t.ok]
    found: list[Steps] = []
    for key in [f"speed/{b}" for b in study.batches] if tried else []:
        (ending, values), *_ = sorted(tried, key=lambda one: -one[1][key])
        near = sorted((one for one in eager if one[1][key] * NEAR > values[key]), key=lambda one: -one[1][key])
        found += [e for e in (ending, *(e for e, _ in near[:1])) if e not in found]
    return found


def _run(study: Study, explorer: Explorer, leader: Candidate, recipes: list[Recipe], reserve: float) -> list[Recipe]:
    """Build and time them; those that were timed, whose costs are known to the explorer from then on."""
    study.say("search", f"timing {len(recipes)} endings of the best network alone")
    folders = {r.hash: _build(study, explorer, r) for r in recipes}
    for trial in study.collect_all((study.budget.left + reserve) / 2):  # what is not built by then is not timed
        if trial.stage == "cost":
            explorer.costs[trial.recipe.hash] = trial
    study.forget()
    arms = {name: {"kind": "folder", "path": str(f)} for name, f in folders.items() if (f / "load.py").is_file()}
    if leader.recipe.hash not in arms or len(arms) < 2 or study.budget.left < reserve:
        study.notes.append(
            f"the endings of the best network were not timed alone: {len(arms)} of {len(recipes)} were built in time"
        )
        return []
    left = max(5.0, study.budget.left - reserve)
    timings = timed(study, arms, restarts=3, blocks=4, block_seconds=0.03, seed=2, budget=left)
    done = [r for r in recipes if r.hash in arms and r.hash not in timings.errors]
    done = [r for r in done if _note(study, explorer, leader, r, timings)]
    known = [(r, explorer.costs[study.space.cost_part(r).hash].values) for r in done]
    both = joined(study.space, known, lambda values: not over_limit(study, dict(values)))
    for recipe, values in both:
        _acknowledge(study, explorer, recipe, values)
    return [*done, *(r for r, _ in both)]


def _build(study: Study, explorer: Explorer, recipe: Recipe) -> Path:
    """Order it to be built, and its cost to be measured if it is not known."""
    part = study.space.cost_part(recipe)
    name, task = f"heat-{part.hash}", "build" if part.hash in explorer.costs else "cost"
    study.submit(task, task, part, limit=study.patience(60), args={"name": name})
    return study.folder / BUILT / name


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


def _acknowledge(study: Study, explorer: Explorer, recipe: Recipe, values: Mapping[str, float]) -> None:
    """Its cost, as the heat found it, is what the explorer goes by from now on."""
    part = study.space.cost_part(recipe)
    trial = Trial(study.number, "cost", part, study.options.seed, Status.COMPLETE, "", values, {"heat": True})
    study.add(trial)
    explorer.costs[part.hash] = trial


def _scored(study: Study, explorer: Explorer, candidate: Candidate, leader: Candidate, reserve: float) -> bool:
    """Whether its quality is known, at the leader's training length; it is measured if time is left."""
    rung = explorer.rung(leader)
    if rung not in candidate.scores:
        _take_over(study, explorer, candidate, rung)
    if rung not in candidate.scores and not candidate.dead and study.budget.left > reserve:
        explorer.train(candidate, rung, 0.0, reserve)
        for trial in study.collect_all(reserve):
            explorer.remember(trial)
        study.forget()
    return rung in candidate.scores


def _take_over(study: Study, explorer: Explorer, candidate: Candidate, rung: int) -> None:
    """Its quality on val is that of the same network and endings on other threads, where that is known: of two the worse."""
    space, known = study.space, {}
    for trial in [t for t in study.stage("search") if t.ok and t.info["rung"] == rung]:
        known[threadless(space, Recipe.from_plain(trial.info["template"])).hash] = trial
    found = [known.get(threadless(space, half).hash) for half in halves(space, candidate.recipe)]
    same = [trial for trial in found if trial is not None]
    if len(same) < len(found):
        return
    trial = min(same, key=lambda t: study.paired(t)[0])
    size = sum(t.values["bytes"] for t in {t.number: t for t in same}.values())
    info = {**trial.info, "template": candidate.recipe.plain(), "as": trial.number}
    taken = replace(trial, number=study.number, recipe=explorer.exact(candidate.recipe, rung), info=info)
    study.add(replace(taken, values={**trial.values, "bytes": size}))
    explorer.remember(study.trials[-1])


def _qualifies(explorer: Explorer, candidate: Candidate) -> bool:
    return explorer.allocator.chance(candidate) >= SAFE
