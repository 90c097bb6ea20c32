"""Shared by the penalties: put a number into an optimizer's groups, where schedules find it, and act on each step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from quadriga.core.errors import NotApplicable
from quadriga.core.setup import Setup

Act = Callable[[list[Tensor], dict[str, Any]], None]  # (parameters that have a gradient, their group)


def penalized(setup: Setup, entry: str, amount: float, when: Literal["before", "after"], biases: bool, act: Act) -> Setup:
    """The setup with its optimizer wrapped: each group gets `entry = amount`, and `act` runs before or after each step.

    Raises:
        NotApplicable: the same penalty is there already.
    """
    inner = setup.optimizer.make
    present: frozenset[str] = getattr(inner, "penalties", frozenset())
    if entry in present:
        raise NotApplicable(f"a penalty {entry} is there already", "give its amount once")

    def hook(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        with torch.no_grad():
            for group in optimizer.param_groups:
                chosen = [p for p in group["params"] if p.grad is not None and (biases or p.dim() > 1)]
                if chosen and group[entry]:
                    act(chosen, group)

    def make(model: nn.Module) -> torch.optim.Optimizer:
        optimizer = inner(model)
        for group in optimizer.param_groups:
            group[entry] = amount
        optimizer.register_step_pre_hook(hook) if when == "before" else optimizer.register_step_post_hook(hook)
        return optimizer

    make.penalties = present | {entry}  # type: ignore[attr-defined]
    return replace(setup, optimizer=replace(setup.optimizer, make=make))
