"""The smaller verbs: train one recipe, profile a model, compare any two things."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from quadriga import runtime
from quadriga.core.batch import Tree
from quadriga.core.errors import BadInput
from quadriga.core.files import atomic_write, write_json
from quadriga.core.recipe import Recipe
from quadriga.core.setup import RuntimeSpec
from quadriga.core.trial import Status
from quadriga.core.workload import Workload
from quadriga.engine.tasks import Desk
from quadriga.measure.arm import load_folder
from quadriga.measure.latency import paired
from quadriga.measure.quality import Scores, score
from quadriga.measure.roofline import ceilings
from quadriga.measure.roofline import profile as layers
from quadriga.measure.timings import Timings
from quadriga.verify.quality import compare as compare_quality
from quadriga.workloads import load, names
from quadriga.workloads.check import check


def train(
    workload: Workload, *, recipe: Recipe | None = None, out: str | Path = "out", seed: int = 0, progress: Any = None
) -> dict[str, Any]:
    """Carry out one recipe, measure it on val, and write its artifact. Killed and called again, it goes on.

    Args:
        workload: what to train.
        recipe: the workload's baseline by default.
        out: folder for checkpoints and the artifact.
        seed: of everything random.
        progress: called with plain data.

    Raises:
        BadInput: the recipe does not apply to this workload, or the training diverged.
    """
    check(workload)
    recipe = recipe if recipe is not None else workload.baseline or Recipe()
    say = progress or (lambda event: None)
    desk = Desk(workload, Path(out), seed, lambda done: say({"stage": "train", "text": f"{done:.0%} of this train step"}))
    done = _done(desk.do("train", {"recipe": recipe.plain(), "hash": recipe.hash, "batches": (1, workload.batch_size)}))
    args = {
        "recipe": recipe.plain(),
        "batches": (1, workload.batch_size),
        "evidence": {"quality_on_val": done["values"]["quality"], "verified": False},
    }
    written = desk.do("artifact", args)
    made = written["status"] == Status.COMPLETE
    facts = {"status": "complete", "workload": workload.name, "recipe": recipe.plain(), "metric": workload.metric.name}
    note = {} if made else {"note": f"no artifact: {written['reason']}"}
    result = {**facts, "unit": workload.metric.unit, **done["values"], "artifact": "artifact" if made else None, **note}
    write_json(Path(out) / "train.json", result)
    return result


def _done(result: Mapping[str, Any]) -> Mapping[str, Any]:
    if result["status"] != Status.COMPLETE:
        raise BadInput(f"{result['status']}: {result['reason']}", result.get("remedy", ""))
    return result


def profile(workload: Workload, *, batch: int | None = None, seed: int = 0, progress: Any = None) -> dict[str, Any]:
    """Where the time, the FLOPs and the bytes of the unchanged model are, layer by layer, against the machine's ceilings.

    Args:
        workload: whose model is profiled.
        batch: the workload's by default.
        seed: of the weights.
        progress: called with plain data.
    """
    batch = batch or workload.batch_size
    if batch < 1:
        raise BadInput(f"the batch is {batch}", "give a positive integer")
    limits = ceilings()
    rows = layers(workload.build(seed), workload.inputs(batch), ceiling=limits)
    threads = torch.get_num_threads()
    return {"workload": workload.name, "batch": batch, "threads": threads, "ceilings": vars(limits), "layers": rows}


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
        a, b: the sides; ratios are a/b, so above 1 says that b is faster.
        workload: gives data and model; needed unless one side is a workload.
        batches: sizes to time at; 1 and the workload's by default.
        out: folder for checkpoints, so that a side is trained once.
        seed: of training.
        progress: called with plain data.

    Raises:
        BadInput: a side is none of these, or there is no workload to run it on.
    """
    sides = [_Side(text) for text in (a, b)]
    named = next((s.text for s in sides if s.kind == "workload"), None)
    if workload is None and named is None:
        raise BadInput(f"neither {a} nor {b} is a workload", "give --workload, so that there are inputs and labels")
    task = workload if workload is not None else load(str(named))
    check(task)
    folder, say = Path(out), progress or (lambda event: None)
    ready = []
    for side in sides:
        say({"stage": "compare", "text": f"preparing {side.text}"})
        ready.append(side.prepare(task, folder, seed))
    timings = _timings(ready, task, batches or tuple(sorted({1, task.batch_size})), folder, (a, b))
    quality = compare_quality(*(_scores(path, task) for path in ready), task.metric, 0.0, 0.975)
    latency = {str(n): r.plain() for n in timings.batches if (r := timings.ratio("a", "b", n)) is not None}
    sizes = [runtime.open_built(path).bytes for path in ready]
    return {
        "status": "complete", "a": a, "b": b, "workload": task.name, "latency_ratio": latency,
        "bytes": dict(zip("ab", sizes, strict=True)), "bytes_ratio": sizes[1] / sizes[0], "quality": quality, "split": "test",
    }  # fmt: skip


def _timings(ready: list[Path], task: Workload, batches: tuple[int, ...], folder: Path, names: tuple[str, str]) -> Timings:
    arms = {name: {"kind": "folder", "path": str(path)} for name, path in zip("ab", ready, strict=True)}
    inputs = {n: task.inputs(n) for n in batches}
    timings = paired(arms, inputs, restarts=6, blocks=8, block_seconds=0.04, folder=folder / "timing")
    for name, error in timings.errors.items():
        raise BadInput(f"{names['ab'.index(name)]} cannot be timed: {error}", "see that it runs on this workload")
    return timings


def _scores(folder: Path, workload: Workload) -> Scores:
    run = load_folder(folder)

    def execute(inputs: Tree) -> Tree:
        return run(inputs)

    with torch.inference_mode():
        return score(execute, workload.test, workload.metric)


class _Side:
    """One side of a comparison: what the text names, and how it becomes a folder with a load.py."""

    def __init__(self, text: str) -> None:
        self.text, path = text, Path(text)
        if path.suffix == ".onnx":
            self.kind = "onnx"
        elif path.suffix in (".toml", ".json"):
            self.kind = "recipe"
        elif path.is_dir():
            self.kind = "artifact"
        elif text.split(":")[0] in names() or ".py" in text:
            self.kind = "workload"
        else:
            raise BadInput(f"{text} is no workload, recipe, artifact or .onnx file", f"workloads: {', '.join(names())}")
        if self.kind in ("onnx", "recipe") and not path.is_file():
            raise BadInput(f"there is no file {text}", "check the path")

    def prepare(self, workload: Workload, out: Path, seed: int) -> Path:
        """A folder with a load.py."""
        if self.kind == "artifact":
            if not (Path(self.text) / "load.py").is_file():
                raise BadInput(f"{self.text} holds no load.py", "give the folder of an artifact")
            return Path(self.text)
        if self.kind == "onnx":
            return self._from_onnx(workload, out)
        recipe = Recipe.load(self.text) if self.kind == "recipe" else workload.baseline or Recipe()
        desk = Desk(workload, out, seed)
        name = f"compare-{recipe.hash}"
        _done(desk.do("realize", {"recipe": recipe.plain(), "name": name, "batches": (1, workload.batch_size)}))
        return out / "built" / name

    def _from_onnx(self, workload: Workload, out: Path) -> Path:
        from quadriga.core.setup import Setup

        folder = out / "built" / f"onnx-{Path(self.text).stem}"
        shutil.rmtree(folder, ignore_errors=True)
        context = Setup.of(workload).context
        runtime.build(workload.build(), RuntimeSpec("onnxruntime"), context, folder)  # gives load.py and the entry
        atomic_write(folder / "model.onnx", Path(self.text).read_bytes())
        return folder
