"""Label smoothing: train toward softened class targets."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from quadriga.core.errors import BadInput
from quadriga.core.method import Family, Method, Numerics
from quadriga.core.setup import Setup
from quadriga.methods.training._targets import check_soft_targets, softened


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
        loss = softened(setup.training.loss, self.amount)  # wrapped, not replaced: other loss methods keep their effect
        check_soft_targets(setup, loss)
        return replace(setup, training=replace(setup.training, loss=loss))
