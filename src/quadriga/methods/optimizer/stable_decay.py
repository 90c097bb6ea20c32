"""Stable weight decay: as strong as gradients are weak, so that it does not die away where they are large."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from quadriga.core.errors import BadInput
from quadriga.core.method import Family, Method, Numerics
from quadriga.core.setup import Setup
from quadriga.methods.optimizer._penalty import rate, skipped, take_over, weights, wrapped

EPS = 1e-8


@dataclass(frozen=True, kw_only=True)
class StableDecay(Method):
    """Decoupled decay divided by the size of gradients: w ← (1 - lr · amount / √v) w before each step, at least 0.

    v is the mean of the squared gradients over all parameters, averaged over steps. With Adam this is AdamS: the same as the
    mean of Adam's own second moments. It takes the place of the optimizer's own weight decay.

    Args:
        amount: positive; a typical gradient of 1e-2 makes 5e-4 a decay of 0.05. It acts on what the optimizer lets decay, and
            if that is nothing, on weights of more than one dimension.
        beta: of the average over steps, in [0, 1); 0 goes by the step's own gradients.

    Source: Xie et al. 2023, arXiv:2011.11152, algorithm 3 (AdamS).
    """

    family = Family.OPTIMIZER
    numerics = Numerics.CHANGED
    source = "arXiv:2011.11152"
    search: ClassVar = {"amount": (5e-4, 5e-5, 5e-3)}
    requires = frozenset({"TRAIN_DATA"})

    amount: float = 5e-4
    beta: float = 0.999

    def __post_init__(self) -> None:
        if not self.amount > 0:
            raise BadInput(f"stable_decay.amount is {self.amount}", "give a positive number")
        if not 0 <= self.beta < 1:
            raise BadInput(f"stable_decay.beta is {self.beta}", "give a number in [0, 1)")

    def apply(self, setup: Setup) -> Setup:
        return wrapped(setup, "l2", self.change)

    def change(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Take over the decay, and stand before each step."""
        own = take_over(optimizer, self.amount)

        def before(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
            if skipped(optimizer) or not any(p.grad is not None for g in optimizer.param_groups for p in g["params"]):
                return
            with torch.no_grad():
                size = self.size(optimizer)
                for group in optimizer.param_groups:
                    if group["l2"] and (chosen := weights(group, own)):
                        torch._foreach_mul_(chosen, (1 - rate(group) * group["l2"] / (size + EPS)).clamp_min(0))

        optimizer.register_step_pre_hook(before)

    def size(self, optimizer: torch.optim.Optimizer) -> Tensor:
        """√v with this step's gradients; the average is kept in the first group, from where checkpoints take it."""
        first, square = optimizer.param_groups[0], mean_square(optimizer)
        before = first.get("gradient_square", torch.zeros_like(square)).to(square)
        first["gradient_square"] = before.lerp(square, 1 - self.beta)
        first["gradient_steps"] = first.get("gradient_steps", 0) + 1
        return (first["gradient_square"] / (1 - self.beta ** first["gradient_steps"])).sqrt()


def mean_square(optimizer: torch.optim.Optimizer) -> Tensor:
    """Mean of all gradients' squares, a scalar on their device.

    Example:
        >>> w = nn.Parameter(torch.zeros(2))
        >>> w.grad = torch.tensor([1.0, 3.0])
        >>> mean_square(torch.optim.SGD([w]))
        tensor(5.)
    """
    grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    return torch.stack(torch._foreach_norm(grads)).square().sum() / sum(g.numel() for g in grads)
