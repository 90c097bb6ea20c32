"""Dynamic decay: weight decay and penalties change in the course of a train step, with the learning rate or without it."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import nn

from quadriga.core.errors import NotApplicable
from quadriga.core.method import Family, Method, Numerics
from quadriga.core.setup import Setup
from quadriga.core.slots import Factors, Hook

DECAYS = ("weight_decay", "l1", "l2", "group_l1")


@dataclass(frozen=True, kw_only=True)
class DecaySchedule(Method):
    """Multiply weight decay, l1, l2 and group_l1 by a factor that goes from 1 to `final` over the train step.

    With t = progress, the factor is 1 + (final - 1) s, or final ^ t for "exponential":

    | kind | s |
    |---|---|
    | constant | 0 |
    | linear | t |
    | cosine | (1 - cos πt) / 2 |
    | step | share of the milestones that are ≤ t |
    | late | 0 until t = 1 - part, then rising linearly to 1 |

    Args:
        kind: which; "exponential" needs a positive `final`.
        final: the factor at the end, at least 0; above 1 the decay grows.
        milestones: of "step", each in (0, 1), rising.
        part: of "late", the last part of the train step; in (0, 1].
        follow: "rate": a step pulls by rate · decay, as optimizers do, so that the pull falls with the rate; "alone": it pulls
            by first rate · decay, whatever becomes of the rate (where that is 0, nothing moves). For decays that are
            decoupled, and SGD's: in the gradient of an adaptive optimizer a larger decay is no stronger pull.

    Source: Xie et al. 2023, arXiv:2011.11152 (scheduled weight decay); Loshchilov & Hutter 2019, arXiv:1711.05101 (decay that
    the schedule of the rate does not reach), and Wortsman et al. 2023, arXiv:2309.14322, section 3.2.3.
    """

    family = Family.OPTIMIZER
    numerics = Numerics.CHANGED
    source = "arXiv:2011.11152, arXiv:1711.05101, arXiv:2309.14322"
    search: ClassVar = {
        "kind": ("cosine", "linear", "step", "late", "constant"),
        "final": (0.0, 0.1, 3.0),
        "follow": ("rate", "alone"),
    }
    requires = frozenset({"TRAIN_DATA"})

    kind: Literal["cosine", "linear", "exponential", "step", "late", "constant"] = "cosine"
    final: float = 0.0
    milestones: tuple[float, ...] = (0.5, 0.75)
    part: float = 0.2
    follow: Literal["rate", "alone"] = "rate"

    def __post_init__(self) -> None:
        inside = all(0 < m < 1 for m in self.milestones) and list(self.milestones) == sorted(set(self.milestones))
        self.insist(
            ("final", self.final >= 0, "give a number of at least 0"),
            ("final", self.kind != "exponential" or self.final > 0, "exponential needs a positive one"),
            ("milestones", self.milestones and inside, "give fractions of the train step, in (0, 1) and rising"),
            ("part", 0 < self.part <= 1, "give a number in (0, 1]"),
        )

    def apply(self, setup: Setup) -> Setup:
        if self.kind == "constant" and self.follow == "rate":
            raise NotApplicable(
                "a constant decay with the rate is what there is already", 'use follow = "alone", or another kind'
            )
        groups = setup.optimizer.make(setup.model).param_groups
        if not any(group.get(entry) for group in groups for entry in DECAYS):
            raise NotApplicable("nothing decays: the optimizer has no weight decay, l1 or l2", "put one of them before it")
        slot = replace(setup.optimizer, schedules=(*setup.optimizer.schedules, self.factors))
        if self.follow == "alone":
            if RateFree in slot.make_hooks:
                raise NotApplicable("the decay is independent of the rate already", 'use follow = "rate"')
            slot = replace(slot, make_hooks=(*slot.make_hooks, RateFree))
        return replace(setup, optimizer=slot)

    def factors(self, progress: float) -> Factors:
        """The factors at a progress in [0, 1].

        Example:
            >>> DecaySchedule(kind="linear", final=3.0).factors(0.5)
            Factors(lr=1.0, momentum=1.0, decay=2.0, batch=1.0)
        """
        if self.kind == "exponential":
            return Factors(decay=self.final**progress)
        return Factors(decay=1 + (self.final - 1) * self.share(progress))

    def share(self, t: float) -> float:
        """s of the table."""
        if self.kind == "linear":
            return t
        if self.kind == "cosine":
            return (1 - math.cos(math.pi * t)) / 2
        if self.kind == "step":
            return sum(m <= t for m in self.milestones) / len(self.milestones)
        if self.kind == "late":
            return max(0.0, (t - (1 - self.part)) / self.part)
        return 0.0


class RateFree(Hook):
    """Divides each group's decays by the factor of its rate, once the loop has set both for the step.

    Args:
        model: whose parameters the optimizer moves.
        optimizer: with the rates that it was made with.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer, self.rates = optimizer, [float(group["lr"]) for group in optimizer.param_groups]

    def after_backward(self, model: nn.Module, progress: float) -> None:
        """Penalties before and after the step find what this leaves."""
        for group, first in zip(self.optimizer.param_groups, self.rates, strict=True):
            if group["lr"]:
                for entry in DECAYS:
                    if entry in group:
                        group[entry] *= first / group["lr"]
