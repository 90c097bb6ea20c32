"""Learning-rate schedules: step, exponential, polynomial, cosine, linear, one-cycle, WSD, constant; each with warm-up."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from quadriga.core.method import Family, Method, Numerics
from quadriga.core.setup import Setup
from quadriga.core.slots import Factors
from quadriga.methods.training._curves import cosine, plateau_then_line, polynomial, stairs, there_and_back


@dataclass(frozen=True, kw_only=True)
class Schedule(Method):
    """Change the learning rate in the course of a train step. With t = the progress after the warm-up, in [0, 1]:

    | kind | factor |
    |---|---|
    | step | gamma ^ (number of milestones ≤ t) |
    | exponential | gamma ^ t |
    | polynomial | final + (1 - final) (1 - t) ^ power |
    | cosine | final + (1 - final) (1 + cos πt) / 2 |
    | linear | 1 - (1 - final) t |
    | one_cycle | half a cosine from 1 / div up to 1 at t = rise, then another one down to final |
    | wsd | 1 until t = 1 - decay, then linear down to final |
    | constant | 1 |

    "one_cycle" also lowers momentum, or Adam's first beta, to `momentum_low` of its own value at t = rise, and raises it
    again: the optimizer's rate and momentum are the largest ones.

    Args:
        kind: which.
        warmup: the first part of the train step, in which the rate rises linearly from 0 to where the kind begins; in [0, 1).
        gamma: of "step", by which each milestone multiplies; of "exponential", the factor at the end. In (0, 1].
        milestones: of "step", each in (0, 1), rising.
        power: of "polynomial", positive.
        decay: of "wsd", the last part of t, in which the rate falls; in (0, 1].
        final: of "polynomial", "cosine", "linear", "one_cycle" and "wsd", the factor at the end; in [0, 1].
        rise: of "one_cycle", where the rate is largest; in (0, 1).
        div: of "one_cycle", by which the rate is divided at the beginning; at least 1.
        momentum_low: of "one_cycle", the momentum's factor where the rate is largest; in (0, 1].

    Source: Loshchilov & Hutter 2017, arXiv:1608.03983 (cosine); Bergsma et al. 2025, arXiv:2502.15938 (linear to zero);
    Smith & Topin 2018, arXiv:1708.07120 (one-cycle; momentum 0.95 to 0.85: Smith 2018, arXiv:1803.09820);
    Chen et al. 2017, arXiv:1606.00915 (polynomial); Hägele et al. 2024, arXiv:2405.18392 (WSD);
    Goyal et al. 2017, arXiv:1706.02677 (step, with warm-up).
    """

    family = Family.TRAINING
    numerics = Numerics.CHANGED
    source = "arXiv:1608.03983, arXiv:2502.15938, arXiv:1708.07120, arXiv:1606.00915, arXiv:2405.18392, arXiv:1706.02677"
    search: ClassVar = {
        "kind": ("linear", "cosine", "one_cycle", "wsd", "step", "exponential"),
        "warmup": (0.0, 0.05),
    }
    requires = frozenset({"TRAIN_DATA"})

    kind: Literal["step", "exponential", "polynomial", "cosine", "linear", "one_cycle", "wsd", "constant"] = "linear"
    warmup: float = 0.0
    gamma: float = 0.1
    milestones: tuple[float, ...] = (0.5, 0.75)
    power: float = 2.0
    decay: float = 0.2
    final: float = 0.0
    rise: float = 0.3
    div: float = 25.0
    momentum_low: float = 0.895

    def __post_init__(self) -> None:
        self.insist(
            ("warmup", 0 <= self.warmup < 1, "give a number in [0, 1)"),
            ("gamma", 0 < self.gamma <= 1, "give a number in (0, 1]"),
            ("milestones", all(0 < m < 1 for m in self.milestones), "give fractions of the train step, in (0, 1)"),
            ("milestones", list(self.milestones) == sorted(set(self.milestones)), "let them rise"),
            ("power", self.power > 0, "give a positive number"),
            ("decay", 0 < self.decay <= 1, "give a number in (0, 1]"),
            ("final", 0 <= self.final <= 1, "give a number in [0, 1]"),
            ("rise", 0 < self.rise < 1, "give a number in (0, 1)"),
            ("div", self.div >= 1, "give a number of at least 1"),
            ("momentum_low", 0 < self.momentum_low <= 1, "give a number in (0, 1]"),
        )

    def apply(self, setup: Setup) -> Setup:
        return replace(setup, training=replace(setup.training, schedules=(*setup.training.schedules, self.factors)))

    def factors(self, progress: float) -> Factors:
        """The factors at a progress in [0, 1].

        Example:
            >>> Schedule(kind="linear", warmup=0.5).factors(0.25).lr, Schedule(kind="linear", warmup=0.5).factors(0.75).lr
            (0.5, 0.5)
        """
        if progress < self.warmup:
            return self.after_warmup(0.0) * Factors(lr=progress / self.warmup)
        return self.after_warmup((progress - self.warmup) / (1 - self.warmup))

    def after_warmup(self, t: float) -> Factors:
        """The factors at t in [0, 1]."""
        if self.kind != "one_cycle":
            return Factors(lr=self.rate(t))
        rate = there_and_back(t, self.rise, 1 / self.div, 1.0, self.final)
        return Factors(lr=rate, momentum=there_and_back(t, self.rise, 1.0, self.momentum_low, 1.0))

    def rate(self, t: float) -> float:
        """The learning rate's factor at t in [0, 1], of a kind that changes nothing else."""
        if self.kind == "step":
            return stairs(t, self.gamma, self.milestones)
        if self.kind == "exponential":
            return self.gamma**t
        if self.kind == "polynomial":
            return polynomial(t, self.power, self.final)
        if self.kind == "cosine":
            return cosine(t, 1.0, self.final)
        if self.kind == "linear":
            return 1 - (1 - self.final) * t
        return plateau_then_line(t, self.decay, self.final) if self.kind == "wsd" else 1.0
