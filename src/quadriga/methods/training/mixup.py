"""Mixup: train on weighted means of pairs of examples and of their targets."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from quadriga.core.batch import Batch
from quadriga.core.errors import BadInput, NotApplicable
from quadriga.core.method import REMEDIES, Family, Method, Numerics
from quadriga.core.setup import Setup
from quadriga.core.slots import Moment
from quadriga.methods.training._images import all_floating, beta, mix, partners, with_transform
from quadriga.methods.training._targets import check_soft_targets, soft, softened


def mixup(batch: Batch, partner: Tensor, share: Tensor) -> Batch:
    """share · own + (1 - share) · the partner's: of inputs, of targets and of the examples' weights.

    Args:
        batch: with inputs and target of floating point.
        partner: [batch] int64, places in the batch.
        share: [batch], in [0, 1].
    """
    inputs, target, weight = (mix(tree, partner, share) for tree in (batch.inputs, batch.target, batch.weight))
    return replace(batch, inputs=inputs, target=target, weight=weight)


@dataclass(frozen=True, kw_only=True)
class Mixup(Method):
    """Mix each example with another one of its batch: share · own + (1 - share) · other, with share from Beta(alpha, alpha).

    Each example has a share of its own. Class targets become probabilities [batch, classes], numbers to be predicted become
    means. Weights of examples are mixed alike.

    Args:
        alpha: above 0; a small one leaves most examples nearly as they are, 1 makes every share as likely.
        probability: that an example is mixed, in (0, 1].

    Source: Zhang et al. 2018, arXiv:1710.09412.
    """

    family = Family.TRAINING
    numerics = Numerics.CHANGED
    source = "arXiv:1710.09412"
    search: ClassVar = {"alpha": (0.2, 0.4, 1.0)}
    requires = frozenset({"PER_EXAMPLE_LOSS", "TRAIN_DATA"})

    alpha: float = 0.2
    probability: float = 1.0

    def __post_init__(self) -> None:
        if self.alpha <= 0:
            raise BadInput(f"mixup.alpha is {self.alpha}", "give a number above 0")
        if not 0 < self.probability <= 1:
            raise BadInput(f"mixup.probability is {self.probability}", "give a number in (0, 1]")

    def apply(self, setup: Setup) -> Setup:
        if not all_floating(setup.context.example):
            raise NotApplicable("inputs of whole numbers cannot be mixed", "it needs inputs of floating point, such as images")
        classes = setup.context.classes
        if classes is not None:
            check_soft_targets(setup, softened(setup.training.loss))
        elif not (isinstance(target := setup.context.calibration[0].target, Tensor) and target.is_floating_point()):
            raise NotApplicable("targets are neither classes nor numbers to be predicted", REMEDIES["CLASSES"])

        def transform(batch: Batch, moment: Moment) -> Batch:
            return self.transform(batch, moment, classes)

        return with_transform(setup, transform)

    def transform(self, batch: Batch, moment: Moment, classes: int | None) -> Batch:
        """The batch with its examples mixed; `classes` is None where targets are numbers to be predicted."""
        count = len(batch)
        share = beta(self.alpha, count, moment)
        if self.probability < 1:
            share = torch.where(moment.uniform(count) < self.probability, share, 1.0)
        target = batch.target if classes is None else soft(batch.target, classes)
        return mixup(replace(batch, target=target), partners(count, moment), share)
