"""The training loop: one for everything. `fit` trains a setup's model, resumes what was killed, continues what was done."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from quadriga.core.data import Data
from quadriga.core.errors import BadInput, NotApplicable
from quadriga.core.setup import Setup
from quadriga.train import rng
from quadriga.train.checkpoint import State, read_state, save_state
from quadriga.train.config import check_same, config_of, machine
from quadriga.train.data import Loader, Sampler, count_steps
from quadriga.train.factors import group_bases, set_factors
from quadriga.train.outcome import Outcome, Watch
from quadriga.train.step import Runner, entered, prepared

WINDOW = 32  # steps between looks at the loss where a look has to wait for the device
SHOW = 0.5  # seconds between calls of `progress`


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

    Raises:
        Diverged: the loss became NaN or infinite.
        BadInput: a checkpoint is of another run, or damaged with no good state before it.
        NotApplicable: the model or the optimizer is another one than at `start`.
    """
    if not (math.isfinite(epochs) and epochs > 0):
        raise BadInput(f"epochs is {epochs!r}", "give a positive number")
    folder = Path(checkpoint) if checkpoint else None
    with rng.isolated(), prepared(setup) as runner:
        run = Run(setup, data, runner, epochs, seed, clock)
        if start:
            run.begin(Path(start))
        run.settle()
        if folder and (state := read_state(folder, fall_back=True)):
            run.resume(state, folder)
        if not run.finished:
            run.train(folder, every, progress)
        return run.outcome(folder)


class Run:
    """The moving state of one train step.

    `done` and `total` count its own steps; `step`, `position` and `covered` count steps, samples and epochs
    over all train steps that continue one another.
    """

    def __init__(self, setup: Setup, data: Data, runner: Runner, epochs: float, seed: int, clock: Callable[[], float]) -> None:
        rng.seed_all(rng.derive("global", seed))
        self.setup, self.data, self.runner, self.epochs, self.seed, self.clock = setup, data, runner, epochs, seed, clock
        self.model = setup.model
        self.optimizer = setup.optimizer.make(self.model)
        self.bases = group_bases(self.optimizer)
        self.schedules = (*setup.training.schedules, *setup.optimizer.schedules)
        self.hooks = tuple(make(self.model) for make in setup.training.make_hooks)
        self.sampler = Sampler(len(data), setup.training.batch_size, seed)
        self.loader = Loader(data, self.sampler, setup.training.transforms, runner.place, runner.layout)
        self.watch = Watch(1 if runner.device.type == "cpu" else WINDOW)
        self.done = self.samples = self.step = self.position = 0
        self.covered, self.origin, self.note, self.finished = 0.0, "", "", False
        self.spent, self.since = (0.0, 0.0), (clock(), time.process_time())

    def begin(self, folder: Path) -> None:
        """Take over from a finished train step."""
        state = read_state(folder)
        extra = state.extra if state else {}
        if state is None or not extra["finished"]:
            raise BadInput(f"{folder} holds no finished checkpoint", "finish that train step first")
        try:
            self.load(state, extra)
        except BadInput as error:
            raise NotApplicable(f"train cannot continue: {error.problem}", "train anew after such a step") from error
        self.origin, self.step = state.digest, extra["step"]
        self.covered, self.position = extra["covered"], extra["position"]
        if extra["config"]["examples"] != len(self.data):  # other data: their stream goes on at the next whole epoch
            self.covered = float(math.ceil(self.covered))
            self.position = int(self.covered) * len(self.data)
        if extra["config"]["seed"] != self.seed:
            rng.seed_all(rng.derive("global", self.seed))

    def settle(self) -> None:
        """Fix the number of steps, and what a resumption has to share."""
        self.total = count_steps(len(self.data), self.sampler.batch_size, self.epochs, self.covered, self.position)
        self.covered += self.epochs
        self.config = config_of(self.setup, self.optimizer, self.bases, self.hooks, len(self.data))
        self.config |= {"epochs": float(self.epochs), "seed": self.seed, "start": self.origin}

    def resume(self, state: State, folder: Path) -> None:
        """Go on where a state of this same run stands."""
        extra = state.extra
        notes = check_same(self.config, machine(), extra, str(folder))
        self.load(state, extra)
        self.done, self.samples, self.step, self.position = (extra[k] for k in ("done", "samples", "step", "position"))
        self.finished, self.spent = extra["finished"], extra["spent"]
        self.watch.recent.extend(extra["recent"])
        self.note = "; ".join(filter(None, [extra["note"], state.note, *([] if self.finished else notes)]))

    def load(self, state: State, extra: dict[str, Any]) -> None:
        """Weights, optimizer, hooks and generators of a state."""
        state.load_model(self.model)
        state.load_optimizer(self.model, self.optimizer)
        for hook, (name, kept) in zip(self.hooks, extra["hooks"], strict=False):
            if type(hook).__qualname__ == name:
                hook.load_state_dict(kept)
        rng.restore(extra["rng"])

    def train(self, folder: Path | None, every: float, progress: Callable[[float], None] | None) -> None:
        """All steps that are left, with checkpoints, then the hooks' end."""
        saved = shown = self.clock()
        with entered(hook.train(self.model, self.data) for hook in self.hooks):
            while self.done < self.total:
                self.advance()
                now = self.clock()
                if folder and now - saved >= every and self.done < self.total:
                    self.save(folder)
                    saved = self.clock()
                if progress and now - shown >= SHOW:
                    progress(self.done / self.total)
                    shown = now
        for hook in self.hooks:
            plain = self.data.batches(self.sampler.batch_size)
            hook.end(self.model, (self.runner.layout(self.runner.place(batch)) for batch in plain))
        self.watch.look_at_weights(self.model, self.done - 1, self.rate)
        self.spent, self.finished = self.costs(), True
        if folder:
            self.save(folder)

    @property
    def rate(self) -> float:
        """The learning rate now."""
        return float(self.optimizer.param_groups[0]["lr"])

    def advance(self) -> None:
        """One step: factors, batch, loss and gradients, update."""
        progress = self.done / self.total
        if self.schedules:
            set_factors(self.optimizer, self.bases, self.schedules, progress)
        batch = self.loader.batch(self.position, self.step)
        self.watch.see(self.done, self.rate, self.runner.forward_backward(batch))
        for hook in self.hooks:
            hook.after_backward(self.model, progress)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.done, self.step = self.done + 1, self.step + 1
        self.samples, self.position = self.samples + len(batch), self.position + self.sampler.batch_size
        for hook in self.hooks:
            hook.after_step(self.model, self.done / self.total)

    def costs(self) -> tuple[float, float]:
        """Wall and processor seconds, over all resumptions."""
        if self.finished:
            return self.spent
        return self.spent[0] + self.clock() - self.since[0], self.spent[1] + time.process_time() - self.since[1]

    def save(self, folder: Path) -> None:
        """Write the complete state."""
        self.watch.look()  # weights that an infinite loss made are not worth keeping
        counts = {k: getattr(self, k) for k in ("done", "samples", "step", "position", "covered", "finished", "note")}
        hooks = [(type(h).__qualname__, h.state_dict()) for h in self.hooks]
        facts = {"config": self.config, "machine": machine(), "recent": list(self.watch.recent), "spent": self.costs()}
        save_state(folder, self.model, self.optimizer, {**counts, **facts, "hooks": hooks, "rng": rng.capture()})

    def outcome(self, folder: Path | None) -> Outcome:
        """The report."""
        return Outcome(self.samples, self.done, *self.spent, self.watch.mean, folder, self.note, self.hooks)
