"""Mean gradients over some batches, which importance scores read."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from quadriga.core.batch import Batch, call, evaluating
from quadriga.core.metric import Loss
from quadriga.train.step import reduce


def mean_gradients(model: nn.Module, loss: Loss, batches: Iterable[Batch]) -> dict[str, Tensor]:
    """The gradient of the mean loss per example, in eval mode (no dropout; batch norms keep their statistics).

    Args:
        model: left as it is: weights, `.grad` and mode.
        loss: (output, batch) → [batch] or scalar.
        batches: with equal weight for every example.

    Returns:
        parameter name → gradient, zeros where the loss does not depend on it; parameters that do not require
        a gradient are left out.
    """
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    sums = {name: torch.zeros_like(p) for name, p in named.items()}
    count = 0
    with evaluating(model):
        for batch in batches:
            value = reduce(loss(call(model, batch.inputs), batch), batch)
            parts = torch.autograd.grad(value, list(named.values()), allow_unused=True)
            for name, part in zip(named, parts, strict=True):
                if part is not None:
                    sums[name].add_(part, alpha=len(batch))
            count += len(batch)
    return {name: total / max(count, 1) for name, total in sums.items()}
