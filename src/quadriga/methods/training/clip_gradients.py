"""Gradient clipping: by the global norm, by value, or adaptively by the norms of the weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from quadriga.core.errors import BadInput
from quadriga.core.method import Family, Method, Numerics
from quadriga.core.setup import Setup
from quadriga.core.slots import Hook
from quadriga.core.spread import alike, clip_norm

LIMITS = {"norm": 1.0, "value": 0.1, "adaptive": 0.01}


def unit_norms(t: Tensor) -> Tensor:
    """The norm of each slice t[i], of a tensor that can be multiplied with t; the norm of the whole for a vector or a number.

    Example:
        >>> unit_norms(torch.tensor([[3.0, 4.0], [0.0, 1.0]])).tolist()
        [[5.0], [1.0]]
    """
    if t.dim() <= 1:
        return torch.linalg.vector_norm(t)
    return torch.linalg.vector_norm(t, dim=tuple(range(1, t.dim())), keepdim=True)


@torch.no_grad()
def clip_adaptively(parameters: Sequence[Tensor], limit: float, eps: float) -> None:
    """Scale each unit's gradient down to at most limit · max(‖weights of the unit‖, eps), in place.

    Args:
        parameters: with gradients; a unit is what one output is computed with, the slice p[i] (a vector is one unit).
        limit: of the ratio of norms.
        eps: below it a norm of weights counts as eps, so that weights at zero can leave it.
    """
    for p in parameters:
        assert p.grad is not None
        largest = unit_norms(p).clamp_min_(eps).mul_(limit)
        p.grad.mul_((largest / unit_norms(p.grad)).clamp_max_(1.0))  # 0 / 0 cannot be: `largest` is positive


class Clipping(Hook):
    """Clips all gradients of the model once they are there."""

    spreads = True

    def __init__(self, kind: str, limit: float, eps: float) -> None:
        self.kind, self.limit, self.eps = kind, limit, eps

    def after_backward(self, model: nn.Module, progress: float) -> None:
        found = [p for p in model.parameters() if p.grad is not None]
        if self.kind == "adaptive":
            clip_adaptively(found, self.limit, self.eps)
        elif self.kind == "norm":
            clip_norm([p.grad for p in found if p.grad is not None], self.limit)
        else:
            grads = [p.grad for p in found if p.grad is not None]
            for some in alike(grads):
                together = [grads[i] for i in some]
                torch._foreach_clamp_min_(together, -self.limit)
                torch._foreach_clamp_max_(together, self.limit)


@dataclass(frozen=True, kw_only=True)
class ClipGradients(Method):
    """Bound the gradient before each step, so that a rare large one does not throw the weights far away.

    | kind | what |
    |---|---|
    | norm | all gradients are scaled so that their common norm is at most the limit; the direction stays |
    | value | each entry is clamped to [-limit, limit] |
    | adaptive | each unit's gradient is scaled to at most limit · the norm of its weights |

    It stands in the order of the recipe: what steps before it do to gradients (also hooks of the optimizer) is clipped, what
    later steps do is not, so put it last. Penalties (l1, l2) and decay belong to the optimizer's step and come after it: a
    clipped gradient is still drawn towards zero in full. Of accumulated parts the sum is clipped; scaled gradients of fp16 are
    unscaled before. Nothing waits for the device.

    Args:
        kind: which.
        limit: positive; None for the kind's usual one: 1 for norm, 0.1 for value, 0.01 for adaptive.
        scale: multiplies the limit, so that it can be searched for all kinds alike.
        eps: of "adaptive": a smaller norm of weights counts as this.

    Source: Pascanu et al. 2013, arXiv:1211.5063 (norm); Brock et al. 2021, arXiv:2102.06171 (adaptive; there the last linear
    layer is left out, here none is).
    """

    family = Family.TRAINING
    numerics = Numerics.CHANGED
    source = "arXiv:1211.5063, arXiv:2102.06171"
    search: ClassVar = {"kind": ("norm", "adaptive"), "scale": (1.0, 0.3, 3.0)}
    requires = frozenset({"TRAIN_DATA"})

    kind: Literal["norm", "value", "adaptive"] = "norm"
    limit: float | None = None
    scale: float = 1.0
    eps: float = 1e-3

    def __post_init__(self) -> None:
        for name in ("limit", "scale", "eps"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise BadInput(f"clip_gradients.{name} is {value}", "give a positive number")

    def apply(self, setup: Setup) -> Setup:
        hooks = (*setup.training.make_hooks, self.hook)
        return replace(setup, training=replace(setup.training, make_hooks=hooks))

    def hook(self, model: nn.Module) -> Hook:
        """What clips in a train step."""
        limit = LIMITS[self.kind] if self.limit is None else self.limit
        return Clipping(self.kind, limit * self.scale, self.eps)
