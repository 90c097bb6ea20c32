"""Label smoothing: train toward softened class targets."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from quadriga.core.batch import Batch, Tree, call, device_of, evaluating, primary
from quadriga.core.errors import BadInput, NotApplicable
from quadriga.core.method import Family, Method, Numerics
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
    known = (target[:, None] == torch.arange(classes, device=target.device)).float()
    return (1 - amount) * known + amount / classes * known.sum(-1, keepdim=True)


@dataclass(frozen=True, kw_only=True)
class LabelSmoothing(Method):
    """Mix the one-hot target with the uniform distribution: (1 - a) onehot + a / classes.

    Args:
        amount: a, in (0, 1).

    Source: Szegedy et al. 2016, arXiv:1512.00567, section 7.
    """

    family = Family.TRAINING
    numerics = Numerics.CHANGED
    source = "arXiv:1512.00567"
    search: ClassVar = {"amount": (0.05, 0.1, 0.2)}
    requires = frozenset({"CLASSES", "PER_EXAMPLE_LOSS", "TRAIN_DATA"})

    amount: float = 0.1

    def __post_init__(self) -> None:
        if not 0 < self.amount < 1:
            raise BadInput(f"label_smoothing.amount is {self.amount}", "give a number in (0, 1)")

    def apply(self, setup: Setup) -> Setup:
        inner = setup.training.loss  # wrapped, not replaced: other loss methods keep their effect

        def loss(output: Tree, batch: Batch) -> Tensor:
            soft = smooth(batch.target, primary(output).shape[-1], self.amount)
            return inner(output, replace(batch, target=soft))

        check_soft_targets(setup, loss)
        return replace(setup, training=replace(setup.training, loss=loss))


def check_soft_targets(setup: Setup, loss: object) -> None:
    """Try the loss on a calibration batch. Raises NotApplicable if it only takes class numbers."""
    model, batch = setup.model, setup.context.calibration[0].to(device_of(setup.model))
    try:
        with evaluating(model), torch.no_grad():
            losses = loss(call(model, batch.inputs), batch)  # type: ignore[operator]
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        reason = f"the loss does not take soft targets [batch, classes]: {error}"
        raise NotApplicable(reason, "let the loss accept class probabilities, as cross_entropy does") from error
    if losses.shape != batch.index.shape:
        raise NotApplicable(f"with soft targets the loss returns the shape {tuple(losses.shape)}", "one value per example")
