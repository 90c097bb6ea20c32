"""Compare any two things that run a workload: its baseline, a recipe, an artifact, an .onnx file."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from quadriga import runtime
from quadriga.core.errors import BadInput, NotApplicable
from quadriga.core.files import atomic_write
from quadriga.core.folders import BUILT, TIMING, claimed
from quadriga.core.recipe import Recipe
from quadriga.core.setup import Setup
from quadriga.core.slots import RuntimeSpec
from quadriga.core.workload import Workload
from quadriga.engine.decisions import settled
from quadriga.engine.tasks import Desk
from quadriga.measure.latency import paired
from quadriga.measure.quality import Scores
from quadriga.measure.timings import Timings
from quadriga.runtime.standalone import Damaged
from quadriga.stages.state import LEVEL
from quadriga.stages.verbs import checked, completed, done, rehearsed
from quadriga.verify.fake import Worth, told
from quadriga.verify.quality import compare as compare_quality
from quadriga.workloads import load, names

RESTARTS = 6  # processes of each side that are timed
DOING = {  # what has to be done before a side can be scored and timed
    "artifact": "opening the artifact",
    "onnx": "putting the .onnx file under a load.py, by an export of the workload's model",
    "recipe": "training, unless that was done before, and export for its runtime",
    "workload": "training its baseline, unless that was done before",
}


def compare(
    a: str,
    b: str,
    *,
    workload: Workload | None = None,
    batches: tuple[int, ...] = (),
    out: str | Path = "compare-out",
    seed: int = 0,
    progress: Any = None,
) -> dict[str, Any]:
    """Compare two of: a workload's baseline, a recipe (.toml), an artifact folder, an .onnx file.

    Latency is timed in turn, each side in its own process; quality is paired on the test split.

    Args:
        a, b: the sides; ratios of latency are a/b, so above 1 says that b is faster; of bytes b/a.
        workload: gives data and model; needed unless one side is a workload.
        batches: sizes to time at; 1 and the workload's by default.
        out: folder for checkpoints, so that a side is trained once.
        seed: of training.
        progress: called with plain data.

    Raises:
        BadInput: a side is none of these, cannot run, or there is no workload to run it on.
    """
    sides = {"a": Side(a), "b": Side(b)}
    named = next((s.text for s in sides.values() if s.kind == "workload"), None)
    if workload is None and named is None:
        raise BadInput(f"neither {a} nor {b} is a workload", "give --workload, so that there are inputs and labels")
    if bad := [n for n in batches if n < 1]:
        raise BadInput(f"the batch size is {bad[0]}", "give a positive integer")
    task = workload if workload is not None else load(str(named))
    say = progress or (lambda event: None)
    with claimed(out, "comparison") as folder:
        return _compared(task, sides, batches or tuple(sorted({1, task.batch_size})), folder, seed, say)


def _compared(
    task: Workload, sides: Mapping[str, Side], batches: Sequence[int], folder: Path, seed: int, say: Callable[..., None]
) -> dict[str, Any]:
    """Both sides made, scored and timed in a folder that is ours."""
    a, b = (sides[name].text for name in "ab")
    notes = checked(task, say)
    desk, ready, scores = Desk(task, folder, seed), {}, {}
    for name, side in sides.items():
        tell = partial(_tell, say, f"{name}, {side.text}")
        tell(side.doing)
        desk.progress = lambda part, tell=tell: tell(f"{part:.0%} of this train step" if part < 1 else "train step done")
        ready[name] = side.prepare(desk)
        tell(f"scoring it on {len(task.test):,} examples of test")
        scores[name] = _score(desk, ready[name], name, side.text)
    _tell(say, "both", f"timing in turn, each in a process of its own, {RESTARTS} times started anew; about a minute or two")
    timings = _timings(ready, task, batches, folder, {"a": a, "b": b})
    return {
        "status": "complete", "a": a, "b": b, "workload": task.name,
        "latency_ratio": {str(n): r.plain() for n in timings.batches if (r := timings.ratio("a", "b", n)) is not None},
        "latency": {str(n): {s: m.value for s in "ab" if (m := timings.latency(n, s)) is not None} for n in timings.batches},
        "bytes": {name: one.bytes for name, one in ready.items()}, "bytes_ratio": ready["b"].bytes / ready["a"].bytes,
        "fakes": _fakes(ready, timings),
        "quality": compare_quality(scores["a"], scores["b"], task.metric, 0.0, LEVEL),
        "split": "test", **({"notes": notes} if notes else {}),
    }  # fmt: skip


def _tell(say: Callable[[Mapping[str, Any]], None], of: str, text: str) -> None:
    """Progress of one side, or of both; each text is seen."""
    say({"stage": "compare", "text": f"{of}: {text}", "keep": "%" not in text})


@dataclass(frozen=True)
class Ready:
    """A side that can be timed and scored.

    Args:
        arm: how `paired` starts it.
        bytes: that it needs on disk.
        recipe: its steps, where it was made here.
        folder: with a load.py, or None for a live model.
        fakes: what looks like compression in it and is none; and the runtime.
    """

    arm: Mapping[str, Any]
    bytes: int
    recipe: Recipe = field(default_factory=Recipe)
    folder: Path | None = None
    fakes: tuple[Mapping[str, Any], ...] = ()
    runtime: str = "eager"


class Side:
    """One side of a comparison: what the text names.

    Raises:
        BadInput: nothing of the kinds that there are.
    """

    def __init__(self, text: str) -> None:
        self.text, path = text, Path(text)
        if path.suffix == ".onnx":
            self.kind = "onnx"
        elif path.suffix in (".toml", ".json"):
            self.kind = "recipe"
        elif path.is_dir():
            self.kind = "artifact"
        elif text.split(":")[0].split("?")[0] in names() or ".py" in text:
            self.kind = "workload"
        else:
            raise BadInput(f"{text} is no workload, recipe, artifact or .onnx file", f"workloads: {', '.join(names())}")
        self.doing = DOING[self.kind]
        if self.kind in ("onnx", "recipe") and not path.is_file():
            raise BadInput(f"there is no file {text}", "check the path")

    def prepare(self, desk: Desk) -> Ready:
        """Train, export or find it."""
        if self.kind == "artifact":
            return _in_folder(Path(self.text), self.text)
        if self.kind == "onnx":
            return self._onnx(desk)
        recipe = completed(desk.workload, Recipe.load(self.text) if self.kind == "recipe" else None)
        args = {"recipe": recipe.plain(), "name": f"compare-{recipe.hash}", "batches": (1, desk.workload.batch_size)}
        if self.kind == "recipe":
            recipe, _ = rehearsed(desk, recipe, self.text, lambda event: None)
        made = done(desk.do("realize", args), self.text, recipe)
        folder, known = desk.folder / BUILT / args["name"], {"fakes": tuple(made["info"]["fakes"])}
        if desk.workload.reference is not None and (self.kind == "workload" or made["info"]["live"]):
            return replace(self._live(desk, recipe, made), **known)  # as its user runs it
        return replace(_in_folder(folder, self.text, recipe), **known, runtime=made["info"]["realized"][0])

    def _live(self, desk: Desk, recipe: Recipe, made: Mapping[str, Any]) -> Ready:
        kept, decided = made["info"]["checkpoint"], settled(recipe, made["info"]["decisions"])  # the arm decides nothing anew
        arm = {
            "kind": "eager", "workload": desk.workload.reference, "seed": desk.seed, "recipe": decided.plain(),
            "checkpoint": os.path.abspath(desk.folder / "checkpoints" / kept) if kept else None,
        }  # fmt: skip
        return Ready(arm, int(made["values"]["bytes"]), recipe)

    def _onnx(self, desk: Desk) -> Ready:
        """Another's file under our load.py: inputs and outputs are those of the workload's model, by place."""
        folder = desk.folder / BUILT / f"onnx-{Path(self.text).stem}"
        shutil.rmtree(folder, ignore_errors=True)
        try:
            runtime.build(desk.workload.build(), RuntimeSpec("onnxruntime"), Setup.of(desk.workload).context, folder)
        except NotApplicable as refusal:
            raise BadInput(f"{self.text} has no counterpart to be called like: {refusal.reason}", refusal.remedy) from refusal
        atomic_write(folder / "model.onnx", Path(self.text).read_bytes())
        return _in_folder(folder, self.text)


def _fakes(ready: Mapping[str, Ready], timings: Timings) -> list[str]:
    """What looks like compression in b and is none, with what b gained over a in this comparison."""
    ratios = [r for n in timings.batches if (r := timings.ratio("a", "b", n)) is not None]
    sure = [1.0 if r.low <= 1 <= r.high else r.value for r in ratios]
    faster = math.prod(sure) ** (1 / len(sure)) - 1 if sure else None
    return told(ready["b"].fakes, Worth(ready["b"].runtime, 1 - ready["b"].bytes / ready["a"].bytes, faster))


def _in_folder(folder: Path, text: str, recipe: Recipe | None = None) -> Ready:
    try:
        size = runtime.open_built(folder).bytes
    except Damaged as error:
        raise BadInput(f"{text} cannot be loaded: {error}", "give the folder of an artifact") from error
    if not (folder / "load.py").is_file():
        raise BadInput(f"{text} holds no load.py", "give the folder of an artifact")
    return Ready({"kind": "folder", "path": os.path.abspath(folder)}, size, recipe or Recipe(), folder)


def _score(desk: Desk, one: Ready, name: str, text: str) -> Scores:
    folder = {"folder": os.path.abspath(one.folder)} if one.folder is not None else {}
    found = done(desk.do("score", {"recipe": one.recipe.plain(), "split": "test", "name": name, **folder}), text)
    return Scores.load(desk.folder / found["info"]["scores"])


def _timings(
    ready: Mapping[str, Ready], task: Workload, batches: Sequence[int], folder: Path, texts: Mapping[str, str]
) -> Timings:
    inputs = {n: task.inputs(n) for n in batches}
    timings = paired(
        {n: one.arm for n, one in ready.items()},
        inputs,
        restarts=RESTARTS,
        blocks=8,
        block_seconds=0.04,
        folder=folder / TIMING,
    )
    for name, error in timings.errors.items():
        raise BadInput(f"{texts[name]} cannot be timed: {error}", "see that it runs on this workload at each batch size")
    assert all(math.isfinite(s) for n in batches for arm in "ab" for row in timings.per_call(n, arm) for s in row)
    return timings
