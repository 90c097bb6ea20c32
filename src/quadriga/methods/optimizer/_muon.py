"""Muon: momentum made orthogonal for matrices between hidden units, AdamW for everything else, in one optimizer."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from quadriga.methods.optimizer._fused import adamw_step, begin, value_of, with_gradient

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic that takes singular values towards one
STEPS, TINY = 5, 1e-7
WIDE = 128  # rows from which bfloat16 pays on processors that have it


def orthogonal(x: Tensor, steps: int = STEPS) -> Tensor:
    """U Vᵀ of each matrix U S Vᵀ, roughly: singular values come to lie between 0.7 and 1.2.

    A step is X ← P X with P = a + b A + c A² and A = X Xᵀ. All P and A are polynomials of the first A and commute, so for wide
    matrices the steps are taken on A ← P A P alone, and the product of all P meets X once: 0.4 to 0.7 of the work from
    n = 2m on. In bfloat16 A is taken anew after two steps, before the small singular values drown.

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
    if x.shape[2] < 2 * x.shape[1]:
        for _ in range(steps):
            gram = x @ x.mT
            x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
        return x
    for stage in (min(2, steps), max(0, steps - 2)) if x.dtype is torch.bfloat16 else (steps,):
        x = several(x, stage)
    return x


def several(x: Tensor, steps: int) -> Tensor:
    """Steps of the iteration for wide matrices [count, m, n], on their products [count, m, m]."""
    a, b, c = COEFFICIENTS
    gram, product = x @ x.mT, None
    for left in reversed(range(steps)):
        factor = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        factor.diagonal(dim1=1, dim2=2).add_(a)
        product = factor if product is None else factor @ product
        gram = factor @ (gram @ factor) if left else gram
    return x if product is None else product @ x


def rate_factor(rows: int, columns: int) -> float:
    """By which an orthogonal update is multiplied to have the size of AdamW's, so that its rate and decay serve.

    Source: Liu et al. 2025, arXiv:2502.16982; "match_rms_adamw" of torch.optim.Muon.
    """
    return 0.2 * math.sqrt(max(rows, columns))


@cache
def has_bf16_products() -> bool:
    """Whether the processor multiplies bfloat16 faster than float32."""
    known: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(known.get("avx512_bf16") or known.get("amx_bf16"))


def compute_type(p: Tensor, rows: int) -> torch.dtype:
    """In which the iteration is computed for matrices with so many rows, the shorter side.

    Measured on one thread of a processor with avx512_bf16, milliseconds for four matrices in float32 and bfloat16: 192x576
    25 and 17, 192x192 23 and 9; but six of 32x288 0.3 and 0.7. GPUs take bfloat16, as torch.optim.Muon.
    """
    if p.dtype is torch.float64:
        return p.dtype
    half = rows >= WIDE and has_bf16_products() if p.device.type == "cpu" else p.device.type == "cuda"
    return torch.bfloat16 if half else torch.float32


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
    results = orthogonal(torch.stack([u for _, u in bucket]).to(compute_type(first, len(wide)))).to(first.dtype)
    params = [p for p, _ in bucket]
    turned = [(u if len(p) == len(u) else u.mT).reshape(p.shape) for p, u in zip(params, results, strict=True)]
    torch._foreach_add_(params, turned, alpha=-lr * rate_factor(*wide.shape))
