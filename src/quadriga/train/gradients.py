"""Mean gradients and their squares over some data, which importance scores read."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import islice

import torch
from torch import Tensor, nn

from quadriga.core.batch import Batch, call, evaluating
from quadriga.core.metric import Loss
from quadriga.train.step import parts, reduce


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
    return _mean(model, loss, batches, lambda g: g)


def fisher_diagonal(model: nn.Module, loss: Loss, batches: Iterable[Batch], examples: int = 128) -> dict[str, Tensor]:
    """Mean squared gradient of single examples' losses, the empirical Fisher information: it stands for the Hessian.

    At a minimum of a log-likelihood the two agree (Theis et al. 2018, arXiv:1801.05787). In eval mode.

    Args:
        model, loss: as in `mean_gradients`.
        batches: taken apart into single examples, so that no gradients cancel.
        examples: how many of them at most.

    Returns:
        parameter name → [the parameter's shape].
    """
    singles = (one for batch in batches for one in parts(batch, 1))
    return _mean(model, loss, islice(singles, examples), Tensor.square)


def _mean(model: nn.Module, loss: Loss, batches: Iterable[Batch], of: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    sums = {name: torch.zeros_like(p) for name, p in named.items()}
    count = 0
    for batch in batches:
        with evaluating(model):
            value = reduce(loss(call(model, batch.inputs), batch), batch)
            parts = torch.autograd.grad(value, list(named.values()), allow_unused=True)
        for name, part in zip(named, parts, strict=True):
            if part is not None:
                sums[name].add_(of(part), alpha=len(batch))
        count += len(batch)
    return {name: total / max(count, 1) for name, total in sums.items()}
