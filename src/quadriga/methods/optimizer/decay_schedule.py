"""Dynamic decay: weight decay, l1 and l2 change in the course of a train step."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from quadriga.core.errors import BadInput, NotApplicable
from quadriga.core.method import Family, Method, Numerics
from quadriga.core.setup import Setup
from quadriga.core.slots import Factors

DECAYS = ("weight_decay", "l1", "l2")


@dataclass(frozen=True, kw_only=True)
class DecaySchedule(Method):
    """Multiply weight decay, l1 and l2 by a factor that goes from 1 to `final` over the train step.

    Args:
        kind: "cosine", "linear" or "exponential" (which needs a positive `final`).
        final: the factor at the end, at least 0; above 1 the decay grows.

    Source: Xie et al. 2023, arXiv:2011.11152 (scheduled weight decay).
    """

    family = Family.OPTIMIZER
    numerics = Numerics.CHANGED
    source = "arXiv:2011.11152"
    search: ClassVar = {"kind": ("cosine", "linear"), "final": (0.0, 0.1, 3.0)}
    requires = frozenset({"TRAIN_DATA"})

    kind: Literal["cosine", "linear", "exponential"] = "cosine"
    final: float = 0.0

    def __post_init__(self) -> None:
        if self.final < 0 or (self.kind == "exponential" and self.final == 0):
            raise BadInput(f"decay_schedule.final is {self.final}", "give a number of at least 0, positive for exponential")

    def apply(self, setup: Setup) -> Setup:
        groups = setup.optimizer.make(setup.model).param_groups
        if not any(group.get(entry) for group in groups for entry in DECAYS):
            raise NotApplicable("nothing decays: the optimizer has no weight decay, l1 or l2", "put one of them before it")
        return replace(setup, optimizer=replace(setup.optimizer, schedules=(*setup.optimizer.schedules, self.factors)))

    def factors(self, progress: float) -> Factors:
        """The factors at a progress in [0, 1].

        Example:
            >>> DecaySchedule(kind="linear", final=3.0).factors(0.5)
            Factors(lr=1.0, momentum=1.0, decay=2.0)
        """
        if self.kind == "exponential":
            return Factors(decay=self.final**progress)
        t = progress if self.kind == "linear" else (1 - math.cos(math.pi * progress)) / 2
        return Factors(decay=1 + (self.final - 1) * t)
