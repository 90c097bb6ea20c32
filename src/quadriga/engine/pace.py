"""What a training step costs: a few steps of each setup, in turn."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from typing import Any

from torch import Tensor, nn

from quadriga.core import cuda
from quadriga.core.batch import Batch
from quadriga.core.copies import copy_model
from quadriga.core.data import Data
from quadriga.core.recipe import Recipe
from quadriga.core.setup import Setup
from quadriga.core.slots import Hook
from quadriga.train.loop import fit

STEPS, ROUNDS = 8, 3


@dataclass
class Clocked(Hook):
    """Notes the time after each step.

    Args:
        device: waited for before the clock is read.
        clock: seconds.
        times: so far.
        examples: of each step so far.
    """

    device: str
    clock: Callable[[], float]
    times: list[float] = field(default_factory=list)
    examples: list[int] = field(default_factory=list)

    def seen(self, batch: Batch, losses: Tensor) -> None:
        """Note how many examples it has."""
        self.examples.append(len(batch))

    def after_step(self, model: nn.Module, progress: float) -> None:
        """Note the time, with nothing under way on the device."""
        cuda.synchronize(self.device)
        self.times.append(self.clock())


def paced(
    setups: Sequence[Setup],
    data: Data,
    *,
    steps: int = STEPS,
    rounds: int = ROUNDS,
    seconds: float = math.inf,
    seed: int = 0,
    clock: Callable[[], float] | None = None,
) -> list[float]:
    """Seconds that each setup's training takes per example, on copies of their models.

    Every run goes from progress 0 to 1 in a few steps, so that what changes in the course of training, such as the size of
    images, counts with its share. Of each step the fastest of all rounds counts: it is the same step of the same batch.

    Args:
        setups: as they stand before a train step.
        data: to learn from.
        steps: of each run; the first is not counted.
        rounds: in each of which all setups run once, in turn.
        seconds: after which no further round begins; where steps are so slow that two rounds would take longer, they are
            fewer, at least 3.
        seed: of data order and transforms.
        clock: seconds; by default processor time on a CPU and wall time elsewhere.

    Returns:
        one number for each setup; their ratios can be trusted more than their values.
    """
    copies = [replace(s, model=copy_model(s.model)) for s in setups]
    runs: list[list[tuple[list[float], int]]] = [[] for _ in copies]
    start = time.monotonic()
    if seconds < math.inf:
        _run(copies[0], data, 2, seed, clock)
        steps = max(3, min(steps, int(seconds / (len(copies) * max(time.monotonic() - start, 1e-9)))))
    for number in range(rounds):
        if number and time.monotonic() - start > seconds:
            break
        for found, setup in zip(runs, copies, strict=True):
            found.append(_run(setup, data, steps, seed, clock))
    return [sum(map(min, zip(*(times for times, _ in found), strict=True))) / found[0][1] for found in runs]


def _run(setup: Setup, data: Data, steps: int, seed: int, clock: Callable[[], float] | None) -> tuple[list[float], int]:
    """Seconds of each step after the first, and the examples of all these."""
    device = setup.runtime.device
    clocked = Clocked(device, clock or (time.process_time if device == "cpu" else time.perf_counter))

    def start(model: nn.Module) -> Hook:  # once more where the loss was not finite and training begins again
        clocked.times.clear()
        clocked.examples.clear()
        return clocked

    hooks = (*(partial(_blind, make) for make in setup.training.make_hooks), start)
    entries = steps * min(setup.training.batch_size, len(data))
    alone = replace(setup.training, make_hooks=hooks, asynchronous=None)  # workers add processes, and save no processor time
    fit(replace(setup, training=alone), data, epochs=entries / len(data), seed=seed)
    return [b - a for a, b in pairwise(clocked.times)], sum(clocked.examples[1:])


def _blind(make: Callable[[nn.Module], Hook], model: nn.Module) -> Hook:
    """Without looks: they are far apart, and would crowd into these few steps."""
    hook = make(model)
    hook.interval = 0.0
    return hook


class Paces:
    """What a recipe's train steps cost per example against the baseline's training.

    Args:
        recipe: whose train steps are noted on a walk; the baseline's own training at its start costs what it costs there.
        baseline: the recipe.
        plain: its setup before its train step.
        data: to learn from.
        seed: of data order and transforms.
    """

    def __init__(self, recipe: Recipe, baseline: Recipe, plain: Setup, data: Data, seed: int) -> None:
        self.recipe, self.plain, self.data, self.seed = recipe, plain, data, seed
        self.fixed = len(baseline.steps) if recipe.steps[: len(baseline.steps)] == baseline.steps else 0
        self.arms: list[tuple[float, Setup | None]] = []  # epochs and setup; None: as the baseline

    def note(self, setup: Setup, index: int) -> None:
        """A train step stands there: keep its setup as it is now."""
        own = replace(setup, model=copy_model(setup.model)) if index >= self.fixed else None
        self.arms.append((float(self.recipe.steps[index].fields.get("epochs", 10)), own))

    def ratio(self, seconds: float) -> float:
        """Its cost per example over the baseline's, timed in turn for about so many seconds; 1 where nothing is its own."""
        if all(setup is None for _, setup in self.arms):
            return 1.0
        base, mine = self._means(rounds=ROUNDS, seconds=seconds)
        return mine / base

    def blocks(self, count: int, seconds: float = math.inf) -> dict[str, list[float]]:
        """Seconds per example in so many blocks, of the "baseline" and of the "recipe", in turn; after one to warm up.

        They end in about `seconds`, by fewer steps in each block.
        """
        each = seconds / (count + 1)
        found = [self._means(rounds=1, seconds=each, backward=bool(number % 2)) for number in range(count + 1)][1:]
        return {"baseline": [base for base, _ in found], "recipe": [mine for _, mine in found]}

    def _means(self, backward: bool = False, **options: Any) -> tuple[float, float]:
        """Seconds per example of the baseline, and of the recipe over its epochs."""
        own = [self.plain, *(setup for _, setup in self.arms if setup is not None)]
        order = -1 if backward else 1
        times = paced(own[::order], self.data, seed=self.seed, **options)[::order]
        mine, weights = iter(times[1:]), sum(epochs for epochs, _ in self.arms)
        total = sum(epochs * (times[0] if setup is None else next(mine)) for epochs, setup in self.arms)
        return times[0], total / weights if weights else times[0]
