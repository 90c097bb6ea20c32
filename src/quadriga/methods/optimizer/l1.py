"""L1 regularisation: weights shrink by a constant amount, and the proximal form makes them exactly zero."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from quadriga.core.errors import BadInput
from quadriga.core.method import Family, Method, Numerics
from quadriga.core.setup import Setup
from quadriga.methods.optimizer._penalty import penalized, rate


@dataclass(frozen=True, kw_only=True)
class L1(Method):
    """Add amount · Σ|w| to what is minimized.

    Averages of weights (schedule-free, `ema`, `swa`) end with small values where the proximal form alone has zeros.

    Args:
        amount: positive, per unit of learning rate.
        form: "proximal": after the update, w ← sign(w) max(|w| - lr·amount, 0), which gives exact zeros;
            "subgradient": amount · sign(w) joins the gradient before the update, which hovers about zero.
        biases: penalize biases and norms (parameters of at most one dimension) too.

    Source: Tibshirani 1996, doi:10.1111/j.2517-6161.1996.tb02080.x; proximal: Parikh & Boyd 2014, section 6.5.2.
    """

    family = Family.OPTIMIZER
    numerics = Numerics.CHANGED
    source = "https://doi.org/10.1561/2400000003"
    search: ClassVar = {"amount": (1e-5, 1e-4, 1e-3)}
    requires = frozenset({"TRAIN_DATA"})

    amount: float = 1e-5
    form: Literal["proximal", "subgradient"] = "proximal"
    biases: bool = False

    def __post_init__(self) -> None:
        if not self.amount > 0:
            raise BadInput(f"l1.amount is {self.amount}", "give a positive number")

    def apply(self, setup: Setup) -> Setup:
        if self.form == "proximal":
            return penalized(setup, "l1", self.amount, "after", self.biases, shrink_weights)
        return penalized(setup, "l1", self.amount, "before", self.biases, add_signs)


def soft_threshold(weights: list[Tensor], threshold: float) -> None:
    """w ← sign(w) max(|w| - threshold, 0), in place, as w less its own clipped value.

    Example:
        >>> w = torch.tensor([2.0, -0.5, -1.5])
        >>> soft_threshold([w], 1.0)
        >>> w
        tensor([ 1.0000,  0.0000, -0.5000])
    """
    clipped = torch._foreach_clamp_max(weights, threshold)
    torch._foreach_clamp_min_(clipped, -threshold)
    torch._foreach_sub_(weights, clipped)


def shrink_weights(weights: list[Tensor], group: dict[str, Any]) -> None:
    """Soft-threshold in place at lr · l1."""
    soft_threshold(weights, rate(group) * group["l1"])


def add_signs(weights: list[Tensor], group: dict[str, Any]) -> None:
    """Add l1 · sign(w) to the gradients."""
    torch._foreach_add_([w.grad for w in weights], torch._foreach_sign(weights), alpha=group["l1"])  # type: ignore[misc]
