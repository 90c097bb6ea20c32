"""The smaller verbs: train one recipe, profile a model."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch

from quadriga.artifact.announce import BATCH, Announcement, announced
from quadriga.core import supervise, world
from quadriga.core.errors import BadInput, Failed
from quadriga.core.files import write_json
from quadriga.core.folders import BUILT, WORK, claimed
from quadriga.core.recipe import Recipe
from quadriga.core.roofline import bounds
from quadriga.core.trial import Status
from quadriga.core.workload import Workload
from quadriga.engine.tasks import Desk
from quadriga.engine.teacher import pupils
from quadriga.engine.together import follow, planned
from quadriga.measure.ceilings import ceilings
from quadriga.measure.roofline import profile as layers
from quadriga.measure.scores import Scores
from quadriga.methods import cards
from quadriga.parallel import group
from quadriga.report.profiled import write as write_profile
from quadriga.runtime import open_built
from quadriga.search.space import Space
from quadriga.train.track import Tracker, open_tracker, tracking
from quadriga.workloads.check import CHECKING, check

Say = Callable[[Mapping[str, Any]], None]


def train(
    workload: Workload,
    *,
    recipe: Recipe | None = None,
    out: str | Path = "train-out",
    seed: int = 0,
    track: str | None = None,
    progress: Any = None,
) -> dict[str, Any]:
    """Carry out one recipe, write its artifact, and measure that on val. Killed and called again, it goes on.

    The quality is that of the artifact as it lies on disk, loaded in a fresh process by its own `load.py`. Where there is no
    artifact, or it is not what was trained, the status is "failed" and "error" says why; checkpoint and measurements stay.

    Args:
        workload: what to train.
        recipe: the workload's baseline by default, whose training also stands in front of a recipe that has none, or that
            begins with a step for trained models, as in a study.
        out: folder for checkpoints and the artifact.
        seed: of everything random.
        track: "jsonl", "tensorboard" or "mlflow": where the course of the training is written, below out/track.
        progress: called with plain data.

    Where torchrun or srun started several processes, they train together; then the first one measures and writes, and the
    others are done: they return an empty result. A recipe without a plan for them is trained data-parallel.

    Raises:
        BadInput: the recipe does not apply to this workload; nothing was trained.
        Failed: the training diverged, crashed or ran out of memory.
    """
    say = progress or (lambda event: None)
    with claimed(out, "training") if world.found().first else nullcontext(Path(out)) as folder:
        folder.mkdir(parents=True, exist_ok=True)
        return _trained(workload, recipe, folder, seed, track, say)


def _trained(
    workload: Workload,
    given: Recipe | None,
    folder: Path,
    seed: int,
    track: str | None,
    say: Say,
) -> dict[str, Any]:
    """Train in a folder that is ours."""
    notes, recipe = checked(workload, say), completed(workload, given)
    notes += _begins(workload, given, recipe, say)
    desk = Desk(workload, folder, seed, lambda part: say(_course(part)))
    here = world.found()
    if here.size > 1:
        recipe = planned(recipe)
        group.join()
    recipe, found = rehearsed(desk, recipe, "the recipe", say)
    notes += found
    say({"stage": "train", "text": f"{recipe} on {_examples(workload)}"})
    notes += _taught(workload, recipe, say)
    if here.size > 1:
        _train_together(desk, recipe, open_tracker(track, folder / "track", recipe.hash) if track and here.first else None)
        if not here.first:
            return {}
        track = None
    with tracking(open_tracker(track, folder / "track", recipe.hash) if track else None) as tracked:
        order = {"recipe": recipe.plain(), "hash": recipe.hash, "keep": True, "guess": True}
        trained = done(desk.do("train", order), "the recipe")
        tracked.log(0, {name: trained["values"][name] for name in ("quality", "bytes", "parameters")})
    result = _facts(
        workload, recipe, trained, [*notes, *trained["info"]["notes"], tracked.note, *_guess(workload, trained, say)]
    )
    result |= _handed_over(desk, recipe, trained, say)
    write_json(folder / "train.json", result)
    return result


def checked(workload: Workload, say: Say) -> list[str]:
    """Look a workload over, and say so; what is worth knowing is said at once, and returned.

    Raises:
        BadInput: as `workloads.check`.
    """
    say(CHECKING)
    with supervise.within("looking the workload over"):
        notes = check(workload)
    for note in notes:
        say({"stage": "check", "text": f"note: {note}", "keep": True})
    return notes


def completed(workload: Workload, recipe: Recipe | None) -> Recipe:
    """The recipe as a study carries it out: behind the baseline's training, where it starts from a trained model.

    Args:
        recipe: None for the baseline itself.
    """
    baseline = workload.baseline or Recipe()
    if recipe is None:
        return baseline
    traits = frozenset({"TRAINED"} if workload.trained else ())
    return Space({c["name"]: c for c in cards()}, traits, baseline, frozenset()).complete(recipe)


def _begins(workload: Workload, given: Recipe | None, recipe: Recipe, say: Say) -> list[str]:
    """Say that the baseline's training was put in front of a recipe."""
    if given is None or recipe.steps == given.on(workload.baseline or Recipe()).steps:
        return []
    note = "the recipe starts from a trained model, so the baseline's training is carried out in front of it"
    say({"stage": "train", "text": note, "keep": True})
    return [note]


def rehearsed(desk: Desk, recipe: Recipe, what: str, say: Say) -> tuple[Recipe, list[str]]:
    """Carry out a recipe without its training, so that what it is refused for is said before anything is trained.

    Of processes that train together the first one does so.

    Returns:
        the recipe without the steps that were to act only where that pays and do not; and notes of them, and of an end that
        is no refusal, after which its training is worth a try all the same.

    Raises:
        BadInput: the recipe does not apply to this workload.
    """
    say({"stage": "check", "text": "its steps and its export once on untrained weights, for what the recipe may be refused"})
    notes: list[str] = []
    while True:
        found = group.same(partial(desk.do, "rehearse", {"recipe": recipe.plain()}))
        if found["status"] == Status.COMPLETE:
            return recipe, notes
        if not found.get("idle") or found.get("place") is None:
            break
        notes.append(f"{recipe.steps[found['place']]} is left out: {found['reason']}")
        say({"stage": "check", "text": notes[-1], "keep": True})
        recipe = recipe.without(found["place"])
    if found["status"] == Status.REFUSED or "bad_input" in found:
        done(found, f"{what}, before anything was trained", recipe)
    notes.append(f"untrained, the recipe's steps or its export did not come to an end: {found['status']}: {found['reason']}")
    say({"stage": "warning", "text": notes[-1], "keep": True})
    return recipe, notes


def _taught(workload: Workload, recipe: Recipe, say: Say) -> list[str]:
    """Say that the baseline is trained first, where the recipe learns from it and does not begin with it."""
    found = pupils(workload, recipe)
    if not found:
        return []
    note = f"{' and '.join(dict.fromkeys(found))} learns from the baseline, so that is trained first, unless it was before"
    say({"stage": "train", "text": f"{note}: {workload.baseline}", "keep": True})
    return [f"{note}; it is no part of what the recipe's training cost"]


def _course(part: float) -> dict[str, Any]:
    """How far a train step is, as an event."""
    more = "the train step is done; what follows: the next, or the export for its runtime and the quality on val"
    return {"stage": "train", "text": f"{part:.0%} of this train step" if part < 1 else more}


def _examples(workload: Workload) -> str:
    return f"{len(workload.train):,} examples" if workload.train is not None else "no training data"


def _guess(workload: Workload, trained: Mapping[str, Any], say: Say) -> list[str]:
    """A note where what was trained is no better than guessing, which is said at once."""
    found, metric = trained["info"].get("guess"), workload.metric
    if not found or found["beaten"]:
        return []
    reached = f"its {metric.name} on val is {trained['values']['quality']:.4g} {metric.unit}".rstrip()
    note = f"the model is no better than guessing: {reached}, guessing reaches {found['value']:.4g} ({found['how']})"
    say({"stage": "warning", "text": note, "keep": True})
    return [note]


def _handed_over(desk: Desk, recipe: Recipe, trained: Mapping[str, Any], say: Say) -> dict[str, Any]:
    """Write the artifact and load it as its user would; what that changes of the result."""
    say({"stage": "artifact", "text": "writing it"})
    written = desk.do("artifact", _order(desk, recipe, trained))
    shutil.rmtree(desk.folder / WORK, ignore_errors=True)
    if written["status"] != Status.COMPLETE:
        return _failed(f"there is no artifact: {written['reason']}", written.get("remedy", ""))
    found = _announced(desk, recipe, trained, lambda text: say({"stage": "artifact", "text": text}))
    quality = {} if found.quality is None else {"quality": found.quality}
    if found.ok:
        return quality
    return {**quality, **_failed(found.problem, f"it was put aside, in {_aside(desk.folder)}; please report it")}


def _failed(problem: str, remedy: str) -> dict[str, Any]:
    return {"status": "failed", "artifact": None, "error": {"message": problem, "remedy": remedy}}


def _order(desk: Desk, recipe: Recipe, trained: Mapping[str, Any]) -> dict[str, Any]:
    """What the desk has to know to write the artifact: of the very files that were measured, where there are some."""
    evidence = {"quality_on_val": trained["values"]["quality"], "verified": False}
    order = {"recipe": recipe.plain(), "batches": (1, desk.workload.batch_size), "evidence": evidence}
    kept = Path(BUILT) / f"train-{recipe.hash}"
    return {**order, "folder": str(kept)} if (desk.folder / kept / "runtime.json").is_file() else order


def _facts(workload: Workload, recipe: Recipe, trained: Mapping[str, Any], notes: list[str]) -> dict[str, Any]:
    """The result of a training whose artifact is as it should be."""
    facts = {"status": "complete", "workload": workload.name, "recipe": recipe.plain(), "metric": workload.metric.name}
    told = {**facts, "unit": workload.metric.unit, **trained["values"], "artifact": "artifact"}
    more = {name: trained["info"][name] for name in ("guess", "staleness") if trained["info"].get(name)}
    note = "; ".join(filter(None, notes))
    return {**told, **({"note": note} if note else {}), **more}


def _announced(desk: Desk, recipe: Recipe, trained: Mapping[str, Any], say: Callable[[str], None]) -> Announcement:
    """The artifact on val, in a fresh process, held against what training measured."""
    folder, kept, workload = desk.folder / "artifact", desk.folder / "scores", desk.workload
    expected = {BATCH: Scores.load(kept / f"{recipe.hash}.npz")}
    if open_built(folder).spec.alone is not None:
        expected[1] = Scores.load(kept / f"alone-{recipe.hash}.npz")
    return announced(folder, workload.val, workload.metric, expected, say=say)


def _aside(folder: Path) -> Path:
    """Put an artifact that failed where nobody takes it for one."""
    target = folder / "artifact-failed"
    shutil.rmtree(target, ignore_errors=True)
    return (folder / "artifact").rename(target)


def _train_together(desk: Desk, recipe: Recipe, tracker: Tracker | None) -> None:
    """All train steps, by all processes, which then part."""
    with tracking(tracker):
        done(follow(desk, recipe), "the recipe")


def done(result: Mapping[str, Any], what: str, recipe: Recipe | None = None) -> Mapping[str, Any]:
    """A desk's result, if the task was completed.

    Args:
        what: was asked for, in words.
        recipe: whose steps it carried out; then a refusal names the very step, and never is without a remedy.

    Raises:
        BadInput: it was refused, because of what the user gave; the text says why.
        Failed: it was begun, and diverged, crashed or ran out of memory.
    """
    if result["status"] == Status.COMPLETE:
        return result
    step, remedy = f" at {result['step']}" if result.get("step") else "", result.get("remedy", "")
    if recipe is not None and result.get("place") is not None:
        step = f" at {recipe.steps[result['place']]}"
        remedy = remedy or "leave this step out, or change its fields"
    if "bad_input" in result:
        problem, remedy = result["bad_input"]
        raise BadInput(f"{what}{step}: {problem}", remedy)
    kind = BadInput if result["status"] == Status.REFUSED else Failed
    raise kind(f"{what}: {result['status']}{step}: {result['reason']}", remedy)


def profile(
    workload: Workload, *, batch: int | None = None, seed: int = 0, out: str | Path | None = None, progress: Any = None
) -> dict[str, Any]:
    """Where the time, the FLOPs and the bytes of the unchanged model are, layer by layer, against the machine's ceilings.

    Args:
        workload: whose model is profiled.
        batch: the workload's by default.
        seed: of the weights.
        out: folder for profile.html, .md, .json and roofline.svg; nothing is written without it.
        progress: called with plain data.

    Returns:
        {"workload", "batch", "seconds", "threads", "ceilings", "bounds", "layers"}: the rows of `measure.roofline.profile`,
        the ceilings they are held against, and what each family could gain at most (`core.roofline.bounds`); "report" is
        the page's name, if one was written.

    Raises:
        BadInput: the batch is not positive, the workload cannot be used, or the folder cannot be written.
    """
    batch = workload.batch_size if batch is None else batch
    if batch < 1:
        raise BadInput(f"the batch is {batch}", "give a positive integer")
    say = progress or (lambda event: None)
    with nullcontext(None) if out is None else claimed(out, "profile") as folder:
        found = _profiled(workload, batch, seed, say)
        return found if folder is None else {**found, "report": write_profile(found, folder)[0].name}


def _profiled(workload: Workload, batch: int, seed: int, say: Say) -> dict[str, Any]:
    notes = checked(workload, say)
    say({"stage": "profile", "text": "measuring what this machine can do at most: arithmetic and memory, some seconds"})
    limits = ceilings(torch.get_num_threads())
    say({"stage": "profile", "text": f"timing the layers on batches of {batch}", "keep": True})
    rows = layers(workload.build(seed), workload.inputs(batch), ceiling=limits)
    return {
        "workload": workload.name,
        "batch": batch,
        "seconds": sum(row["seconds"] for row in rows),
        "threads": torch.get_num_threads(),
        "ceilings": limits.plain(),
        "bounds": bounds(rows, limits.plain()),
        "layers": rows,
        **({"notes": notes} if notes else {}),
    }
