"""Stochastic weight averaging: the uniform mean of the weights in the last part of training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

from torch import nn

from quadriga.core.data import Data
from quadriga.core.errors import BadInput
from quadriga.core.method import Family, Method, Numerics
from quadriga.core.setup import Setup
from quadriga.methods.training._average import Average, check_average
from quadriga.methods.training._ending import add_hook


class UniformAverage(Average):
    """Averages as `Swa` says; `number` weights so far, over `late` steps since the start of the average."""

    def __init__(self, method: Swa, size: int, model: nn.Module) -> None:
        super().__init__(model, size)
        self.method, self.number, self.late = method, 0, 0

    @property
    def known(self) -> bool:  # type: ignore[override]
        """Before the first weights there is no mean of them."""
        return self.number > 0

    def begin(self, model: nn.Module, data: Data) -> None:
        """A train step that continues another has a last part of its own."""
        if self.raw is not None:
            self.number = self.late = 0
        super().begin(model, data)

    def after_step(self, model: nn.Module, progress: float) -> None:
        """One more term of the mean if it is due."""
        self.count += 1
        if progress < self.method.start:
            return
        if self.late % self.method.every == 0:
            self.number += 1
            self.move(1 / self.number)
        self.late += 1

    def state_dict(self) -> dict[str, Any]:
        """How far the mean is."""
        return {**super().state_dict(), "number": self.number, "late": self.late}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """As it was."""
        super().load_state_dict(state)
        self.number, self.late = state["number"], state["late"]


@dataclass(frozen=True, kw_only=True)
class Swa(Method):
    """Average the weights after the steps of the last part of training, all with equal weight. Looks from then on and the
    finished model have the average, with batch statistics that are estimated anew for it; looks before that have the trained
    weights.

    It gains most while the rate is still large, so that the weights move about: with a schedule that ends at zero they stand
    still where they would be averaged. A train step that continues another goes on from the trained weights, and averages in
    its own last part. Which methods to put before it is as for `ema`.

    Args:
        start: the progress from which weights are averaged, in [0, 1).
        every: steps from one set of weights to the next.

    Source: Izmailov et al. 2018, arXiv:1803.05407.
    """

    family = Family.TRAINING
    numerics = Numerics.CHANGED
    source = "arXiv:1803.05407"
    search: ClassVar = {"start": (0.75, 0.5, 0.9)}
    requires = frozenset({"TRAIN_DATA"})

    start: float = 0.75
    every: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.start < 1:
            raise BadInput(f"swa.start is {self.start}", "give a part of the train step, in [0, 1)")
        if self.every < 1:
            raise BadInput(f"swa.every is {self.every}", "give at least 1 step")

    def apply(self, setup: Setup) -> Setup:
        check_average(setup, self.name)
        return add_hook(setup, partial(UniformAverage, self, setup.training.batch_size))
