"""What a worker process does in a train step: it makes the setup once more, on tensors that are common, and takes part."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any

import torch

from quadriga.core import rng
from quadriga.core.data import Data
from quadriga.core.errors import BadInput
from quadriga.core.setup import Context, Setup
from quadriga.core.slots import Factors, Hook
from quadriga.parallel.block import Block
from quadriga.parallel.board import Board
from quadriga.train.run import Run
from quadriga.train.seat import Seat
from quadriga.train.shareable import has_state
from quadriga.train.state import model_tensors, parameter_names
from quadriga.train.step import entered, prepared

Advance = Callable[[Run], None]


@dataclass(frozen=True)
class Job:
    """What a worker is told.

    Args:
        make: gives setup and data in its process.
        advance: a step of the loop.
        block: all tensors that are common.
        board: where the workers meet.
        state: parameter and entry of each tensor of the optimizer's state.
        epochs, seed, begun, span, slower: of the run.
        scale: whether the rate is scaled by staleness.
        threads: of each worker.
    """

    make: Callable[[], tuple[Setup, Data]]
    advance: Advance
    block: Block
    board: Board
    state: tuple[tuple[str, str], ...]
    epochs: float
    seed: int
    begun: int
    span: int
    slower: float
    scale: bool
    threads: int


class Told(Hook):
    """In a worker: has the factors that the hooks of worker 0 have, as they were when the batch was taken."""


class Helper(Seat):
    """The place of a worker process."""

    def claim(self, run: Run) -> bool:
        """As a seat's, after standing still for as long as that is asked for."""
        self.board.park(self.rank)
        if super().claim(run):
            return True
        self.board.leave(self.rank)
        return False

    def exchange(self, run: Run) -> None:
        """Take those of worker 0's hooks."""
        run.hooks[-1].factors = Factors(*map(float, self.board.see["factors"]))


def bare(setup: Setup) -> Setup:
    """A setup without the services of its context, which do not cross the border of a process."""
    nothing: Any = None
    return replace(setup, context=Context(nothing, (), nothing, setup.context.seed))


def sent(setup: Setup, data: Data) -> tuple[Setup, Data]:
    """What a worker is given where nothing can make it anew."""
    return setup, data


def work(rank: int, job: Job) -> None:
    """A worker process's part in a train step."""
    torch.set_num_threads(job.threads)
    setup, data = job.make()
    with prepared(setup) as runner:
        torch.set_num_threads(job.threads)
        run = Run(setup, data, runner, job.epochs, job.seed, time.monotonic)
        rng.seed_all(rng.derive("worker", job.seed, rank, job.board["done"]))
        run.begun, run.span, run.slower = job.begun, job.span, job.slower
        run.hooks, run.watching, run.looking = (*(h for h in run.hooks if not has_state(h)), Told()), [], []
        attach(run, job)
        run.crew = Helper(run, job.board, job.block, rank, job.scale)
        with entered(hook.train(run.model, run.data) for hook in run.hooks), closing(run.loader):
            while run.next():
                job.advance(run)


def attach(run: Run, job: Job) -> None:
    """Give a worker's model and optimizer the tensors that all have in common.

    Raises:
        BadInput: the model that it made is another one.
    """
    tensors, _ = model_tensors(run.model)
    shapes = {f"model/{name}": (t.dtype, tuple(t.shape)) for name, t in tensors.items()}
    theirs = {name: row[1:3] for name, row in job.block.layout.items() if name.startswith("model/")}
    if shapes != theirs:
        odd = sorted(set(shapes.items()) ^ set(theirs.items()), key=str)[0][0].removeprefix("model/")
        raise BadInput(f"a worker made another model than the one that is trained: {odd} differs", "leave out hogwild")
    for name, t in tensors.items():
        t.data = job.block.view(f"model/{name}")
    named = {
        name: p
        for names, group in zip(parameter_names(run.model, run.optimizer), run.optimizer.param_groups, strict=True)
        for name, p in zip(names, group["params"], strict=True)
    }
    for name, key in job.state:
        run.optimizer.state[named[name]][key] = job.block.view(f"state/{name}/{key}")
