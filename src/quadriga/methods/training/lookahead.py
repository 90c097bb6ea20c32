"""Lookahead: slow weights follow the fast ones every few steps, and the fast ones return to them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import nn

from quadriga.core.errors import NotApplicable
from quadriga.core.method import Family, Method, Numerics
from quadriga.core.setup import Setup
from quadriga.methods.training._average import Beside, check
from quadriga.methods.training._ending import add_hook


class SlowWeights(Beside):
    """Moves as `Lookahead` says."""

    def __init__(self, method: Lookahead, size: int, model: nn.Module) -> None:
        super().__init__(model, size)
        self.method = method

    def after_step(self, model: nn.Module, progress: float) -> None:
        """Slow weights a part of the way to the fast ones, and these back to them."""
        self.count += 1
        if self.count % self.method.every == 0:
            self.move(self.method.share(progress))
            with torch.no_grad():
                torch._foreach_copy_(self.here(), self.weights)


@dataclass(frozen=True, kw_only=True)
class Lookahead(Method):
    """Every few steps, slow ← slow + a (fast - slow) and fast ← slow, with a = 1 - (1 - alpha) progress ^ power. Looks and the
    finished model have the slow weights. The optimizer keeps its state.

    It is part of the update, so it acts after a step before any other method of the training slot, wherever it stands:
    what projects weights (pruning, clusters) projects those that it set, and averages are of them. A train step that
    continues another goes on from the fast weights, and with power = 0 as if it had been one.

    Args:
        alpha: how far the slow weights go, in (0, 1); with power > 0 at the end only.
        every: steps from one such move to the next, at least 2.
        power: 0 for a constant share; 3, with alpha = 0.226, is airbench's: at first the slow weights follow at once.

    Source: Zhang et al. 2019, arXiv:1907.08610; Jordan 2024, arXiv:2404.00498 (airbench).
    """

    family = Family.TRAINING
    numerics = Numerics.CHANGED
    source = "arXiv:1907.08610, arXiv:2404.00498"
    search: ClassVar = {"alpha": (0.5, 0.8), "every": (5, 10)}
    requires = frozenset({"TRAIN_DATA"})

    alpha: float = 0.5
    every: int = 5
    power: float = 0.0

    def __post_init__(self) -> None:
        self.insist(
            ("alpha", 0 < self.alpha < 1, "give a number in (0, 1)"),
            ("every", self.every >= 2, "give at least 2 steps"),
            ("power", self.power >= 0, "give a number of at least 0"),
        )

    def share(self, progress: float) -> float:
        """How far the slow weights go at a progress in [0, 1].

        Example:
            >>> Lookahead(alpha=0.5).share(0.1), Lookahead(alpha=0.5, power=1.0).share(0.1)
            (0.5, 0.95)
        """
        return 1 - (1 - self.alpha) * progress**self.power

    def apply(self, setup: Setup) -> Setup:
        check(setup, self.name)
        if any(isinstance(make, partial) and make.func is SlowWeights for make in setup.training.make_hooks):
            raise NotApplicable("lookahead stands already", "give its fields once")
        return add_hook(setup, partial(SlowWeights, self, setup.training.batch_size), "first")
