"""Muon: momentum made orthogonal for matrices between hidden units, AdamW for everything else, in one optimizer."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from quadriga.methods.optimizer._fused import adamw_step, begin, value_of, with_gradient

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic that takes singular values towards one
STEPS, TINY = 5, 1e-7


def orthogonal(x: Tensor, steps: int = STEPS) -> Tensor:
    """U V^T of each matrix U S V^T, roughly: singular values come to lie between 0.7 and 1.2.

    A step X ← (a + b A + c A²) X with A = X Xᵀ.

    Args:
        x: [count, m, n], m ≤ n.
        steps: of the Newton-Schulz iteration.

    Source: Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/

    Example:
        >>> values = torch.linalg.svdvals(orthogonal(torch.randn(1, 8, 16)))
        >>> bool((values > 0.6).all() and (values < 1.3).all())
        True
    """
    a, b, c = COEFFICIENTS
    x = x / x.flatten(1).norm(dim=1).clamp(min=TINY)[:, None, None]
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


def rate_factor(rows: int, columns: int) -> float:
    """By which an orthogonal update is multiplied to have the size of AdamW's, so that its rate and decay serve.

    Source: Liu et al. 2025, arXiv:2502.16982; "match_rms_adamw" of torch.optim.Muon.
    """
    return 0.2 * math.sqrt(max(rows, columns))


def compute_type(p: Tensor) -> torch.dtype:
    """In which the iteration is computed."""
    if p.dtype is torch.float64:
        return p.dtype
    return torch.bfloat16 if p.device.type == "cuda" else torch.float32


class Muon(torch.optim.Optimizer):
    """Groups with `matrix=True` take the orthogonalised momentum, the others AdamW; each with its own lr and decay.

    Args:
        groups: of parameters; those of matrices have at least two dimensions, of which the first is the rows.
        lr: learning rate, in AdamW's measure for both.
        momentum: Nesterov's, of matrices.
        betas: of AdamW.
        eps: of AdamW.
    """

    def __init__(
        self, groups: Iterable[dict[str, Any]], lr: float, momentum: float, betas: Sequence[float], eps: float
    ) -> None:
        super().__init__(list(groups), {"lr": lr, "weight_decay": 0.0, "eps": eps, "matrix": False})
        for group in self.param_groups:
            group |= {"momentum": momentum} if group["matrix"] else {"betas": tuple(betas), "fused": True}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update."""
        loss = value_of(closure)
        for group in self.param_groups:
            (self._matrices if group["matrix"] else self._others)(group, with_gradient(group))
        return loss

    def _others(self, group: dict[str, Any], params: list[Tensor]) -> None:
        for p in params:
            if not self.state[p]:
                self.state[p] = {**begin(p), "exp_avg": torch.zeros_like(p, memory_format=torch.preserve_format)}
        states = [self.state[p] for p in params]
        grads, means = [p.grad for p in params], [s["exp_avg"] for s in states]
        adamw_step(params, grads, means, states, group, group["betas"], group["weight_decay"])  # type: ignore[arg-type]

    def _matrices(self, group: dict[str, Any], params: list[Tensor]) -> None:
        if not params:
            return
        for p in params:
            if not self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p, memory_format=torch.preserve_format)
        grads, held = [p.grad for p in params], [self.state[p]["momentum_buffer"] for p in params]
        torch._foreach_lerp_(held, grads, 1 - group["momentum"])  # type: ignore[arg-type]
        updates = torch._foreach_lerp(grads, held, group["momentum"])  # type: ignore[arg-type]
        if group["weight_decay"]:
            torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
        buckets: dict[Any, list[tuple[Tensor, Tensor]]] = {}
        for p, update in zip(params, updates, strict=True):
            flat = update.flatten(1)
            wide = flat if flat.shape[0] <= flat.shape[1] else flat.mT
            buckets.setdefault((wide.shape, p.dtype, p.device), []).append((p, wide))
        for bucket in buckets.values():
            move(bucket, group["lr"])


def move(bucket: Sequence[tuple[Tensor, Tensor]], lr: float) -> None:
    """Orthogonalise updates of equal shape together, and take them off their parameters."""
    first, wide = bucket[0]
    results = orthogonal(torch.stack([u for _, u in bucket]).to(compute_type(first))).to(first.dtype)
    params = [p for p, _ in bucket]
    turned = [(u if len(p) == len(u) else u.mT).reshape(p.shape) for p, u in zip(params, results, strict=True)]
    torch._foreach_add_(params, turned, alpha=-lr * rate_factor(*wide.shape))
