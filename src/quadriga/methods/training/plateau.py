"""Plateau: lower the learning rate when training no longer improves."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

from torch import nn

from quadriga.core.errors import NotApplicable
from quadriga.core.method import Family, Method, Numerics
from quadriga.core.setup import Setup
from quadriga.core.slots import Factors, Hook, Look
from quadriga.methods.training._ending import add_hook


class Lowering(Hook):
    """Lowers its factor as `Plateau` says.

    Attributes:
        best: loss or quality so far.
        waited: looks since.
    """

    spreads = True

    def __init__(self, method: Plateau, model: nn.Module) -> None:
        self.method, self.interval = method, method.interval
        self.best: float | None = None
        self.waited, self.factors = 0, Factors()

    def look(self, model: nn.Module, look: Look) -> None:
        """Compare with the best so far."""
        value = self.value(look)
        if not math.isfinite(value):  # no loss was read yet
            return
        better = self.best is None or self.improvement(value, self.best, look) > 0
        self.best, self.waited = (value, 0) if better else (self.best, self.waited + 1)
        if self.waited > self.method.patience:
            self.factors, self.waited = Factors(lr=max(self.factors.lr * self.method.factor, self.method.smallest)), 0

    def value(self, look: Look) -> float:
        """What is watched."""
        if self.method.of == "loss":
            return look.loss
        assert look.quality is not None
        return look.quality()

    def improvement(self, value: float, best: float, look: Look) -> float:
        """How much better than the best and the threshold."""
        if self.method.of == "loss":
            return best * (1 - self.method.threshold) - value
        return look.gain(value, best) - self.method.threshold

    def state_dict(self) -> dict[str, Any]:
        """The factor, and what it depends on."""
        return {"best": self.best, "waited": self.waited, "lr": self.factors.lr}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """As it was."""
        self.best, self.waited, self.factors = state["best"], state["waited"], Factors(lr=state["lr"])


@dataclass(frozen=True, kw_only=True)
class Plateau(Method):
    """Multiply the learning rate by a factor each time that loss or quality has not improved for more than `patience` looks.
    The factor multiplies those of schedules, and a train step that continues another goes on with it.

    Args:
        of: "loss", the mean of the last 100 training losses, which lags by as many steps; or "quality" on val, which costs an
            evaluation a look.
        factor: what the rate is multiplied by each time, in (0, 1).
        patience: looks without an improvement that are let pass.
        interval: of progress, from one look to the next; in (0, 1].
        threshold: the improvement that counts: of "loss", relative to the best; of "quality", in the metric's unit.
        smallest: the product of the factors does not fall below it, in [0, 1).

    Source: torch.optim.lr_scheduler.ReduceLROnPlateau, https://docs.pytorch.org/docs/stable/optim.html.
    """

    family = Family.TRAINING
    numerics = Numerics.CHANGED
    source = "https://docs.pytorch.org/docs/stable/generated/torch.optim.lr_scheduler.ReduceLROnPlateau.html"
    search: ClassVar = {"factor": (0.3, 0.1), "patience": (3, 6), "of": ("loss", "quality")}
    requires = frozenset({"TRAIN_DATA"})

    of: Literal["loss", "quality"] = "loss"
    factor: float = 0.1
    patience: int = 3
    interval: float = 0.02
    threshold: float = 1e-4
    smallest: float = 0.0

    def __post_init__(self) -> None:
        self.insist(
            ("factor", 0 < self.factor < 1, "give a number in (0, 1)"),
            ("patience", self.patience >= 0, "give a number of looks"),
            ("interval", 0 < self.interval <= 1, "give a part of the train step, in (0, 1]"),
            ("threshold", self.threshold >= 0, "give a number of at least 0"),
            ("smallest", 0 <= self.smallest < 1, "give a number in [0, 1)"),
        )

    def apply(self, setup: Setup) -> Setup:
        if self.of == "quality" and setup.context.evaluate is None:
            raise NotApplicable("nobody measures quality on val here", 'watch of = "loss"')
        return add_hook(setup, partial(Lowering, self))
