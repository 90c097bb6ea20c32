"""One arm of a timing, a process of its own: `python -m quadriga.measure.arm PARENT`, JSON lines in and out.

It loads once, then sleeps, blocked on its input, until it is asked: {"do": "ready"}, {"do": "warm", "batch", "seconds"},
{"do": "block", "batch", "calls"} or {"do": "end"}. The heavy imports come after the parent's death has been provided for.
"""

from __future__ import annotations

import gc
import importlib.util
import json
import math
import os
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TextIO

from quadriga.core.cuda import peak_allocated, settle
from quadriga.core.parent import die_with_parent
from quadriga.measure.memory import forget_peak, peak_resident, resident

Run = Callable[[Any], Any]


def load_folder(folder: str | Path) -> Run:
    """A folder's own `load.py`, imported by its path and called as a user would."""
    path = Path(folder) / "load.py"
    spec = importlib.util.spec_from_file_location("quadriga_timed_artifact", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    run: Run = module.load(Path(folder), check=False)
    return run


def load_eager(arm: Mapping[str, Any], workload: Any = None) -> Run:
    """A workload's own model, or what a recipe makes of it, with a checkpoint's weights, as PyTorch runs it.

    Memory stays with the process as with an artifact, so that neither is timed by how lucky its heap happens to lie.

    Args:
        arm: "workload": reference; "checkpoint": folder or None; "recipe": plain steps, optional; "seed", optional;
            "spec": fields of RuntimeSpec that differ from the defaults.
        workload: that the reference names, where it is loaded already.
    """
    import torch

    from quadriga import runtime, workloads
    from quadriga.core.slots import RuntimeSpec

    runtime.standalone.keep_memory()
    workload = workload or workloads.load(arm["workload"])
    seed = arm.get("seed", 0)
    model = _rebuild(workload, arm["recipe"], seed) if arm.get("recipe") else workload.build(seed)
    if arm.get("checkpoint"):
        from quadriga.train.checkpoint import load_model

        load_model(Path(arm["checkpoint"]), model)
    if not arm.get("recipe"):  # the user's own model is timed at its best; `core.batch` has turned this off
        torch.backends.mha.set_fastpath_enabled(True)
    return runtime.prepare(model.eval(), RuntimeSpec(**arm.get("spec", {})))


def _workload(arm: Mapping[str, Any]) -> Any:
    """What only the measurement needs, the data above all, is in memory before the model's own memory is counted."""
    if arm["kind"] == "folder":
        return None
    from quadriga import runtime, workloads  # noqa: F401 (so that the import of `runtime` is not counted either)

    return workloads.load(arm["workload"])


def _rebuild(workload: Any, recipe: Any, seed: int) -> Any:
    """The model's shape after a recipe, untrained: methods act, train steps only grant TRAINED."""
    from quadriga import methods
    from quadriga.core.recipe import Recipe
    from quadriga.core.setup import Setup

    setup = Setup.of(workload, seed)
    for step in Recipe.from_plain(recipe).steps:
        setup = setup.reset_training(workload) if step.method == "train" else methods.build(step)(setup)
    return setup.model


def warm(run: Run, inputs: Any, seconds: float) -> int:
    """Call until `seconds` have passed, at least three times, and return how many calls last that long."""
    settle(run(inputs))  # compiles, allocates
    times: list[float] = []
    start = time.perf_counter()
    while len(times) < 2 or time.perf_counter() - start < seconds:
        before = time.perf_counter()
        settle(run(inputs))
        times.append(time.perf_counter() - before)
    later = sorted(times[len(times) // 2 :])
    return max(1, math.ceil(seconds / max(later[len(later) // 2], 1e-9)))


def block(run: Run, inputs: Any, calls: int) -> dict[str, float]:
    """Wall and processor seconds per call, over `calls` calls; a tenth as many first, untimed, since it has slept."""
    for _ in range(max(1, calls // 10)):
        output = run(inputs)
    settle(output)
    cpu, wall = time.process_time(), time.perf_counter()
    for _ in range(calls):
        output = run(inputs)
    settle(output)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return {"wall": wall / calls, "cpu": cpu / calls}


class Server:
    """Loads the arm and answers questions."""

    def __init__(self, spec: Mapping[str, Any]) -> None:
        from quadriga.measure.tree import load_tree  # imports torch

        arm = spec["arm"]
        self.inputs = {int(batch): load_tree(path) for batch, path in spec["inputs"].items()}
        if arm["kind"] not in ("folder", "eager"):
            raise ValueError(f'an arm has the kind "{arm["kind"]}"; known: eager, folder')
        self.workload = _workload(arm)  # kept: were its data freed, the model would seem to need less memory
        forget_peak()
        self.base = resident()
        self.run = load_folder(arm["path"]) if arm["kind"] == "folder" else load_eager(arm, self.workload)
        self.startup = time.monotonic() - spec["launched"]
        gc.collect()
        gc.freeze()
        gc.disable()  # a collection inside a block would be noise

    def answer(self, command: Mapping[str, Any]) -> dict[str, float]:
        """One command, as in the module's docstring."""
        if command["do"] == "warm":
            calls = warm(self.run, self.inputs[command["batch"]], command["seconds"])
            gc.collect()
            return {"calls": calls}
        if command["do"] == "block":
            return block(self.run, self.inputs[command["batch"]], command["calls"])
        device = peak_allocated()
        growth = max(0, peak_resident() - self.base) + device
        cpu = time.process_time()
        return {"startup": self.startup, "peak": peak_resident(), "growth": growth, "device": device, "cpu": cpu}


def serve(source: TextIO, sink: TextIO) -> int:
    """Answer every line of `source` with one line of `sink`; the exit status."""
    try:
        server = Server(json.loads(source.readline()))
        for line in source:
            command = json.loads(line)
            print(json.dumps(server.answer(command)), file=sink, flush=True)
            if command["do"] == "end":
                break
    except BaseException as error:
        traceback.print_exc()
        print(json.dumps({"error": f"{type(error).__name__}: {error}"[:1000]}), file=sink, flush=True)
        return 1
    return 0


def main() -> int:
    """Talk over the real standard output, which the model's own prints must not reach."""
    die_with_parent(int(sys.argv[1]))
    sink = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return serve(sys.stdin, sink)


if __name__ == "__main__":
    sys.exit(main())
