"""The smaller verbs: train one recipe, profile a model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

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
from quadriga.report.profiled import write as write_profile
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
    """Carry out one recipe, measure it on val, and write its artifact. Killed and called again, it goes on.

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
        trained = done(desk.do("train", {"recipe": recipe.plain(), "hash": recipe.hash}), "the recipe")
        tracked.log(0, {name: trained["values"][name] for name in ("quality", "bytes", "parameters")})
    args = {
        "recipe": recipe.plain(),
        "batches": (1, workload.batch_size),
        "evidence": {"quality_on_val": trained["values"]["quality"], "verified": False},
    }
    written = desk.do("artifact", args)
    made = written["status"] == Status.COMPLETE
    facts = {"status": "complete", "workload": workload.name, "recipe": recipe.plain(), "metric": workload.metric.name}
    notes = [*trained["info"]["notes"], tracked.note, "" if made else f"no artifact: {written['reason']}"]
    note = {"note": "; ".join(filter(None, notes))} if any(notes) else {}
    result = {**facts, "unit": workload.metric.unit, **trained["values"], "artifact": "artifact" if made else None, **note}
    if "staleness" in trained["info"]:
        result["staleness"] = trained["info"]["staleness"]
    write_json(folder / "train.json", result)
    return result


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
