"""CutMix: paste a rectangle of another image into each training image, and mix their targets by the areas."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from quadriga.core.batch import Batch, tensors, tree_map
from quadriga.core.errors import BadInput
from quadriga.core.method import Family, Method, Numerics
from quadriga.core.setup import Setup
from quadriga.core.slots import Moment
from quadriga.methods.training._images import beta, boxes, mix, partners, with_transform
from quadriga.methods.training._targets import check_soft_targets, soft, softened

Box = tuple[Tensor, Tensor, Tensor, Tensor]  # top, left, tall, wide: each [batch] int64


def cutmix(batch: Batch, partner: Tensor, box: Box) -> Batch:
    """The partner's pixels inside of each box; targets and the examples' weights are mixed by the areas.

    Args:
        batch: inputs [batch, channels, height, width], target of floating point.
        partner: [batch] int64, places in the batch.
        box: inside of the images.
    """
    height, width = tensors(batch.inputs)[0].shape[2:]
    inside, area = boxes(*box, (height, width)), box[2] * box[3]
    inputs = tree_map(lambda t: torch.where(inside, t[partner], t), batch.inputs)
    target, weight = (mix(t, partner, 1 - area.double() / (height * width)) for t in (batch.target, batch.weight))
    return replace(batch, inputs=inputs, target=target, weight=weight)


def draw(share: Tensor, size: tuple[int, int], moment: Moment) -> Box:
    """Boxes of the images' proportions and the area 1 - share, about uniform centres; what lies outside is cut off."""
    place, drawn = [], moment.uniform(2, len(share))
    for side, where in zip(size, drawn, strict=True):
        half = (side * (1 - share).sqrt()).floor().long() // 2
        centre = (where * side).long()
        first = (centre - half).clamp_min(0)
        place.append((first, (centre + half).clamp_max(side) - first))
    (top, tall), (left, wide) = place
    return top, left, tall, wide


@dataclass(frozen=True, kw_only=True)
class Cutmix(Method):
    """Paste a rectangle of another image of the batch into each training image; targets are mixed by the areas.

    The rectangle's area before it is cut at the border is 1 - share, with share from Beta(alpha, alpha). Each image has a
    rectangle of its own. Weights of examples are mixed as targets are.

    Args:
        alpha: above 0; 1 makes every area as likely.
        probability: that an image is pasted into, in (0, 1].

    Source: Yun et al. 2019, arXiv:1905.04899.
    """

    family = Family.TRAINING
    numerics = Numerics.CHANGED
    source = "arXiv:1905.04899"
    search: ClassVar = {"alpha": (1.0, 0.2), "probability": (0.5, 1.0)}
    requires = frozenset({"CLASSES", "IMAGES", "PER_EXAMPLE_LOSS", "TRAIN_DATA"})

    alpha: float = 1.0
    probability: float = 0.5

    def __post_init__(self) -> None:
        if self.alpha <= 0:
            raise BadInput(f"cutmix.alpha is {self.alpha}", "give a number above 0")
        if not 0 < self.probability <= 1:
            raise BadInput(f"cutmix.probability is {self.probability}", "give a number in (0, 1]")

    def apply(self, setup: Setup) -> Setup:
        check_soft_targets(setup, softened(setup.training.loss))
        classes = setup.context.classes
        assert classes is not None, "CLASSES is required"

        def transform(batch: Batch, moment: Moment) -> Batch:
            return self.transform(batch, moment, classes)

        return with_transform(setup, transform)

    def transform(self, batch: Batch, moment: Moment, classes: int) -> Batch:
        """The batch with rectangles of other images in it."""
        height, width = tensors(batch.inputs)[0].shape[2:]
        share = beta(self.alpha, len(batch), moment)
        if self.probability < 1:
            share = torch.where(moment.uniform(len(batch)) < self.probability, share, 1.0)
        box = draw(share, (height, width), moment)
        return cutmix(replace(batch, target=soft(batch.target, classes)), partners(len(batch), moment), box)
