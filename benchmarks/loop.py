"""What the training loop costs: processor time per step of `fit` against a loop written by hand, and against two trainers.

    QUADRIGA_DATA=shipped python benchmarks/loop.py        # ten minutes on two cores

All arms train the same model with the same optimizer on the same data, batch size and number of steps, on one thread. *bare*
is the loop that one writes by hand for tensors in memory: a permutation, slices, loss, backward, step. *bare, DataLoader*
reads the same tensors through a `TensorDataset`, as users of the trainers do. *Accelerate* is that loop through
`Accelerator.prepare` and `backward`; *Lightning, lean* is a `Trainer` without logger, checkpoints, bar and summary;
*Lightning* has its defaults, logs the loss, and writes into a scratch folder. Time is counted from the end of the first step to
the end of the last, so that what trainers do at the start counts for none. Each restart is a fresh process in which all arms
take turns, block by block; ratios are arm ÷ bare with their intervals (`measure.stats.ratio`). Prints a table and writes it.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from quadriga.core.data import TensorData
from quadriga.core.files import atomic_write, write_json
from quadriga.core.setup import Setup
from quadriga.core.slots import Hook, OptimizerSlot
from quadriga.core.workload import Workload
from quadriga.measure.machine import facts
from quadriga.measure.stats import ratio
from quadriga.train.loop import fit
from quadriga.workloads import load

ROOT = Path(__file__).resolve().parents[1]
LEVEL = 0.99
SINGLE = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
TASKS = {"lenet_fashion": ("sgd", 60), "gpt_shakespeare": ("adamw", 4)}  # optimizer, steps of a block


@dataclass
class Marks:
    """Processor time at the end of each step."""

    times: list[float] = field(default_factory=list)

    def __call__(self) -> None:
        self.times.append(time.process_time())

    @property
    def per_step(self) -> float:
        """Seconds, of all steps after the first."""
        return (self.times[-1] - self.times[0]) / (len(self.times) - 1)


def loss_of(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy over examples and positions."""
    return functional.cross_entropy(output.flatten(0, -2), target.flatten())


@dataclass
class Task:
    """What every arm trains."""

    workload: Workload
    model: nn.Module
    make: Callable[[nn.Module], torch.optim.Optimizer]
    steps: int

    @property
    def data(self) -> TensorData:
        """The training split, whose batches are rows of its tensors, so that every arm sees the same."""
        assert isinstance(self.workload.train, TensorData) and self.workload.train.plain
        return self.workload.train

    def loader(self) -> DataLoader[Any]:
        """As a user of the trainers would read it."""
        tensors = TensorDataset(self.data.inputs, self.data.target)
        return DataLoader(tensors, batch_size=self.workload.batch_size, shuffle=True, drop_last=True)


def bare(task: Task, marks: Marks) -> None:
    """By hand."""
    model, size = task.model.train(), task.workload.batch_size
    optimizer, order, position = task.make(model), torch.randperm(len(task.data)), 0
    for _ in range(task.steps):
        if position + size > len(order):
            order, position = torch.randperm(len(task.data)), 0
        rows = order[position : position + size]
        loss = loss_of(model(task.data.inputs[rows]), task.data.target[rows])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        position += size
        marks()


def by_loader(task: Task, marks: Marks, accelerate: bool = False) -> None:
    """By hand over a DataLoader, perhaps through Accelerate."""
    model, loader = task.model.train(), task.loader()
    optimizer, backward = task.make(model), torch.Tensor.backward
    if accelerate:
        from accelerate import Accelerator

        accelerator = Accelerator(cpu=True)
        model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
        backward = accelerator.backward
    for number, (inputs, target) in enumerate(loader):
        if number == task.steps:
            break
        backward(loss_of(model(inputs), target))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        marks()


def lightning(task: Task, marks: Marks, lean: bool) -> None:
    """As a LightningModule."""
    import lightning as L

    class Module(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = task.model

        def training_step(self, batch: Any, number: int) -> torch.Tensor:
            loss = loss_of(self.model(batch[0]), batch[1])
            if not lean:
                self.log("loss", loss)
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return task.make(self.model)

    class Marking(L.Callback):
        def on_train_batch_end(self, *args: Any) -> None:
            marks()

    off = {"logger": False, "enable_checkpointing": False} if lean else {}
    with tempfile.TemporaryDirectory() as folder:
        trainer = L.Trainer(max_steps=task.steps, accelerator="cpu", enable_progress_bar=False, enable_model_summary=False,
                            callbacks=[Marking()], default_root_dir=folder, **off)  # fmt: skip
        trainer.fit(Module(), task.loader())


def ours(task: Task, marks: Marks) -> None:
    """`fit`, with nothing but the marks."""

    class Marking(Hook):
        def after_step(self, model: nn.Module, progress: float) -> None:
            marks()

    setup = replace(Setup.of(task.workload, model=task.model), optimizer=OptimizerSlot(task.make))
    setup = replace(setup, training=replace(setup.training, make_hooks=(lambda model: Marking(),)))
    fit(setup, task.data, epochs=task.steps * task.workload.batch_size / len(task.data), seed=0)


ARMS: dict[str, Callable[[Task, Marks], None]] = {
    "bare": bare,
    "fit": ours,
    "bare, DataLoader": by_loader,
    "Accelerate": lambda task, marks: by_loader(task, marks, accelerate=True),
    "Lightning, lean": lambda task, marks: lightning(task, marks, lean=True),
    "Lightning": lambda task, marks: lightning(task, marks, lean=False),
}


def restart(name: str, number: int, blocks: int) -> dict[str, list[float]]:
    """All arms in turn in this process: seconds per step of each block."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    kind, steps = TASKS[name]
    workload = load(name)
    make = {"sgd": lambda m: torch.optim.SGD(m.parameters(), lr=0.05, fused=True),
            "adamw": lambda m: torch.optim.AdamW(m.parameters(), lr=1e-3, fused=True)}[kind]  # fmt: skip
    model, shuffle = workload.build(), random.Random(number)
    times: dict[str, list[float]] = {arm: [] for arm in ARMS}
    for block in range(blocks + 1):
        for arm in shuffle.sample(list(ARMS), len(ARMS)):
            marks = Marks()
            ARMS[arm](Task(workload, deepcopy(model), make, steps), marks)
            if block:  # the first loads libraries and fills the allocator
                times[arm].append(marks.per_step)
    return times


def measured(name: str, restarts: int, blocks: int) -> dict[str, Any]:
    """Ratios arm ÷ bare."""
    found = []
    for number in range(restarts):
        asked = json.dumps([name, number, blocks])
        done = subprocess.run([sys.executable, __file__, "--child", asked], stdout=subprocess.PIPE, check=True, text=True,
                              env={**os.environ, **SINGLE})  # fmt: skip
        found.append(json.loads(done.stdout.splitlines()[-1]))
        print(f"[loop] {name}: restart {number + 1} of {restarts}", file=sys.stderr, flush=True)
    bares = [f["bare"] for f in found]
    return {arm: ratio([f[arm] for f in found], bares, level=LEVEL).plain() for arm in ARMS if arm != "bare"}


def table(rows: dict[str, dict[str, Any]]) -> str:
    """As Markdown."""
    cell = lambda r: f"{r['value']:.3f} ({r['low']:.3f} to {r['high']:.3f})"  # noqa: E731
    lines = ["# What the training loop costs", "", (__doc__ or "").partition("\n\n    QUADRIGA")[0], "",
             "Processor time per step, arm ÷ bare loop, with 99 % intervals:", "",
             f"| loop | {' | '.join(rows)} |", "|---" * (len(rows) + 1) + "|"]  # fmt: skip
    arms = [a for a in ARMS if a != "bare"]
    lines += [f"| {arm} | {' | '.join(cell(rows[name][arm]) for name in rows)} |" for arm in arms]
    return "\n".join(lines) + "\n"


def main() -> None:
    """All workloads."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--restarts", type=int, default=6)
    parser.add_argument("--blocks", type=int, default=11)
    parser.add_argument("--only", choices=TASKS)
    parser.add_argument("--child", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(restart(*options.child)))
        return
    names = [options.only] if options.only else list(TASKS)
    rows = {name: measured(name, options.restarts, options.blocks) for name in names}
    text = table(rows)
    print(text)
    if not options.only:
        atomic_write(ROOT / "docs/loop.md", text)
        write_json(ROOT / "benchmarks/results/loop.json", {"machine": facts(), "rows": rows})


if __name__ == "__main__":
    main()
