"""Random horizontal flip of training images."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from quadriga.core.batch import Batch, tree_map
from quadriga.core.errors import BadInput, NotApplicable
from quadriga.core.method import Family, Method, Numerics
from quadriga.core.setup import Setup
from quadriga.core.slots import Moment


def flip(images: Tensor, chosen: Tensor) -> Tensor:
    """Mirror the chosen images left to right.

    Args:
        images: [batch, channels, height, width].
        chosen: [batch] bool.
    """
    return torch.where(chosen[:, None, None, None], images.flip(-1), images)


@dataclass(frozen=True, kw_only=True)
class Flip(Method):
    """Mirror each training image left to right with some probability.

    Args:
        probability: in (0, 1].

    Source: Krizhevsky et al. 2012, "ImageNet Classification with Deep Convolutional Neural Networks", section 4.1.
    """

    family = Family.TRAINING
    numerics = Numerics.CHANGED
    source = "https://papers.nips.cc/paper/4824-imagenet-classification-with-deep-convolutional-neural-networks"
    search: ClassVar = {"probability": (0.5,)}
    requires = frozenset({"IMAGES", "TRAIN_DATA"})

    probability: float = 0.5

    def __post_init__(self) -> None:
        if not 0 < self.probability <= 1:
            raise BadInput(f"flip.probability is {self.probability}", "give a number in (0, 1]")

    def apply(self, setup: Setup) -> Setup:
        if "horizontal_flip" not in setup.context.invariances:
            raise NotApplicable(
                "the workload does not say that a mirrored image keeps its label",
                'declare invariances={"horizontal_flip"} if it does',
            )
        transforms = (*setup.training.transforms, self.transform)
        return replace(setup, training=replace(setup.training, transforms=transforms))

    def transform(self, batch: Batch, moment: Moment) -> Batch:
        """The batch with some images mirrored."""
        chosen = moment.uniform(len(batch)) < self.probability
        return replace(batch, inputs=tree_map(lambda t: flip(t, chosen), batch.inputs))
