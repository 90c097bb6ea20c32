"""How schedules act on an optimizer: their factors multiply the values that its groups started with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from quadriga.core.slots import Factors, Schedule
from quadriga.train.state import DRIVEN

DECAYS = ("weight_decay", "l1", "l2", "group_l1")


def group_bases(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """The entries of each group that schedules drive, as the optimizer was made."""
    return [{k: v for k, v in group.items() if k in DRIVEN} for group in optimizer.param_groups]


def product(schedules: Sequence[Schedule], progress: float) -> Factors:
    """The product of all schedules' factors at a progress in [0, 1]."""
    total = Factors()
    for schedule in schedules:
        total = total * schedule(progress)
    return total


def set_factors(optimizer: torch.optim.Optimizer, bases: Sequence[Mapping[str, Any]], factors: Factors) -> None:
    """Set every group to base · factor: the rate, the momentum or first beta, and the decays."""
    for group, base in zip(optimizer.param_groups, bases, strict=True):
        group["lr"] = base["lr"] * factors.lr
        if "momentum" in base:
            group["momentum"] = base["momentum"] * factors.momentum
        if "betas" in base:
            group["betas"] = (base["betas"][0] * factors.momentum, *base["betas"][1:])
        for name in DECAYS:
            if name in base:
                group[name] = base[name] * factors.decay
