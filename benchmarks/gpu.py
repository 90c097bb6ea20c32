"""Steps of training on an NVIDIA GPU: `make bench-gpu`.

On lenet_fashion and gpt_shakespeare it times `train.loop.fit` against a bare loop, written by hand, and what settings of
the hardware family give inside `fit`: channels-last memory, TF32 products (matmul precision "medium"), and autocast. Each
restart is a fresh process in which all arms train in turn, block by block; ratios and their intervals are those of
`measure.stats.ratio`. The last line is one of JSON; without a CUDA device it says so, and the exit status is 0.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from quadriga.core.data import Data
from quadriga.core.setup import Setup
from quadriga.core.slots import MakeOptimizer, OptimizerSlot, RuntimeSpec
from quadriga.measure.stats import ratio
from quadriga.train.loop import fit
from quadriga.workloads import load

LEVEL = 0.99
SPECS: dict[str, dict[str, Any]] = {
    "fit": {}, "channels_last": {"channels_last": True}, "medium": {"matmul": "medium"}, "bf16": {"autocast": "bf16"},
    "fp16": {"autocast": "fp16"},
}  # fmt: skip
PAIRS = (
    ("bare", "fit"),
    ("fit", "channels_last"),
    ("fit", "medium"),
    ("fit", "bf16"),
    ("fit", "fp16"),
)  # a ratio above 1: the second is the faster


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

    def make(self, model: nn.Module) -> torch.optim.Optimizer:
        """The same optimizer for every arm."""
        return self.optimizer(model.parameters(), lr=self.lr)  # type: ignore[call-arg]


def tasks(size: str, examples: int) -> list[Task]:
    """The network of images, and the language model in a size and with so many training windows."""
    return [
        Task("lenet_fashion", torch.optim.SGD, 0.1),
        Task(
            f"gpt_shakespeare?examples={examples}&size={size}",
            torch.optim.AdamW,
            1e-3,
            ("bare", "fit", "medium", "bf16", "fp16"),
        ),
    ]


def bare(model: nn.Module, make: MakeOptimizer, data: Data, size: int, steps: int, device: str) -> tuple[float, float]:
    """The loop that one writes by hand: seconds per step and the mean of the last losses."""
    optimizer, losses = make(model.to(device).train()), []
    order, position = torch.randperm(len(data)), 0
    start = time.monotonic()
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
    mean = torch.stack(losses[-100:]).mean().item()  # which waits for the device
    seconds = time.monotonic() - start
    model.cpu()
    return seconds / steps, mean


def ours(setup: Setup, data: Data, steps: int) -> tuple[float, float]:
    """As many steps of `fit`: seconds per step, as it reports them, and the mean of the last losses."""
    outcome = fit(setup, data, epochs=steps * setup.training.batch_size / len(data), seed=0)
    assert outcome.steps == steps
    return outcome.seconds / outcome.steps, outcome.loss


def restart(number: int, task: Task, steps: int, blocks: int, device: str) -> dict[str, list[tuple[float, float]]]:
    """All arms in turn in this process: for each arm a list over blocks of (seconds per step, loss)."""
    workload = load(task.reference)
    data, size = workload.train, workload.batch_size
    assert data is not None
    setups = {}
    for name in task.arms:
        spec = RuntimeSpec(device=device, **SPECS.get(name, {}))
        setups[name] = replace(Setup.of(workload), optimizer=OptimizerSlot(task.make), runtime=spec)

    def block(name: str, steps: int) -> tuple[float, float]:
        if name == "bare":
            return bare(setups[name].model, task.make, data, size, steps, device)
        return ours(setups[name], data, steps)

    order = random.Random(number)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in task.arms}
    for name in task.arms:
        block(name, min(steps, 20))  # loads libraries, fills the allocator
    for _ in range(blocks):
        for name in order.sample(task.arms, len(task.arms)):
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
    """All restarts of one task, each in a fresh process."""
    runs = []
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), max_tasks_per_child=1) as pool:
        for number in range(options.restarts):
            print(f"[gpu] {task.reference}: restart {number + 1} of {options.restarts}", file=sys.stderr, flush=True)
            runs.append(pool.submit(restart, number, task, options.steps, options.blocks, options.device).result())
    return summary(runs)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=2000, help="training windows of the language model")
    parser.add_argument("--size", default="2M", help="of the language model: 0.8M, 2M or 10M")
    parser.add_argument("--restarts", type=int, default=6, help="fresh processes, over which intervals are taken")
    parser.add_argument("--blocks", type=int, default=6, help="per restart and arm")
    parser.add_argument("--steps", type=int, default=200, help="per block")
    parser.add_argument("--device", default="cuda", help="cpu tries the benchmark itself; its numbers are of no interest")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("[gpu] no CUDA device: nothing was measured", file=sys.stderr)
        print(json.dumps({"benchmark": "gpu", "skipped": "no CUDA device"}))
        return 0
    facts = {
        "device": torch.cuda.get_device_name() if options.device == "cuda" else options.device,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "level": LEVEL,
        **{k: getattr(options, k) for k in ("restarts", "blocks", "steps")},
    }
    found = {task.reference: measure(task, options) for task in tasks(options.size, options.examples)}
    print(json.dumps({"benchmark": "gpu", **facts, "workloads": found}, allow_nan=False))
    return 0


if __name__ == "__main__":
    sys.exit(main())
