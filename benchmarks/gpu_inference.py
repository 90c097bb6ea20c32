"""Finished networks on a GPU, for `gpu.py`: latency against eager, start-up, bytes and memory."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from quadriga import runtime
from quadriga.core.errors import NotApplicable
from quadriga.core.setup import Setup
from quadriga.core.slots import RuntimeSpec
from quadriga.measure.latency import paired
from quadriga.measure.timings import Timings
from quadriga.workloads import load

BATCHES = (1, 64)
ARMS: dict[str, dict[str, Any]] = {
    "eager": {}, "channels_last": {"channels_last": True}, "tf32": {"matmul": "high"}, "bf16": {"weights": "bf16"},
    "compiled": {"name": "inductor"}, "cuda_graphs": {"name": "cuda_graphs"},
    "cuda_graphs, bf16": {"name": "cuda_graphs", "weights": "bf16"},
}  # fmt: skip


def built(reference: str, device: str, folder: Path, names: Sequence[str]) -> tuple[dict[str, Any], dict[str, str]]:
    """Every arm as a folder: (what was built, by name; why others were not)."""
    workload = load(reference)
    model, context, made, refused = workload.build(0).eval(), Setup.of(workload).context, {}, {}
    for name in names:
        spec = RuntimeSpec(**{"device": device, **ARMS[name]})
        try:
            made[name] = runtime.build(model, spec, context, folder / name.replace(", ", "-"), BATCHES)
        except NotApplicable as refusal:
            refused[name] = str(refusal)
            print(f"[gpu] {reference}: {name} is left out: {refusal}", file=sys.stderr, flush=True)
    return made, refused


def infer(
    reference: str, device: str, folder: Path, *, restarts: int, blocks: int, seconds: float, level: float
) -> dict[str, Any]:
    """Latencies of one workload's untrained network, called as a user would: tensors in main memory, in and out.

    Args:
        reference: of the workload.
        device: "cuda", or "cpu" to try the benchmark.
        folder: for what is built.
        restarts, blocks, seconds: as in `measure.latency.paired`.
        level: of intervals.
    """
    names = [name for name in ARMS if name != "channels_last" or "gpt" not in reference]
    made, refused = built(reference, device, folder, names)
    workload = load(reference)
    arms = {name: {"kind": "folder", "path": str(one.folder)} for name, one in made.items()}
    inputs = {batch: workload.inputs(batch) for batch in BATCHES}
    timings = paired(arms, inputs, restarts=restarts, blocks=blocks, block_seconds=seconds, folder=folder)
    return {**rows(timings, level), "bytes": {name: one.bytes for name, one in made.items()}, "refused": refused}


def rows(timings: Timings, level: float) -> dict[str, Any]:
    """Seconds per call, ratios of eager's to each arm's (above 1: faster than eager), start-up and memory."""
    arms = [arm for arm in timings.startup if timings.startup[arm]]
    found: dict[str, Any] = {"seconds": {}, "ratios": {}, "errors": dict(timings.errors)}
    for batch in timings.batches:
        latencies = {arm: timings.latency(batch, arm, level=level) for arm in arms}
        found["seconds"][str(batch)] = {arm: m.value for arm, m in latencies.items() if m is not None}
        ratios: Mapping[str, Any] = {a: timings.ratio("eager", a, batch, level=level) for a in arms if a != "eager"}
        found["ratios"][str(batch)] = {f"eager/{arm}": r.plain() for arm, r in ratios.items() if r is not None}
    found["startup"] = {arm: statistics.median(timings.startup[arm]) for arm in arms}
    return {**found, "device_bytes": dict(timings.device)}
