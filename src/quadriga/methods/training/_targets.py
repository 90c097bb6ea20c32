"""Class targets as probabilities: made from class numbers, smoothed, and whether a loss takes them."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from quadriga.core.batch import Batch, Tree, call, device_of, evaluating, primary
from quadriga.core.errors import NotApplicable
from quadriga.core.metric import Loss
from quadriga.core.setup import Setup


def smooth(target: Tensor, classes: int, amount: float) -> Tensor:
    """(1 - amount) · one-hot + amount / classes, as [batch, classes].

    Args:
        target: [batch] int64, or [batch, classes] float (soft already). A class outside of [0, classes), such as the
            −100 that losses ignore, gives a row of zeros.
        classes: their number.
        amount: in [0, 1).

    Example:
        >>> smooth(torch.tensor([1, -100]), 2, 0.5).tolist()
        [[0.25, 0.75], [0.0, 0.0]]
    """
    if target.is_floating_point():
        return (1 - amount) * target + amount / classes * target.sum(-1, keepdim=True)
    known = soft(target, classes)
    return (1 - amount) * known + amount / classes * known.sum(-1, keepdim=True)


def soft(target: Tensor, classes: int) -> Tensor:
    """One-hot rows [batch, classes] of class numbers [batch]; targets that are soft already as they are.

    Example:
        >>> soft(torch.tensor([1, -100]), 2).tolist()
        [[0.0, 1.0], [0.0, 0.0]]
    """
    if target.is_floating_point():
        return target
    return (target[:, None] == torch.arange(classes, device=target.device)).float()


def softened(loss: Loss, amount: float = 0.0) -> Loss:
    """The loss, given targets [batch, classes]."""

    def on_soft(output: Tree, batch: Batch) -> Tensor:
        return loss(output, replace(batch, target=smooth(batch.target, primary(output).shape[-1], amount)))

    return on_soft


def check_soft_targets(setup: Setup, loss: Loss) -> None:
    """Try a loss that hands on soft targets, as of `softened`, on a calibration batch.

    Raises:
        NotApplicable: it only takes class numbers, or returns another shape than [batch].
    """
    model, batch = setup.model, setup.context.calibration[0].to(device_of(setup.model))
    try:
        with evaluating(model), torch.no_grad():
            losses = loss(call(model, batch.inputs), batch)
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        reason = f"the loss does not take soft targets [batch, classes]: {error}"
        raise NotApplicable(reason, "let the loss accept class probabilities, as cross_entropy does") from error
    if losses.shape != batch.index.shape:
        raise NotApplicable(f"with soft targets the loss returns the shape {tuple(losses.shape)}", "one value per example")
