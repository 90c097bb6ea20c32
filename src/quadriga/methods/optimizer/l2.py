"""L2 regularisation: coupled, in the gradient that the optimizer sees, or decoupled, beside the optimizer."""

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
class L2(Method):
    """Pull weights towards zero in proportion to their size, with any optimizer.

    Plain SGD does the same with both forms. An adaptive optimizer divides a coupled penalty by the size of the gradient, so
    that weights with large gradients hardly shrink; momentum spreads it over the steps that follow.

    Args:
        amount: positive; decoupled, per unit of learning rate.
        form: "coupled": add amount/2 · Σw² to what is minimized, so that the gradient becomes g + amount·w; "decoupled":
            w ← (1 - lr·amount) w, then the step with the gradient alone. Adam becomes AdamW.
        biases: penalize biases and norms (parameters of at most one dimension) too.

    Source: Krogh & Hertz 1991, "A Simple Weight Decay Can Improve Generalization"; decoupled: Loshchilov & Hutter 2019,
    arXiv:1711.05101.
    """

    family = Family.OPTIMIZER
    numerics = Numerics.CHANGED
    source = "https://papers.nips.cc/paper/563-a-simple-weight-decay-can-improve-generalization, arXiv:1711.05101"
    search: ClassVar = {"amount": (5e-4, 1e-4, 2e-3, 0.05), "form": ("coupled", "decoupled")}
    requires = frozenset({"TRAIN_DATA"})

    amount: float = 5e-4
    form: Literal["coupled", "decoupled"] = "coupled"
    biases: bool = False

    def __post_init__(self) -> None:
        if not self.amount > 0:
            raise BadInput(f"l2.amount is {self.amount}", "give a positive number")

    def apply(self, setup: Setup) -> Setup:
        act = add_weights if self.form == "coupled" else decay_weights
        return penalized(setup, "l2", self.amount, "before", self.biases, act)


def add_weights(weights: list[Tensor], group: dict[str, Any]) -> None:
    """Add l2 · w to the gradients."""
    torch._foreach_add_([w.grad for w in weights], weights, alpha=group["l2"])  # type: ignore[misc]


def decay_weights(weights: list[Tensor], group: dict[str, Any]) -> None:
    """Multiply by 1 - lr · l2."""
    torch._foreach_mul_(weights, 1 - rate(group) * group["l2"])
