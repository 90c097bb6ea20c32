"""Training steps and finished networks on an NVIDIA GPU: `make bench-gpu`.

On lenet_fashion and gpt_shakespeare it times `train.loop.fit` against a bare loop, written by hand, and inside `fit` a fused
optimizer, channels-last memory, TF32, autocast, compilation and CUDA graphs. Each restart is a fresh process in which all
arms train in turn, block by block; a block's first steps, in which it compiles and records, are not counted. Then it times
the finished networks (`gpu_inference.py`). Ratios and their intervals are those of `measure.stats.ratio`.

The last line is one of JSON, which is kept in benchmarks/results/gpu.json with the device's name; without a CUDA device it
says so, and the exit status is 0.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from gpu_inference import infer
from torch import nn
from torch.nn import functional

from quadriga.core import cuda
from quadriga.core.data import Data
from quadriga.core.files import write_json
from quadriga.core.setup import Setup
from quadriga.core.slots import Hook, MakeOptimizer, OptimizerSlot, RuntimeSpec
from quadriga.measure.stats import ratio
from quadriga.train.loop import fit
from quadriga.train.step import settings
from quadriga.workloads import load

LEVEL = 0.99
WARM = 20  # steps of a block that are not counted
OUT = Path(__file__).parent / "results/gpu.json"
SPECS: dict[str, dict[str, Any]] = {
    "fit": {}, "fused": {}, "channels_last": {"channels_last": True}, "tf32": {"matmul": "high"}, "bf16": {"autocast": "bf16"},
    "fp16": {"autocast": "fp16"}, "compiled": {"compile": True},
    "graphs": {"compile": True, "compile_mode": "reduce-overhead"},
}  # fmt: skip
SLOW = {"compile", "autocast"}  # on a CPU that compiles for minutes, or imitates half precision
PAIRS = (("bare", "fit"), *(("fit", name) for name in SPECS if name != "fit"))  # a ratio above 1: the second is the faster


@dataclass(frozen=True)
class Task:
    """What is trained.

    Args:
        reference: of the workload.
        optimizer: its kind.
        lr: learning rate.
        arms: that make sense for it.
    """

    reference: str
    optimizer: type[torch.optim.Optimizer]
    lr: float
    arms: tuple[str, ...] = ("bare", *SPECS)

    def make(self, model: nn.Module, fused: bool = False) -> torch.optim.Optimizer:
        """The same optimizer for every arm, in PyTorch's own form or in the fused one."""
        return self.optimizer(model.parameters(), lr=self.lr, **({"fused": True} if fused else {}))  # type: ignore[call-arg]


def tasks(size: str, examples: int) -> list[Task]:
    """The network of images, and the language model in a size and with so many training windows."""
    text = f"gpt_shakespeare?examples={examples}&size={size}"
    plain = tuple(name for name in ("bare", *SPECS) if name != "channels_last")
    return [Task("lenet_fashion", torch.optim.SGD, 0.1), Task(text, torch.optim.AdamW, 1e-3, plain)]


@dataclass
class Between(Hook):
    """Notes the time after the first steps and after the last, with nothing under way on the device."""

    device: str
    first: int
    last: int
    done: int = 0
    times: list[float] = field(default_factory=list)

    def after_step(self, model: nn.Module, progress: float) -> None:
        self.done += 1
        if self.done in (self.first, self.last):
            cuda.synchronize(self.device)
            self.times.append(time.monotonic())


def bare(model: nn.Module, make: MakeOptimizer, data: Data, size: int, steps: int, device: str) -> tuple[float, float]:
    """The loop that one writes by hand, with float32 products as in `fit`: seconds per step and the mean of the last losses."""
    optimizer, losses, watch = make(model.to(device).train()), [], Between(device, WARM, steps)
    order, position = torch.randperm(len(data)), 0
    with settings(RuntimeSpec(device=device)):
        for _ in range(steps):
            if position + size > len(order):
                order, position = torch.randperm(len(data)), 0
            batch = data.batch(order[position : position + size])
            inputs, target = batch.inputs.to(device), batch.target.to(device)
            loss = functional.cross_entropy(model(inputs).flatten(0, -2), target.flatten())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(loss.detach())
            position += size
            watch.after_step(model, 0.0)
    model.cpu()
    return (watch.times[1] - watch.times[0]) / (steps - WARM), torch.stack(losses[-100:]).mean().item()


def ours(setup: Setup, data: Data, steps: int) -> tuple[float, float]:
    """As many steps of `fit`: seconds per step and the mean of the last losses."""
    watch = Between(setup.runtime.device, WARM, steps)
    hooked = replace(setup, training=replace(setup.training, make_hooks=(lambda model: watch,)))
    outcome = fit(hooked, data, epochs=steps * setup.training.batch_size / len(data), seed=0)
    assert outcome.steps == steps
    return (watch.times[1] - watch.times[0]) / (steps - WARM), outcome.loss


def restart(number: int, task: Task, steps: int, blocks: int, device: str) -> dict[str, list[tuple[float, float]]]:
    """All arms in turn in this process: for each arm a list over blocks of (seconds per step, loss)."""
    workload = load(task.reference)
    data, size = workload.train, workload.batch_size
    assert data is not None
    arms = [name for name in task.arms if device != "cpu" or not SLOW & set(SPECS.get(name, {}))]
    setups = {}
    for name in arms:
        spec, make = RuntimeSpec(device=device, **SPECS.get(name, {})), partial(task.make, fused=name == "fused")
        setups[name] = replace(Setup.of(workload), optimizer=OptimizerSlot(make), runtime=spec)

    def block(name: str, steps: int) -> tuple[float, float]:
        if name == "bare":
            return bare(setups[name].model, task.make, data, size, steps, device)
        return ours(setups[name], data, steps)

    order = random.Random(number)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in arms}
    for name in arms:
        block(name, WARM + 1)  # loads libraries, fills the allocator, compiles
    for _ in range(blocks):
        for name in order.sample(arms, len(arms)):
            times[name].append(block(name, steps))
    return times


def summary(runs: Sequence[Mapping[str, Sequence[tuple[float, float]]]]) -> dict[str, Any]:
    """Seconds per step, last losses, and the ratios of all pairs that were timed: [restart][arm][block] → plain data."""
    seconds = {name: [[block[0] for block in run[name]] for run in runs] for name in runs[0]}
    return {
        "seconds_per_step": {name: statistics.median(s for run in rows for s in run) for name, rows in seconds.items()},
        "loss": {name: runs[-1][name][-1][1] for name in seconds},
        "ratios": {
            f"{a}/{b}": ratio(seconds[a], seconds[b], level=LEVEL).plain() for a, b in PAIRS if a in seconds and b in seconds
        },
    }


def measure(task: Task, options: argparse.Namespace) -> dict[str, Any]:
    """All restarts of one task, each in a fresh process; then its finished network."""
    runs = []
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), max_tasks_per_child=1) as pool:
        for number in range(options.restarts):
            print(f"[gpu] {task.reference}: restart {number + 1} of {options.restarts}", file=sys.stderr, flush=True)
            runs.append(pool.submit(restart, number, task, options.steps, options.blocks, options.device).result())
    print(f"[gpu] {task.reference}: latency", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory() as folder:
        sizes = {"restarts": options.restarts, "blocks": options.blocks, "seconds": options.block_seconds}
        latency = infer(task.reference, options.device, Path(folder), level=LEVEL, **sizes)
    return {"training": summary(runs), "inference": latency}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=2000, help="training windows of the language model")
    parser.add_argument("--size", default="2M", help="of the language model: 0.8M, 2M or 10M")
    parser.add_argument("--restarts", type=int, default=6, help="fresh processes, over which intervals are taken")
    parser.add_argument("--blocks", type=int, default=6, help="per restart and arm")
    parser.add_argument("--steps", type=int, default=220, help=f"per block of training, of which {WARM} are not counted")
    parser.add_argument("--block-seconds", type=float, default=0.1, help="of a block of inference")
    parser.add_argument("--device", default="cuda", help="cpu tries the benchmark itself; its numbers are not kept")
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args(arguments)
    if options.steps <= WARM:
        parser.error(f"--steps is {options.steps}; give more than {WARM}")
    if options.device == "cuda" and not torch.cuda.is_available():
        print("[gpu] no CUDA device: nothing was measured", file=sys.stderr)
        print(json.dumps({"benchmark": "gpu", "skipped": "no CUDA device"}))
        return 0
    state = cuda.found()
    facts = {
        "device": state.used if options.device == "cuda" else options.device,
        **{"driver": state.driver, "torch": torch.__version__, "cuda": torch.version.cuda, "level": LEVEL},
        **{k: getattr(options, k) for k in ("restarts", "blocks", "steps")},
    }
    found = {task.reference: measure(task, options) for task in tasks(options.size, options.examples)}
    result = {"benchmark": "gpu", **facts, "workloads": found}
    if options.device == "cuda":
        write_json(options.out, result)
    print(json.dumps(result, allow_nan=False))
    return 0


if __name__ == "__main__":
    sys.exit(main())
