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
Change = Callable[[nn.Module, torch.optim.Optimizer], None]


def penalized(setup: Setup, entry: str, amount: float, when: Literal["before", "after"], biases: bool, act: Act) -> Setup:
    """The setup with its optimizer wrapped: each group gets `entry = amount`, and `act` runs before or after each step.

    Raises:
        NotApplicable: the same penalty is there already.
    """

    def hook(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if skipped(optimizer):
            return
        with torch.no_grad():
            for group in optimizer.param_groups:
                if group[entry] and (chosen := weights(group, biases)):
                    act(chosen, group)

    def change(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        for group in optimizer.param_groups:
            group[entry] = amount
        optimizer.register_step_pre_hook(hook) if when == "before" else optimizer.register_step_post_hook(hook)

    return wrapped(setup, entry, change)


def wrapped(setup: Setup, entry: str, change: Change) -> Setup:
    """The setup whose optimizer is changed when it is made; `entry` is what its groups get.

    Raises:
        NotApplicable: a penalty with this entry is there already.
    """
    inner = setup.optimizer.make
    present: frozenset[str] = getattr(inner, "penalties", frozenset())
    if entry in present:
        raise NotApplicable(f"a penalty {entry} is there already", "give its amount once")

    def make(model: nn.Module) -> torch.optim.Optimizer:
        optimizer = inner(model)
        change(model, optimizer)
        return optimizer

    make.penalties = present | {entry}  # type: ignore[attr-defined]
    return replace(setup, optimizer=replace(setup.optimizer, make=make))


def weights(group: dict[str, Any], biases: bool) -> list[Tensor]:
    """The parameters of a group that have a gradient; biases and norms, of at most one dimension, if they are to count."""
    return [p for p in group["params"] if p.grad is not None and (biases or p.dim() > 1)]


def rate(group: dict[str, Any]) -> float:
    """The learning rate of a group; Prodigy multiplies it by a distance that it estimates."""
    return float(group["lr"]) * float(group.get("d", 1.0))


def skipped(optimizer: torch.optim.Optimizer) -> bool:
    """Whether scaled gradients overflowed. Torch leaves this to fused optimizers, and calls their hooks all the same."""
    found = getattr(optimizer, "found_inf", None)
    return found is not None and bool(found)


def take_over(optimizer: torch.optim.Optimizer, amount: float | None) -> bool:
    """Let the groups' entry l2 take the place of their weight_decay, with the same amount or another.

    Returns:
        whether there was one, so that the groups say what decays; else biases and norms are to be left out.
    """
    own = any(group.get("weight_decay") for group in optimizer.param_groups)
    for group in optimizer.param_groups:
        was = group.get("weight_decay", 0.0)
        group["l2"] = 0.0 if own and not was else was if amount is None else amount
        if "weight_decay" in group:
            group["weight_decay"] = 0.0
    return own
