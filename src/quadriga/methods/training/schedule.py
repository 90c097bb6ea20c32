"""Learning-rate schedules: step, exponential, cosine, linear to zero, warm-up–stable–decay, constant; each with warm-up."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from quadriga.core.errors import BadInput
from quadriga.core.method import Family, Method, Numerics
from quadriga.core.setup import Setup
from quadriga.core.slots import Factors


@dataclass(frozen=True, kw_only=True)
class Schedule(Method):
    """Change the learning rate in the course of a train step. With t = the progress after the warm-up, in [0, 1]:

    | kind | factor |
    |---|---|
    | step | gamma ^ (number of milestones ≤ t) |
    | exponential | gamma ^ t |
    | cosine | final + (1 - final) (1 + cos πt) / 2 |
    | linear | 1 - (1 - final) t |
    | wsd | 1 until t = 1 - decay, then linear down to final |
    | constant | 1 |

    Args:
        kind: which.
        warmup: the first part of the train step, in which the rate rises linearly from 0; in [0, 1).
        gamma: of "step", by which each milestone multiplies; of "exponential", the factor at the end. In (0, 1].
        milestones: of "step", each in (0, 1), rising.
        decay: of "wsd", the last part of t, in which the rate falls; in (0, 1].
        final: of "cosine", "linear" and "wsd", the factor at the end; in [0, 1].

    Source: Loshchilov & Hutter 2017, arXiv:1608.03983 (cosine); Bergsma et al. 2025, arXiv:2502.15938 (linear to zero);
    Hägele et al. 2024, arXiv:2405.18392 (WSD); Goyal et al. 2017, arXiv:1706.02677 (step, with warm-up).
    """

    family = Family.TRAINING
    numerics = Numerics.CHANGED
    source = "arXiv:1608.03983, arXiv:2502.15938, arXiv:2405.18392, arXiv:1706.02677"
    search: ClassVar = {"kind": ("linear", "cosine", "wsd", "step", "exponential"), "warmup": (0.0, 0.05)}
    requires = frozenset({"TRAIN_DATA"})

    kind: Literal["step", "exponential", "cosine", "linear", "wsd", "constant"] = "linear"
    warmup: float = 0.0
    gamma: float = 0.1
    milestones: tuple[float, ...] = (0.5, 0.75)
    decay: float = 0.2
    final: float = 0.0

    def __post_init__(self) -> None:
        for name, holds, remedy in (
            ("warmup", 0 <= self.warmup < 1, "give a number in [0, 1)"),
            ("gamma", 0 < self.gamma <= 1, "give a number in (0, 1]"),
            ("milestones", all(0 < m < 1 for m in self.milestones), "give fractions of the train step, in (0, 1)"),
            ("milestones", list(self.milestones) == sorted(set(self.milestones)), "let them rise"),
            ("decay", 0 < self.decay <= 1, "give a number in (0, 1]"),
            ("final", 0 <= self.final <= 1, "give a number in [0, 1]"),
        ):
            if not holds:
                raise BadInput(f"schedule.{name} is {getattr(self, name)}", remedy)

    def apply(self, setup: Setup) -> Setup:
        return replace(setup, training=replace(setup.training, schedules=(*setup.training.schedules, self.factors)))

    def factors(self, progress: float) -> Factors:
        """The factors at a progress in [0, 1].

        Example:
            >>> Schedule(kind="linear", warmup=0.5).factors(0.25).lr, Schedule(kind="linear", warmup=0.5).factors(0.75).lr
            (0.5, 0.5)
        """
        if progress < self.warmup:
            return Factors(lr=progress / self.warmup)
        return Factors(lr=self.after_warmup((progress - self.warmup) / (1 - self.warmup)))

    def after_warmup(self, t: float) -> float:
        """The learning rate's factor at t in [0, 1]."""
        if self.kind == "step":
            return self.gamma ** sum(m <= t for m in self.milestones)
        if self.kind == "exponential":
            return self.gamma**t
        if self.kind == "cosine":
            return self.final + (1 - self.final) * (1 + math.cos(math.pi * t)) / 2
        if self.kind == "linear":
            return 1 - (1 - self.final) * t
        if self.kind == "wsd":
            return 1 - (1 - self.final) * max(0.0, (t - (1 - self.decay)) / self.decay)
        return 1.0
