"""Cautious weight decay: weights shrink only where the update too makes them smaller."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from quadriga.core.errors import BadInput, NotApplicable
from quadriga.core.method import Family, Method, Numerics
from quadriga.core.setup import Setup
from quadriga.methods.optimizer._penalty import rate, skipped, take_over, weights, wrapped


@dataclass(frozen=True, kw_only=True)
class CautiousDecay(Method):
    """Decoupled decay of the coordinates whose update agrees in sign: w ← w - lr (u + decay · 1[u w ≥ 0] w).

    It takes the place of the optimizer's own weight decay. The optimizer may be any; its update u is read off the weights
    before and after. In a step this needs memory for three further copies of the weights.

    Args:
        amount: positive, per unit of learning rate; None for the optimizer's own weight_decay. It acts on what the
            optimizer lets decay, and if that is nothing, on weights of more than one dimension.

    Source: Chen et al. 2025, arXiv:2510.12402, algorithm 1.
    """

    family = Family.OPTIMIZER
    numerics = Numerics.CHANGED
    source = "arXiv:2510.12402"
    search: ClassVar = {"amount": (None, 0.1, 0.01)}
    requires = frozenset({"TRAIN_DATA"})

    amount: float | None = None

    def __post_init__(self) -> None:
        if self.amount is not None and not self.amount > 0:
            raise BadInput(f"cautious_decay.amount is {self.amount}", "give a positive number")

    def apply(self, setup: Setup) -> Setup:
        groups = setup.optimizer.make(setup.model).param_groups if self.amount is None else []
        if self.amount is None and not any(group.get("weight_decay") for group in groups):
            raise NotApplicable("the optimizer has no weight decay", "give the field amount")
        return wrapped(setup, "l2", self.change)

    def change(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Take over the decay, and stand around each step."""
        own = take_over(optimizer, self.amount)
        held: list[tuple[list[Tensor], list[Tensor], dict[str, Any]]] = []

        def before(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
            chosen = [(weights(g, own), g) for g in optimizer.param_groups if g["l2"]] if not skipped(optimizer) else []
            held[:] = [(ws, [w.detach().clone() for w in ws], g) for ws, g in chosen if ws]

        def after(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
            with torch.no_grad():
                for ws, olds, group in held:
                    decay_agreeing(ws, olds, rate(group) * group["l2"])
            held.clear()

        optimizer.register_step_pre_hook(before)
        optimizer.register_step_post_hook(after)


def decay_agreeing(weights: list[Tensor], olds: list[Tensor], amount: float) -> None:
    """Take amount · old off each weight that the step moved towards zero, or not at all.

    Example:
        >>> old, new = torch.tensor([1.0, 1.0, -1.0, 1.0]), torch.tensor([0.9, 1.1, -1.1, 1.0])
        >>> decay_agreeing([new], [old], 0.5)
        >>> new
        tensor([ 0.4000,  1.1000, -1.1000,  0.5000])
    """
    agree = torch._foreach_sub(olds, weights)
    torch._foreach_sign_(agree)  # signs, since a product of small numbers may vanish
    torch._foreach_mul_(agree, torch._foreach_sign(olds))
    torch._foreach_add_(agree, 1)
    torch._foreach_clamp_max_(agree, 1)
    torch._foreach_mul_(agree, olds)
    torch._foreach_add_(weights, agree, alpha=-amount)
