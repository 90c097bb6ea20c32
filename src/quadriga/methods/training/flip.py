"""Horizontal flip of training images: at random, or every other epoch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar, Literal

import torch
from torch import Tensor

from quadriga.core.batch import Batch, tree_map
from quadriga.core.errors import BadInput
from quadriga.core.method import Family, Method, Numerics, invariant
from quadriga.core.setup import Setup
from quadriga.core.slots import Moment
from quadriga.methods.training._images import with_transform


def flip(images: Tensor, chosen: Tensor) -> Tensor:
    """Mirror the chosen images left to right.

    Args:
        images: [batch, channels, height, width].
        chosen: [batch] bool.
    """
    return torch.where(chosen[:, None, None, None], images.flip(-1), images)


def coin(index: Tensor, seed: int = 0) -> Tensor:
    """A fair bit [batch] int64 of each example, the same whenever it is asked for: a hash of its place in the split.

    Source: the finalizer of splitmix64, Steele et al. 2014, "Fast Splittable Pseudorandom Number Generators", figure 17.
    """
    mixed = (index + seed) * -0x61C8864680B583EB  # 2⁶⁴ over the golden ratio; int64 wraps
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)):
        mixed = (mixed ^ (mixed >> shift)) * factor
    return (mixed >> 40) & 1


@dataclass(frozen=True, kw_only=True)
class Flip(Method):
    """Mirror training images left to right.

    Args:
        kind: "random" (each time anew), or "alternating" (each image in every other epoch, beginning in the first for a
            random half of them, so that two epochs show every image in both ways).
        probability: of a random flip, in (0, 1].

    Source: Krizhevsky et al. 2012, "ImageNet Classification with Deep Convolutional Neural Networks", section 4.1;
    alternating: Jordan 2024, arXiv:2404.00498, section 3.6.
    """

    family = Family.TRAINING
    numerics = Numerics.CHANGED
    source = "https://papers.nips.cc/paper/4824-imagenet-classification-with-deep-convolutional-neural-networks"
    search: ClassVar = {"kind": ("random", "alternating"), "probability": (0.5,)}
    requires = frozenset({"IMAGES", "TRAIN_DATA", invariant("horizontal_flip")})

    kind: Literal["random", "alternating"] = "random"
    probability: float = 0.5

    def __post_init__(self) -> None:
        if not 0 < self.probability <= 1:
            raise BadInput(f"flip.probability is {self.probability}", "give a number in (0, 1]")
        if self.kind == "alternating" and self.probability != 0.5:
            problem = f"flip.probability is {self.probability}, and an alternating flip comes every second time"
            raise BadInput(problem, 'leave it out, or take kind = "random"')

    def apply(self, setup: Setup) -> Setup:
        return with_transform(setup, partial(self.transform, seed=setup.context.seed))

    def transform(self, batch: Batch, moment: Moment, seed: int = 0) -> Batch:
        """The batch with some images mirrored; `seed` decides which half an alternating flip begins with."""
        if self.kind == "random":
            chosen = moment.uniform(len(batch)) < self.probability
        else:
            chosen = (coin(batch.index, seed) + moment.epoch) % 2 == 1
        return replace(batch, inputs=tree_map(lambda t: flip(t, chosen), batch.inputs))
