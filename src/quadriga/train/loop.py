"""The training loop: one for everything. `fit` trains a setup's model, resumes what was killed, continues what was done."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import closing
from functools import cache
from pathlib import Path

from quadriga.core import rng
from quadriga.core.data import Data
from quadriga.core.errors import BadInput, Diverged
from quadriga.core.setup import Setup
from quadriga.core.slots import Look
from quadriga.train.factors import set_factors
from quadriga.train.hogwild import gather
from quadriga.train.outcome import Outcome
from quadriga.train.run import Run
from quadriga.train.runners import runner_for
from quadriga.train.step import entered
from quadriga.train.track import Tracker, current

SHOW = 0.5  # seconds between calls of `progress`
SLOWER = 0.1  # of the rate, after a loss that was not finite


def fit(
    setup: Setup,
    data: Data,
    *,
    epochs: float,
    seed: int,
    start: str | Path | None = None,
    checkpoint: str | Path | None = None,
    every: float = 30.0,
    clock: Callable[[], float] = time.monotonic,
    progress: Callable[[float], None] | None = None,
    tracker: Tracker | None = None,
) -> Outcome:
    """Train `setup.model` in place.

    Args:
        setup: its training, optimizer and runtime slots say how.
        data: to learn from.
        epochs: may be a fraction; the steps are ⌈epochs · examples / batch size⌉, all of full batches.
        seed: of data order, transforms and the global generators. Equal seeds give equal weights on one machine.
        start: a finished checkpoint to continue from: weights, optimizer, hooks, generators, and the place in the
            stream of examples, so that one epoch and three more equal four at a constant rate. Progress starts anew.
        checkpoint: a folder. What it holds of this run is resumed, bit for bit; a finished run is only loaded.
        every: seconds between checkpoints.
        clock: for `every`, and for the seconds reported.
        progress: called now and then with the fraction done.
        tracker: is given loss, rate and progress now and then, and the quality where a hook looks at it; that of
            `tracking` by default. One that fails is left alone from then on, and the outcome's note says so.

    Where the training slot is `asynchronous`, other processes make steps too; one that fails ends the train step.

    A loss that is not finite sends the run back to its last checkpoint, or to its start, once, at a tenth of the rate; the
    outcome's note says so.

    Raises:
        Diverged: the loss became NaN or infinite again.
        BadInput: a checkpoint is of another run, or damaged with no good state before it.
        NotApplicable: the model or the optimizer is another one than at `start`, or cannot be shared by workers.
        WorkerFailed: another process of the train step raised an error or was killed.
    """
    if not (math.isfinite(epochs) and epochs > 0):
        raise BadInput(f"epochs is {epochs!r}", "give a positive number")
    folder = Path(checkpoint) if checkpoint else None
    with rng.isolated(), runner_for(setup, folder) as runner:
        put_back = runner.kept()
        run = Run(setup, data, runner, epochs, seed, clock).opened(start, folder)
        tracked = run.tracked = current(tracker)
        try:
            train(run, folder, every, progress)
        except Diverged as error:
            if run.slower < 1:
                raise
            put_back()
            runner.model.zero_grad(set_to_none=True)
            run = Run(setup, data, runner, epochs, seed, clock, SLOWER, run.costs()).opened(start, folder)
            run.tracked = tracked
            back = f"{error}; went back to step {run.done} and on at {SLOWER:g} of the rate"
            run.note = "; ".join(filter(None, [run.note, back]))
            train(run, folder, every, progress)
        tracked.passed(run.done)
        return run.outcome(folder)


def train(run: Run, folder: Path | None, every: float, progress: Callable[[float], None] | None) -> None:
    """All steps that are left, with checkpoints, then the hooks' end."""
    if run.finished:
        return
    saved = shown = run.clock()
    runner = run.runner
    with entered(hook.train(run.model, run.data) for hook in run.hooks), closing(run):
        gather(run, advance)
        while run.next():
            advance(run)
            run.tracked.tell(run)
            now = run.clock()
            if folder and not run.over and runner.agreed(now - saved) >= every:
                with run.still():
                    run.save(folder)
                saved = run.clock()
            if progress and now - shown >= SHOW:
                progress(run.progress)
                shown = now
        show(run)  # others may have made the last step
        if progress:
            progress(1.0)  # what follows is not training, and is not to be taken for it
    for hook in run.hooks:
        plain = run.data.batches(run.sampler.batch_size)
        hook.end(run.model, (runner.layout(runner.place(batch)) for batch in plain))
    run.watch.look_at_weights(runner.finite(), run.done - 1, run.rate)
    run.spent, run.finished = run.costs(), True
    run.covered = min(run.covered, run.position / len(run.data))  # less where a hook stopped: what continues goes on from here
    run.tracked.tell(run)
    if folder:
        run.save(folder)


def advance(run: Run) -> None:
    """One step: factors, batch, loss and gradients, update."""
    progress = run.progress
    factors = run.factors(progress)
    if run.hooks or factors != run.applied:  # hooks may change a group's entries
        set_factors(run.optimizer, run.bases, factors)
        run.applied = factors
    size = run.size(factors)
    batch, run.position = run.loader.draw(run.position, run.step, size, progress)
    run.watch.see(run.done, run.rate, run.runner.forward_backward(batch))
    run.runner.unscale(run.optimizer)
    for hook in run.watching:
        hook.seen(*run.runner.observed(batch))
    for hook in run.hooks:
        hook.after_backward(run.model, progress)
    run.runner.update(run.optimizer)
    run.done, run.step, run.samples = run.done + 1, run.step + 1, run.samples + size
    for hook in run.hooks:
        hook.after_step(run.model, run.progress)
    show(run)


def show(run: Run) -> None:
    """Give a look to the hooks whose interval is over."""
    now, before = run.progress, run.shown
    run.shown = now
    if due := [h for h in run.looking if math.floor(now / h.interval + 1e-9) > math.floor(before / h.interval + 1e-9)]:
        context = run.setup.context
        quality = cache(lambda: run.quality()) if context.evaluate else None
        with run.still():
            look = Look(now, run.watch.mean, quality, context.metric.gain)
            for hook in due:
                hook.look(run.model, look)
