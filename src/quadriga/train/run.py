"""One train step's moving state: opened, saved, resumed, reported."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from quadriga.core import rng
from quadriga.core.batch import keeping_mode
from quadriga.core.data import Data
from quadriga.core.errors import BadInput, NotApplicable
from quadriga.core.setup import Setup
from quadriga.core.slots import PLAIN, Factors, Hook
from quadriga.parallel.board import Staleness
from quadriga.parallel.share import Share
from quadriga.train.checkpoint import State
from quadriga.train.config import check_same, config_of, machine
from quadriga.train.data import Loader, Sampler, count_steps
from quadriga.train.factors import group_bases, product
from quadriga.train.feed import Feed, home_of, resident
from quadriga.train.outcome import Outcome, Watch
from quadriga.train.step import Runner, entered
from quadriga.train.track import Tracked

if TYPE_CHECKING:
    from quadriga.train.seat import Seat

WINDOW = 32  # steps between looks at the loss where a look has to wait for the device


class Run:
    """The moving state of one train step.

    `done` counts its own steps and `samples` the examples they saw; `step`, `position` and `covered` count steps, entries of
    the stream and epochs over all train steps that continue one another. It is over when `span` entries are behind `begun`.
    A `crew` are the workers that make steps too, which then say whose the next batch is.
    """

    def __init__(
        self, setup: Setup, data: Data, runner: Runner, epochs: float, seed: int, clock: Callable[[], float],
        slower: float = 1.0, spent: tuple[float, float] = (0.0, 0.0),
    ) -> None:  # fmt: skip
        rng.seed_all(rng.derive("global", seed))
        self.setup, self.data, self.runner, self.epochs, self.seed, self.clock = setup, data, runner, epochs, seed, clock
        self.model, training = runner.model, setup.training
        self.optimizer = setup.optimizer.make(self.model)
        self.bases = group_bases(self.optimizer)
        self.schedules = (*training.schedules, *setup.optimizer.schedules)
        self.hooks: tuple[Hook, ...] = (
            *(make(self.model, self.optimizer) for make in setup.optimizer.make_hooks),
            *(make(self.model) for make in training.make_hooks),
        )
        runner.accept(self.optimizer, self.hooks)
        self.watching, self.looking = overriding(self.hooks, "seen"), [h for h in self.hooks if h.interval]
        here, selects = resident(data, runner.device), [h.select for h in overriding(self.hooks, "select")]
        home = torch.device("cpu") if selects else home_of(here)  # what chooses looks at indices, and must not wait for them
        self.sampler = Sampler(len(data), training.batch_size, seed, home)
        whole = Share() if training.transforms else runner.share  # a transform draws for the batch as one
        feed = None if here.resident else Feed(here, seed, None if selects else self.upcoming, runner.device, whole)
        self.loader = Loader(here, self.sampler, training.transforms, runner.place, runner.layout, selects, feed, runner.share)
        self.tracked = Tracked(None)
        self.watch = Watch(1 if runner.device.type == "cpu" else WINDOW)
        self.done = self.samples = self.step = self.position = self.begun = 0
        self.applied: Factors | None = None  # that the optimizer's groups have now
        self.covered, self.origin, self.note, self.finished, self.shown = 0.0, "", "", False, 0.0
        self.crew: Seat | None = None
        self.staleness = Staleness()
        self.slower, self.spent, self.since = slower, spent, (clock(), time.process_time())

    def opened(self, start: str | Path | None, folder: Path | None) -> Run:
        """At its start, or where the folder's checkpoint stands."""
        if start:
            self.begin(Path(start))
        self.settle()
        if not start:
            self.runner.part()
        if folder and (state := self.runner.read(folder, fall_back=True)):
            self.resume(state, folder)
        return self

    def begin(self, folder: Path) -> None:
        """Take over from a finished train step."""
        state = self.runner.read(folder)
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
        """Fix the length, and what a resumption has to share."""
        steps = count_steps(len(self.data), self.sampler.batch_size, self.epochs, self.covered, self.position)
        self.begun, self.span = self.position, steps * self.sampler.batch_size
        self.covered += self.epochs
        self.shown = self.progress
        self.machine = machine(self.setup.runtime.device)
        self.config = config_of(self.setup, self.optimizer, self.runner.groups(self.optimizer), self.hooks, len(self.data))
        self.config |= {"epochs": float(self.epochs), "seed": self.seed, "start": self.origin}

    def resume(self, state: State, folder: Path) -> None:
        """Go on where a state of this same run stands."""
        extra = state.extra
        notes = check_same(self.config, self.machine, extra, str(folder))
        self.load(state, extra)
        self.done, self.samples, self.step, self.position = (extra[k] for k in ("done", "samples", "step", "position"))
        self.finished, self.slower = extra["finished"], min(self.slower, extra["slower"])
        self.spent = max(self.spent, tuple(extra["spent"]))
        self.shown, self.staleness = self.progress, Staleness.of_state(extra.get("staleness"))
        self.watch.recent.extend(extra["recent"])
        self.note = "; ".join(filter(None, [extra["note"], state.note, *([] if self.finished else notes)]))

    def load(self, state: State, extra: dict[str, Any]) -> None:
        """Weights, optimizer, hooks and generators of a state."""
        state.load_model(self.model)
        state.load_optimizer(self.model, self.optimizer)
        for hook, (name, kept) in zip(self.hooks, extra["hooks"], strict=False):
            if type(hook).__qualname__ == name:
                hook.load_state_dict(kept)
        self.runner.load_state(extra["runner"])
        self.runner.restore(extra["rng"])

    def next(self) -> bool:
        """Whether there is another step to make; if so, the run stands where its batch begins."""
        return not self.over if self.crew is None else self.crew.claim(self)

    def still(self) -> AbstractContextManager[None]:
        """Entered to look at the weights or to keep them, while nobody changes them."""
        return nullcontext() if self.crew is None else self.crew.still(self)

    def close(self) -> None:
        """Whatever runs beside the loop ends."""
        if self.crew is not None:
            self.crew.close(self)
        self.loader.close()

    @property
    def progress(self) -> float:
        """Of this train step, in [0, 1]."""
        return self.progress_at(self.position)

    def progress_at(self, position: int) -> float:
        """The progress that a position of the stream stands for."""
        return min(1.0, (position - self.begun) / self.span)

    @property
    def over(self) -> bool:
        """Whether its length is done, or a hook wants to stop."""
        return self.position - self.begun >= self.span or any(hook.stopped for hook in self.hooks)

    @property
    def rate(self) -> float:
        """The learning rate now."""
        return float(self.optimizer.param_groups[0]["lr"])

    def factors(self, progress: float) -> Factors:
        """Of all schedules at a progress, and of the hooks now."""
        total = product(self.schedules, progress) if self.schedules else PLAIN
        if self.slower != 1:
            total = total * Factors(lr=self.slower)
        for hook in self.hooks:
            if hook.factors is not PLAIN:
                total = total * hook.factors
        return total

    def size(self, factors: Factors) -> int:
        """Of a batch under these factors."""
        return min(max(1, round(self.sampler.batch_size * factors.batch)), self.sampler.length)

    def upcoming(self, position: int) -> Tensor:
        """Indices [batch] of the batch that starts at a position, unless hooks change their mind; none after the last."""
        if position - self.begun >= self.span:
            return torch.empty(0, dtype=torch.int64)
        size = self.size(self.factors(self.progress_at(position)))
        return self.sampler.indices(position, size)

    def quality(self) -> float:
        """Of the model as the hooks want it evaluated, on val."""
        evaluate = self.setup.context.evaluate
        assert evaluate is not None
        shown = entered(hook.eval(self.model) for hook in self.hooks)
        with keeping_mode(self.model), shown, self.runner.evaluated() as whole:
            found = self.runner.agreed(evaluate(whole))
        self.tracked.log(self.done, {"quality": found})
        return found

    def costs(self) -> tuple[float, float]:
        """Wall and processor seconds, over all resumptions."""
        if self.finished:
            return self.spent
        helped = 0.0 if self.crew is None else self.crew.helped
        return self.spent[0] + self.clock() - self.since[0], self.spent[1] + helped + time.process_time() - self.since[1]

    def save(self, folder: Path) -> None:
        """Write the complete state."""
        self.watch.look()  # weights that an infinite loss made are not worth keeping
        names = ("done", "samples", "step", "position", "covered", "finished", "note", "slower")
        hooks = [(type(h).__qualname__, h.state_dict()) for h in self.hooks]
        facts = {"config": self.config, "machine": self.machine, "recent": list(self.watch.recent), "spent": self.costs()}
        if self.setup.training.asynchronous is not None:
            facts["staleness"] = self.stale.state()
        extra = {**{k: getattr(self, k) for k in names}, **facts, "hooks": hooks, "runner": self.runner.state()}
        self.runner.save(folder, self.optimizer, {**extra, "rng": self.runner.generators()})

    def outcome(self, folder: Path | None) -> Outcome:
        """The report."""
        wanted = self.setup.training.asynchronous
        stale = None if wanted is None else self.stale.among(self.done)
        told = stale.told(wanted.workers) if wanted and stale and self.stale.updates else ""
        notes = (self.note, self.loader.feed.note if self.loader.feed else "", self.tracked.note, told)
        note = "; ".join(filter(None, notes))
        plain = None if stale is None else stale.plain()
        return Outcome(self.samples, self.done, *self.spent, self.watch.mean, folder, note, self.hooks, plain)

    @property
    def stale(self) -> Staleness:
        """Of the updates so far, those that are not finished included."""
        return self.staleness if self.crew is None else self.staleness + self.crew.staleness


def overriding(hooks: Iterable[Hook], name: str) -> list[Hook]:
    """The hooks that have a method of this name of their own, so that nobody pays for one that does nothing."""
    return [h for h in hooks if getattr(type(h), name) is not getattr(Hook, name)]
