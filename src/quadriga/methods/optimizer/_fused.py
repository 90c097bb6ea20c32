"""Shared by our own optimizers: torch's AdamW in its fastest form, and gradients as tensors that it takes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

State = dict[str, Any]
FUSED = frozenset(("cpu", "cuda", "xpu", "mps"))  # devices of which torch has fused optimizers


def with_gradient(group: State) -> list[Tensor]:
    """The parameters of a group that have a gradient; sparse ones are made dense."""
    chosen = [p for p in group["params"] if p.grad is not None]
    for p in chosen:
        if p.grad.is_sparse:
            p.grad = p.grad.to_dense()
    return chosen


def adamw_step(
    params: Sequence[Tensor], grads: Sequence[Tensor], means: Sequence[Tensor], states: Sequence[State], group: State,
    betas: Sequence[float], decay: float,
) -> None:  # fmt: skip
    """One step of torch's functional AdamW, in place on `params`; `states` hold exp_avg_sq and step.

    Args:
        params, grads, means: parameters, their gradients and the gradients' running means.
        states: of the parameters.
        group: gives lr and eps.
        betas: of the running means.
        decay: decoupled.
    """
    if not params:
        return
    complex_ = any(p.is_complex() for p in params)
    fused = not complex_ and all(p.device.type in FUSED for p in params)
    squares, counts = [s["exp_avg_sq"] for s in states], [s["step"] for s in states]
    adamw(
        list(params), list(grads), list(means), squares, [], counts,
        foreach=False if fused or complex_ else None, fused=fused, has_complex=complex_, amsgrad=False, maximize=False,
        beta1=betas[0], beta2=betas[1], lr=group["lr"], weight_decay=decay, eps=group["eps"],
    )  # fmt: skip


def begin(p: Tensor) -> State:
    """The state of a parameter before its first step; a fused kernel counts steps where the parameter is."""
    device = p.device if p.device.type in FUSED and not p.is_complex() else torch.device("cpu")
    kept = torch.preserve_format
    return {"step": torch.zeros((), device=device), "exp_avg_sq": torch.zeros_like(p, memory_format=kept)}


def value_of(closure: Callable[[], Any] | None) -> Any:
    """The loss of a closure, or None without one."""
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()
