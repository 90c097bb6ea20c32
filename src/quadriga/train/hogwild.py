"""Asynchronous training: workers draw from one stream of examples and update one set of weights in shared memory, lock-free.

Worker 0 is the loop itself, with its hooks and checkpoints; the others are processes that run the same `advance`. They
have parameters, buffers and the optimizer's state in common; each has gradients, dropout and the groups' rates for itself.
Recht et al. 2011, arXiv:1106.5730.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import astuple
from functools import partial, reduce
from operator import mul

import torch

from quadriga.core.errors import NotApplicable
from quadriga.core.slots import PLAIN, Asynchronous
from quadriga.parallel.block import Block
from quadriga.parallel.board import RECENT, Board, Staleness
from quadriga.parallel.crew import Crew
from quadriga.train.helper import Advance, Job, bare, sent, work
from quadriga.train.run import Run
from quadriga.train.seat import Measured, Seat
from quadriga.train.shareable import check_optimizer, check_run, common, numbers_of, states_of


class Lead(Seat):
    """Worker 0's place, which the processes of the others belong to.

    Args:
        run: its first step is made, so that the optimizer's state is there.
        advance: a step of the loop.
        workers: with this one.
        wanted: what was asked for.
    """

    def __init__(self, run: Run, advance: Advance, workers: int, wanted: Asynchronous) -> None:
        self.wanted, self.threads = wanted, torch.get_num_threads()
        start = {name: getattr(run, name) for name in ("position", "step", "done", "samples")}
        lock = torch.multiprocessing.get_context("spawn").Lock()
        board = Board(workers, lock, {**start, "asked": 1})  # everybody stands still until all are there
        for place, loss in enumerate(run.watch.recent, run.done - len(run.watch.recent)):
            board.see["losses"][place % RECENT] = loss
        shared = common(run)
        super().__init__(run, board, Block(shared), 0, wanted.scale)
        for name, t in shared.items():
            t.data = self.block.view(name)
        share, state = max(1, self.threads // workers), tuple((name, key) for name, key, _ in states_of(run))
        job = Job(
            run.setup.context.again or partial(sent, bare(run.setup), run.data), advance, self.block, board, state,
            run.epochs, run.seed, run.begun, run.span, run.slower, wanted.scale, share,
        )  # fmt: skip
        self.crew: Crew | None = None
        try:
            self.crew = Crew(workers, work, job)
            board.assemble(self.watch)
        except BaseException:
            self.close(run)
            raise
        torch.set_num_threads(share)
        board["released"] = board["asked"]

    def watch(self) -> None:
        """Raises what became of a worker that failed."""
        assert self.crew is not None
        self.crew.check()

    def claim(self, run: Run) -> bool:
        """As a seat's; when nothing is left, the others have ended and the weights are this process's own again."""
        assert self.crew is not None
        with named(self.wanted):
            self.watch()
            if any(hook.stopped for hook in run.hooks):
                self.board["stop"] = 1
            if super().claim(run):
                return True
            self.crew.finish()
        self.collect(run)
        self.close(run)
        return False

    def exchange(self, run: Run) -> None:
        """Give them to the others."""
        self.board.see["factors"][:] = astuple(reduce(mul, (hook.factors for hook in run.hooks), PLAIN))

    def collect(self, run: Run) -> None:
        """Where the stream stands and what the last losses were, while nobody is in the middle of a step."""
        run.position, run.step, run.done, run.samples = self.board.place()
        run.watch.recent.clear()
        run.watch.recent.extend(self.board.recent())

    @contextmanager
    def still(self, run: Run) -> Iterator[None]:
        """Everybody else stands still between two steps."""
        with self.board.still(self.watch):
            self.collect(run)
            yield

    def close(self, run: Run) -> None:
        """End whoever is left, and take weights and state back into this process's own memory."""
        if self.crew is not None:
            self.crew.kill()
        torch.set_num_threads(self.threads)
        run.spent = (run.spent[0], run.spent[1] + self.board.helped)
        run.staleness += self.board.staleness
        for t in common(run).values():
            t.data = t.data.clone()
        if isinstance(run.runner, Measured):
            run.runner = run.runner.runner
        run.crew = None


class Alone:
    """The loop's own process before the others come, in a crew's place: it makes the steps by itself, on all threads.

    Gradients of the first steps are large and change fast, and stale ones slow the training down: Dean et al. 2012, section 5,
    start with one replica.

    Args:
        wanted: what was asked for.
        advance: a step of the loop.
    """

    helped, staleness = 0.0, Staleness()

    def __init__(self, wanted: Asynchronous, advance: Advance) -> None:
        self.wanted, self.advance = wanted, advance

    def claim(self, run: Run) -> bool:
        """Whether there is another step; once enough was made alone, others join before it."""
        if run.over:
            return False
        left = math.ceil((run.span - (run.position - run.begun)) / run.sampler.batch_size)
        workers = min(self.wanted.workers, left)
        if run.progress < self.wanted.alone or workers < 2:
            return True
        with named(self.wanted):
            run.crew = Lead(run, self.advance, workers, self.wanted)
        return run.crew.claim(run)

    def still(self, run: Run) -> AbstractContextManager[None]:
        """Nobody else moves."""
        return nullcontext()

    def close(self, run: Run) -> None:
        """There is nobody to end."""


def gather(run: Run, advance: Advance) -> None:
    """Let other workers join a train step whose training slot asks for them, after its first steps, which are made alone.

    Raises:
        NotApplicable: something of the train step cannot be shared among processes.
    """
    wanted = run.setup.training.asynchronous
    if wanted is None or wanted.workers < 2:
        return
    with named(wanted):
        check_run(run)
        if not run.next():
            return
        before = numbers_of(run.optimizer)
        advance(run)
        check_optimizer(run.optimizer, before)
    run.crew = Alone(wanted, advance)


@contextmanager
def named(wanted: Asynchronous) -> Iterator[None]:
    """A refusal inside says which method it was, for those who may leave it out."""
    try:
        yield
    except NotApplicable as refusal:
        refusal.add_note(wanted.asked_by)
        raise
