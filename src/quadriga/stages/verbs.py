"""The smaller verbs: train one recipe, profile a model."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from quadriga.artifact.announce import BATCH, Announcement, announced
from quadriga.core import world
from quadriga.core.errors import BadInput
from quadriga.core.files import write_json
from quadriga.core.recipe import Recipe
from quadriga.core.roofline import bounds
from quadriga.core.trial import Status
from quadriga.core.workload import Workload
from quadriga.engine.tasks import Desk
from quadriga.engine.together import follow, planned
from quadriga.measure.ceilings import ceilings
from quadriga.measure.roofline import profile as layers
from quadriga.measure.scores import Scores
from quadriga.report.profiled import write as write_profile
from quadriga.runtime import open_built
from quadriga.train.track import Tracker, open_tracker, tracking
from quadriga.workloads.check import check


def train(
    workload: Workload,
    *,
    recipe: Recipe | None = None,
    out: str | Path = "out",
    seed: int = 0,
    track: str | None = None,
    progress: Any = None,
) -> dict[str, Any]:
    """Carry out one recipe, write its artifact, and measure that on val. Killed and called again, it goes on.

    The quality is that of the artifact as it lies on disk, loaded in a fresh process by its own `load.py`. Where there is no
    artifact, or it is not what was trained, the status is "failed" and "error" says why; checkpoint and measurements stay.

    Args:
        workload: what to train.
        recipe: the workload's baseline by default.
        out: folder for checkpoints and the artifact.
        seed: of everything random.
        track: "jsonl", "tensorboard" or "mlflow": where the course of the training is written, below out/track.
        progress: called with plain data.

    Where torchrun or srun started several processes, they train together; then the first one measures and writes, and the
    others are done: they return an empty result. A recipe without a plan for them is trained data-parallel.

    Raises:
        BadInput: the recipe does not apply to this workload, or the training diverged.
    """
    check(workload)
    baseline = workload.baseline or Recipe()
    recipe = baseline if recipe is None else recipe.on(baseline)
    say = progress or (lambda event: None)
    folder = folder_for(out)
    desk = Desk(workload, folder, seed, lambda part: say({"stage": "train", "text": f"{part:.0%} of this train step"}))
    if (here := world.found()).size > 1:
        recipe = planned(recipe)
        _train_together(desk, recipe, open_tracker(track, folder / "track", recipe.hash) if track and here.first else None)
        if not here.first:
            return {}
        track = None
    with tracking(open_tracker(track, folder / "track", recipe.hash) if track else None) as tracked:
        trained = done(desk.do("train", {"recipe": recipe.plain(), "hash": recipe.hash, "keep": True}), "the recipe")
        tracked.log(0, {name: trained["values"][name] for name in ("quality", "bytes", "parameters")})
    written = desk.do("artifact", _order(desk, recipe, trained))
    shutil.rmtree(folder / "built", ignore_errors=True)
    result = _facts(workload, recipe, trained, tracked.note)
    if written["status"] == Status.COMPLETE:
        found = _announced(workload, folder, recipe, trained, lambda text: say({"stage": "artifact", "text": text}))
        result |= {"quality": found.quality} if found.quality is not None else {}
        problem, remedy = found.problem, f"it was put aside, in {_aside(folder)}; please report it" if found.problem else ""
    else:
        problem, remedy = f"there is no artifact: {written['reason']}", written.get("remedy", "")
    if problem:
        result |= {"status": "failed", "artifact": None, "error": {"message": problem, "remedy": remedy}}
    write_json(folder / "train.json", result)
    return result


def _order(desk: Desk, recipe: Recipe, trained: Mapping[str, Any]) -> dict[str, Any]:
    """What the desk has to know to write the artifact: of the very files that were measured, where there are some."""
    evidence = {"quality_on_val": trained["values"]["quality"], "verified": False}
    order = {"recipe": recipe.plain(), "batches": (1, desk.workload.batch_size), "evidence": evidence}
    kept = Path("built") / f"train-{recipe.hash}"
    return {**order, "folder": str(kept)} if (desk.folder / kept / "runtime.json").is_file() else order


def _facts(workload: Workload, recipe: Recipe, trained: Mapping[str, Any], tracked: str) -> dict[str, Any]:
    """The result of a training whose artifact is as it should be."""
    facts = {"status": "complete", "workload": workload.name, "recipe": recipe.plain(), "metric": workload.metric.name}
    notes = list(filter(None, [*trained["info"]["notes"], tracked]))
    told = {**facts, "unit": workload.metric.unit, **trained["values"], "artifact": "artifact"}
    more = {"staleness": trained["info"]["staleness"]} if "staleness" in trained["info"] else {}
    return {**told, **({"note": "; ".join(notes)} if notes else {}), **more}


def _announced(
    workload: Workload, folder: Path, recipe: Recipe, trained: Mapping[str, Any], say: Callable[[str], None]
) -> Announcement:
    """The artifact on val, in a fresh process, held against what training measured."""
    kept = folder / "scores"
    expected = {BATCH: Scores.load(kept / f"{recipe.hash}.npz")}
    if open_built(folder / "artifact").spec.alone is not None:
        expected[1] = Scores.load(kept / f"alone-{recipe.hash}.npz")
    return announced(folder / "artifact", workload.val, workload.metric, expected, say=say)


def _aside(folder: Path) -> Path:
    """Put an artifact that failed where nobody takes it for one."""
    target = folder / "artifact-failed"
    shutil.rmtree(target, ignore_errors=True)
    return (folder / "artifact").rename(target)


def _train_together(desk: Desk, recipe: Recipe, tracker: Tracker | None) -> None:
    """All train steps, by all processes, which then part."""
    with tracking(tracker):
        done(follow(desk, recipe), "the recipe")


def done(result: Mapping[str, Any], what: str) -> Mapping[str, Any]:
    """A desk's result, if the task was completed.

    Raises:
        BadInput: it was not; the text says why.
    """
    if result["status"] != Status.COMPLETE:
        problem, remedy = result.get("bad_input", [result["reason"], result.get("remedy", "")])
        step = f" at {result['step']}" if result.get("step") else ""
        raise BadInput(f"{what}: {result['status']}{step}: {problem}", remedy)
    return result


def folder_for(out: str | Path) -> Path:
    """The output folder, made where it is missing.

    Raises:
        BadInput: it cannot be made.
    """
    folder = Path(out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadInput(f"{out} cannot be made a folder: {error.strerror}", "choose another --out folder") from error
    return folder


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
    check(workload)
    folder = None if out is None else folder_for(out)
    limits = ceilings(torch.get_num_threads())
    rows = layers(workload.build(seed), workload.inputs(batch), ceiling=limits)
    found = {
        "workload": workload.name,
        "batch": batch,
        "seconds": sum(row["seconds"] for row in rows),
        "threads": torch.get_num_threads(),
        "ceilings": limits.plain(),
        "bounds": bounds(rows, limits.plain()),
        "layers": rows,
    }
    return found if folder is None else {**found, "report": write_profile(found, folder)[0].name}
