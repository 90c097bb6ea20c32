"""L2 regularisation, coupled: the penalty's gradient joins the loss's before the optimizer sees it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from quadriga.core.errors import BadInput
from quadriga.core.method import Family, Method, Numerics
from quadriga.core.setup import Setup
from quadriga.methods.optimizer._penalty import penalized


@dataclass(frozen=True, kw_only=True)
class L2(Method):
    """Add amount/2 · Σw² to what is minimized, so that the gradient becomes g + amount·w.

    With SGD this is weight decay; an adaptive optimizer divides it by the gradient's size, which is why
    `optimizer(kind="adamw", weight_decay=…)` is another method.

    Args:
        amount: positive.
        biases: penalize biases and norms (parameters of at most one dimension) too.

    Source: Krogh & Hertz 1991, "A Simple Weight Decay Can Improve Generalization"; against decoupled decay:
    Loshchilov & Hutter 2019, arXiv:1711.05101.
    """

    family = Family.OPTIMIZER
    numerics = Numerics.CHANGED
    source = "https://papers.nips.cc/paper/563-a-simple-weight-decay-can-improve-generalization"
    search: ClassVar = {"amount": (5e-4, 1e-4, 2e-3)}
    requires = frozenset({"TRAIN_DATA"})

    amount: float = 5e-4
    biases: bool = False

    def __post_init__(self) -> None:
        if not self.amount > 0:
            raise BadInput(f"l2.amount is {self.amount}", "give a positive number")

    def apply(self, setup: Setup) -> Setup:
        return penalized(setup, "l2", self.amount, "before", self.biases, add_weights)


def add_weights(weights: list[Tensor], group: dict[str, Any]) -> None:
    """Add l2 · w to the gradients."""
    torch._foreach_add_([w.grad for w in weights if w.grad is not None], weights, alpha=group["l2"])
