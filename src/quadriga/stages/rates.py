"""The learning-rate range test: the rate rises until the loss blows up; the way there says which rates are good."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from quadriga.core.batch import Batch
from quadriga.core.errors import BadInput, Diverged
from quadriga.core.recipe import Recipe
from quadriga.core.setup import Setup
from quadriga.core.slots import Factors, Hook, OptimizerSlot
from quadriga.core.workload import Workload
from quadriga.engine.walk import walk
from quadriga.stages.verbs import checked
from quadriga.train.loop import fit

LOWEST, HIGHEST, STEPS = 1e-6, 100.0, 160  # twenty steps a decade
MEMORY = 0.9  # of the smoothed loss, per step
BLOWN = 4.0  # times the smallest smoothed loss


@dataclass(frozen=True)
class Suggestion:
    """What a range test says.

    Args:
        steepest: the rate at which the loss fell fastest; None where it never fell.
        largest: a tenth of the rate at which the loss blew up, or of the largest tried.
        blown: that rate; None where it did not come to that.
        smoothed: the losses, smoothed, up to there.
    """

    steepest: float | None
    largest: float
    blown: float | None
    smoothed: tuple[float, ...]


def smooth(losses: Sequence[float], memory: float = MEMORY) -> list[float]:
    """The exponential moving average, bias-corrected: a constant stays what it is.

    Example:
        >>> [round(x, 3) for x in smooth([2.0, 2.0, 8.0], 0.5)]
        [2.0, 2.0, 5.429]
    """
    found, mean = [], 0.0
    for step, loss in enumerate(losses, 1):
        mean = memory * mean + (1 - memory) * loss
        found.append(mean / (1 - memory**step))
    return found


def blown_at(losses: Sequence[float], smoothed: Sequence[float]) -> int | None:
    """The first step whose loss is not finite, or smoothed is beyond `BLOWN` times the smallest before it.

    Losses that come close to zero, or are negative, are measured by a hundredth of the first.
    """
    least = math.inf
    for step, (loss, level) in enumerate(zip(losses, smoothed, strict=True)):
        if not math.isfinite(loss):
            return step
        least = min(least, level)
        if level > least + (BLOWN - 1) * max(abs(least), 0.01 * abs(losses[0])):
            return step
    return None


def suggest(rates: Sequence[float], losses: Sequence[float]) -> Suggestion:
    """Rates that a range test speaks for. Smith 2017, arXiv:1506.01186.

    Args:
        rates: rising, one per step.
        losses: seen at these rates.

    Example:
        >>> suggest([1e-3, 1e-2, 1e-1, 1.0], [2.0, 2.0, 1.0, 50.0]).blown
        1.0
    """
    smoothed = smooth(losses)
    end = blown_at(losses, smoothed)
    kept = smoothed[:end]
    blown = None if end is None else rates[end]
    return Suggestion(_steepest(rates, kept), (rates[-1] if blown is None else blown) / 10, blown, tuple(kept))


def _steepest(rates: Sequence[float], smoothed: Sequence[float], span: int = 5) -> float | None:
    """The middle of the steepest fall over 2·span + 1 steps before the minimum, if the loss fell by more than it shook.

    A smoothed loss is a mean of losses that are memory / (1 - memory) steps older; the rate is that of those.
    """
    least = min(range(len(smoothed)), key=lambda k: smoothed[k], default=0)
    start = len(rates) // 10  # the first means are of a few losses
    shaken = max(smoothed[: start + 1], default=0.0) - min(smoothed[: start + 1], default=0.0)
    places = range(max(span, start), min(len(smoothed) - span, least + 1))
    if not places or smoothed[start] - smoothed[least] <= shaken:
        return None
    slopes = {k: (smoothed[k + span] - smoothed[k - span]) / math.log(rates[k + span] / rates[k - span]) for k in places}
    return rates[max(0, min(slopes, key=lambda k: slopes[k]) - round(MEMORY / (1 - MEMORY)))]


class Watcher(Hook):
    """Keeps the losses, and ends the train step when they have blown up."""

    def __init__(self, losses: list[float]) -> None:
        self.losses, self.stopped = losses, bool(losses)  # a run that went back after a loss not finite has nothing to do

    def seen(self, batch: Batch, losses: Tensor) -> None:
        self.losses.append(float(losses.mean()))
        self.stopped = blown_at(self.losses, smooth(self.losses)) is not None


def learning_rates(
    workload: Workload, *, batch: int | None = None, steps: int = STEPS, seed: int = 0, progress: Any = None
) -> dict[str, Any]:
    """Train a fresh model for some steps under the baseline recipe's optimizer while the rate rises from 1e-6 to 100.

    Args:
        workload: whose training it is; what its baseline does before the first train step is done.
        batch: the batch size; the workload's by default.
        steps: from the lowest rate to the highest.
        seed: of weights and order.
        progress: called with plain data.

    Returns:
        The suggestions, and "series": rate, loss and smoothed loss of every step.

    Raises:
        BadInput: there is nothing to learn from, or the optimizer's rate is not positive.
    """
    say = progress or (lambda event: None)
    checked(workload, say)
    if workload.train is None:
        raise BadInput("the workload has no training data", "give train= examples")
    if steps < 10 or (batch is not None and batch < 1):
        raise BadInput(f"{steps} steps with a batch of {batch}", "give at least 10 steps and a positive batch")
    setup = _opened(workload, seed)
    size = min(batch or setup.training.batch_size, len(workload.train))
    base = _base(setup)
    losses: list[float] = []
    setup = _rising(replace(setup, training=replace(setup.training, batch_size=size)), base, losses)
    say({"stage": "profile", "text": f"training for {steps} steps of {size} examples while the rate rises"})
    with suppress(Diverged):  # of the weights, after the last step: the series has its losses
        fit(
            setup, workload.train, epochs=steps * size / len(workload.train), seed=seed,
            progress=lambda part: say({"stage": "profile", "text": f"{part:.0%} of the rates"}),
        )  # fmt: skip
    rates = [base * _factor(step / steps, base) for step in range(steps)]
    if len(losses) < steps and blown_at(losses, smooth(losses)) is None:
        losses.append(math.inf)  # the loop saw it and did not pass it on
    return {"workload": workload.name, "batch": size, **_told(rates[: len(losses)], losses)}


def _opened(workload: Workload, seed: int) -> Setup:
    recipe = workload.baseline or Recipe()
    first = next((i for i, s in enumerate(recipe.steps) if s.is_train), None)
    return walk(workload, recipe, seed=seed, store=None, until=first).setup


def _base(setup: Setup) -> float:
    base = float(setup.optimizer.make(setup.model).param_groups[0]["lr"])
    if not base > 0:
        raise BadInput(f"the optimizer's learning rate is {base:g}", "give it a positive one")
    return base


def _factor(progress: float, base: float) -> float:
    return LOWEST / base * (HIGHEST / LOWEST) ** progress


def _rising(setup: Setup, base: float, losses: list[float]) -> Setup:
    """The rate rises in place of all schedules; hooks act on, but see no quality, which would cost more than the test."""

    def quiet(hook: Hook) -> Hook:
        hook.interval = 0.0
        return hook

    training, optimizer = setup.training, setup.optimizer
    hooks = tuple(lambda model, make=make: quiet(make(model)) for make in training.make_hooks)
    rise = lambda progress: Factors(lr=_factor(progress, base))  # noqa: E731
    watch = lambda model: Watcher(losses)  # noqa: E731
    return replace(
        setup,
        training=replace(training, schedules=(rise,), make_hooks=(*hooks, watch)),
        optimizer=OptimizerSlot(optimizer.make, (), optimizer.make_hooks),
    )


def _told(rates: Sequence[float], losses: Sequence[float]) -> dict[str, Any]:
    found, level = suggest(rates, losses), smooth(losses)
    series = [{"rate": r, "loss": x, "smoothed": s} for r, x, s in zip(rates, losses, level, strict=True)]
    return {
        "steepest_descent": found.steepest,
        "largest_stable": found.largest,
        "blew_up_at": found.blown,
        "steps": len(series),
        "series": series,
    }
