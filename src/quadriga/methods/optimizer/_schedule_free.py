"""Schedule-free AdamW and SGD: an average of the iterates takes the place of a falling rate."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from quadriga.core.batch import Batch, device_of
from quadriga.core.data import Data
from quadriga.core.norms import BATCH_NORMS, reestimate
from quadriga.core.slots import Hook
from quadriga.methods.optimizer._fused import adamw_step, begin, value_of, with_gradient

BATCHES, SIZE = 16, 128  # of training examples, from which a look in the middle of training takes its batch statistics


class ScheduleFree(torch.optim.Optimizer):
    """Gradients are taken at y = (1 - β) z + β x, where z takes the steps and x is the average of z.

    At step t, x ← (1 - c) x + c z with c = w / Σw and w = tʳ · lrᵖ: the rate is that of the group at that step, so that a
    warm-up counts for little. The parameters hold y in training and x after `eval()`; z is state. Decay is taken at y.

    Args:
        groups: of parameters.
        lr: learning rate.
        betas: β, in (0, 1), and of the squared gradients. What a schedule makes of β takes effect at the next step.
        eps: added to the root of the squared gradients.
        adaptive: AdamW's steps for z, or SGD's.
        r: the power of t in the weights of the average.
        weight_lr_power: p.

    Source: Defazio et al. 2024, arXiv:2405.15682, algorithm 1.
    """

    def __init__(
        self, groups: Iterable[dict[str, Any]], lr: float, betas: Sequence[float], eps: float,
        adaptive: bool = True, r: float = 0.0, weight_lr_power: float = 2.0,
    ) -> None:  # fmt: skip
        shared = {"adaptive": adaptive, "fused": True, "eps": eps, "r": r, "weight_lr_power": weight_lr_power}
        moving = {"beta": float(betas[0]), "count": 0, "weight_sum": 0.0, "training": True}
        super().__init__(list(groups), {"lr": lr, "betas": tuple(betas), "weight_decay": 0.0, **shared, **moving})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update; the parameters hold y before and after."""
        loss = value_of(closure)
        for group in self.param_groups:
            assert group["training"], "the optimizer was left in eval()"
            if params := with_gradient(group):
                self._update(group, params, share(group))
        return loss

    def _update(self, group: dict[str, Any], params: list[Tensor], c: float) -> None:
        for p in params:
            if not self.state[p]:
                self.state[p] = {"z": p.clone(memory_format=torch.preserve_format), **(begin(p) if group["adaptive"] else {})}
        states = [self.state[p] for p in params]
        zs, beta, lr = [s["z"] for s in states], group["beta"], group["lr"]
        torch._foreach_lerp_(params, zs, 1 - 1 / beta)  # y → x
        decay = group["weight_decay"] * (1 - beta)  # z ← z (1 - lr·decay) - lr·(decay of y)·β·x, in two factors
        if group["weight_decay"]:
            torch._foreach_add_(zs, params, alpha=-lr * group["weight_decay"] * beta / (1 - lr * decay))
        grads: list[Tensor] = [p.grad for p in params]  # type: ignore[misc]
        if group["adaptive"]:  # β₁ = 0 makes the gradient its own mean
            adamw_step(zs, grads, grads, states, group, (0.0, group["betas"][1]), decay)
        else:
            torch._foreach_mul_(zs, 1 - lr * decay)
            torch._foreach_add_(zs, grads, alpha=-lr)
        group["beta"] = group["betas"][0] or beta  # 0 would forget x
        torch._foreach_lerp_(params, zs, 1 - group["beta"] * (1 - c))  # x → the new y

    def eval(self) -> None:
        """Let the parameters hold x."""
        self._swap(False)

    def train(self) -> None:
        """Let the parameters hold y."""
        self._swap(True)

    @torch.no_grad()
    def _swap(self, training: bool) -> None:
        for group in self.param_groups:
            known = [p for p in group["params"] if "z" in self.state[p]]
            if group["training"] is not training and known:
                weight = 1 - group["beta"] if training else 1 - 1 / group["beta"]
                torch._foreach_lerp_(known, [self.state[p]["z"] for p in known], weight)
            group["training"] = training


def share(group: dict[str, Any]) -> float:
    """Count a step; c, the weight of its z in the average."""
    group["count"] += 1
    weight = group["count"] ** group["r"] * group["lr"] ** group["weight_lr_power"]
    group["weight_sum"] += weight
    return float(weight / group["weight_sum"]) if group["weight_sum"] else 0.0


class Averaged(Hook):
    """Trains with y, evaluates and ends with x and batch statistics taken for it.

    Args:
        model: whose parameters the optimizer moves.
        optimizer: `ScheduleFree`.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        assert isinstance(optimizer, ScheduleFree)
        self.optimizer = optimizer
        self.data: Data | None = None

    @contextmanager
    def train(self, model: nn.Module, data: Data) -> Iterator[None]:
        """From where a finished train step left off, back to y."""
        self.data = data
        self.optimizer.train()
        yield

    @contextmanager
    def eval(self, model: nn.Module) -> Iterator[None]:
        """x and its batch statistics for a while; afterwards all is as before to the bit."""
        training = any(group["training"] for group in self.optimizer.param_groups)
        norms = [b for m in model.modules() if isinstance(m, BATCH_NORMS) for b in m.buffers(recurse=False)]
        kept = [(t, t.detach().clone()) for t in (*model.parameters(), *norms)]
        self.optimizer.eval()
        try:
            reestimate(model, self._some(model))
            yield
        finally:
            if training:
                self.optimizer.train()
            with torch.no_grad():
                for tensor, value in kept:
                    tensor.copy_(value)

    def _some(self, model: nn.Module) -> Iterator[Batch]:
        """A few batches from all over the split."""
        count = min(len(self.data), BATCHES * SIZE) if self.data is not None else 0
        for index in torch.arange(count).split(SIZE):
            assert self.data is not None
            yield self.data.batch(index * len(self.data) // count).to(device_of(model))

    def end(self, model: nn.Module, data: Iterable[Batch]) -> None:
        """The model that is handed on has x."""
        self.optimizer.eval()
        reestimate(model, data)
