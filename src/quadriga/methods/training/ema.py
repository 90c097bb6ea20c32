"""Exponential moving average of the weights, which the model is evaluated with and ends with."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from torch import nn

from quadriga.core.errors import BadInput
from quadriga.core.method import Family, Method, Numerics
from quadriga.core.setup import Setup
from quadriga.methods.training._average import Average, check_average
from quadriga.methods.training._ending import add_hook


def decay_at(step: int, decay: float, every: int = 1) -> float:
    """What an update after so many steps keeps of the average: min(decay, step / (9 + step)) ^ every.

    Example:
        >>> decay_at(1, 0.999), decay_at(100_000, 0.5, every=2)
        (0.1, 0.25)
    """
    return min(decay, step / (9 + step)) ** every


class ExponentialAverage(Average):
    """Follows the weights as `Ema` says."""

    def __init__(self, method: Ema, size: int, model: nn.Module) -> None:
        super().__init__(model, size)
        self.method = method

    def after_step(self, model: nn.Module, progress: float) -> None:
        """One more update if it is due."""
        self.count += 1
        if self.count % self.method.every == 0:
            self.move(1 - decay_at(self.count, self.method.decay, self.method.every))


@dataclass(frozen=True, kw_only=True)
class Ema(Method):
    """Average the weights over the last steps: a ← d a + (1 - d) w after each, with d = min(decay, (1 + t) / (10 + t)) at
    step t = 0, 1, …, so that the start is forgotten soon. Looks and the finished model have the average, with batch statistics
    that are estimated anew for it. Training itself goes on with the trained weights, in a step that continues this one too.

    It reads the weights as the methods before it leave them after a step. What prunes, clusters or lowers a rank belongs
    before it: the average of weights in such a form has that form (an average of zeros, or of values that are shared). A
    weight that is zero when the average is shown is zero there as well, so weights that fade in training are gone in either
    order. `early_stopping` acts behind it wherever it stands, since it chooses among the averages; `lookahead` before it.

    Args:
        decay: d, in (0, 1); the average reaches back about 1 / (1 - d) steps.
        every: steps from one update to the next, which then keeps d ^ every.

    Source: Polyak & Juditsky 1992; Tarvainen & Valpola 2017, arXiv:1703.01780; Morales-Brotons et al. 2024,
    arXiv:2411.18704.
    """

    family = Family.TRAINING
    numerics = Numerics.CHANGED
    source = "arXiv:1703.01780, arXiv:2411.18704"
    search: ClassVar = {"decay": (0.99, 0.999, 0.95)}
    requires = frozenset({"TRAIN_DATA"})

    decay: float = 0.99
    every: int = 1

    def __post_init__(self) -> None:
        if not 0 < self.decay < 1:
            raise BadInput(f"ema.decay is {self.decay}", "give a number in (0, 1)")
        if self.every < 1:
            raise BadInput(f"ema.every is {self.every}", "give at least 1 step")

    def apply(self, setup: Setup) -> Setup:
        check_average(setup, self.name)
        return add_hook(setup, partial(ExponentialAverage, self, setup.training.batch_size))
