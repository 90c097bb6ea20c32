"""A worker's place at a train step that several make: it draws from one stream and measures how stale its updates are."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from quadriga.core.batch import Batch
from quadriga.parallel.block import Block
from quadriga.parallel.board import RECENT, Board, Staleness
from quadriga.train.run import Run
from quadriga.train.shareable import check_common
from quadriga.train.step import Runner


class Measured:
    """A runner that counts the updates by others between its read of the weights and its write.

    Args:
        runner: does the work.
        seat: whose.
        scale: whether to multiply the rate by 1 / (1 + staleness).
    """

    def __init__(self, runner: Runner, seat: Seat, scale: bool) -> None:
        self.runner, self.seat, self.scale = runner, seat, scale
        self.read, self.loss = 0, math.nan

    def __getattr__(self, name: str) -> Any:
        return getattr(self.runner, name)

    def forward_backward(self, batch: Batch) -> Tensor:
        """As the runner's."""
        self.read = self.seat.board.others(self.seat.rank)
        loss = self.runner.forward_backward(batch)
        self.loss = float(loss)
        return loss

    def update(self, optimizer: torch.optim.Optimizer) -> None:
        """As the runner's, with its staleness noted."""
        board, rank = self.seat.board, self.seat.rank
        stale = board.others(rank) - self.read
        with scaled(optimizer, 1 / (1 + stale) if self.scale else 1.0):
            self.runner.update(optimizer)
        board.updated(rank, stale, self.seat.number, self.loss)


@contextmanager
def scaled(optimizer: torch.optim.Optimizer, factor: float) -> Iterator[None]:
    """The optimizer with its rates multiplied for one step.

    Source: Zhang et al. 2016, arXiv:1511.05950: the rate divided by the staleness; by 1 + staleness here, which counts from 0.
    """
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups if factor != 1 else ():
        group["lr"] = group["lr"] * factor
    try:
        yield
    finally:
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate


class Seat:
    """One worker's place at a train step. As a run's `crew` it says which batch comes next."""

    def __init__(self, run: Run, board: Board, block: Block, rank: int, scale: bool) -> None:
        self.board, self.block, self.rank, self.number, self.settled = board, block, rank, 0, False
        run.runner = Measured(run.runner, self, scale)  # type: ignore[assignment]
        if run.loader.feed is not None:
            run.loader.feed.workers = 0  # nobody knows yet which batches will be whose

    @property
    def helped(self) -> float:
        """Processor seconds of the others."""
        return self.board.helped

    @property
    def staleness(self) -> Staleness:
        """Of all updates here."""
        return self.board.staleness

    def claim(self, run: Run) -> bool:
        """Take the next batch of the common stream; False when nothing is left."""
        board = self.board
        if not self.settled and board.see["updates"][self.rank]:
            check_common(run, self.block)
            self.settled = True
        with board.locked(self.watch):
            if board["position"] - run.begun >= run.span or board["stop"]:
                return False
            self.exchange(run)
            run.position, run.step, run.done, run.samples = board.place()
            self.number, size = run.done, min(run.size(run.factors(run.progress)), run.sampler.length)
            board.see["losses"][self.number % RECENT] = math.nan
            for name, more in (("position", size), ("step", 1), ("done", 1), ("samples", size)):
                board[name] += more
        return True

    def exchange(self, run: Run) -> None:
        """Give or take the factors of hooks."""

    def watch(self) -> None:
        """Called while it waits."""

    def still(self, run: Run) -> AbstractContextManager[None]:
        """Entered to look at the weights while nobody changes them; a place from which nobody looks has no say in it."""
        return nullcontext()

    def close(self, run: Run) -> None:
        """The run leaves its loop."""
