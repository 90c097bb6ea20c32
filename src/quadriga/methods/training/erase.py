"""Random erasing: a rectangle of each training image is painted over."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from quadriga.core.batch import Batch, tensors, tree_map
from quadriga.core.errors import BadInput
from quadriga.core.method import Family, Method, Numerics
from quadriga.core.setup import Setup
from quadriga.core.slots import Moment
from quadriga.methods.training._images import boxes, with_transform


def draw(
    count: int, size: tuple[int, int], moment: Moment, *, smallest: float, largest: float, aspect: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Random rectangles inside of images: top, left, tall and wide, each [count] int64.

    Args:
        count: of images.
        size: height and width.
        moment: whose generator draws.
        smallest, largest: the area is uniform between these shares of the image; rounding and the border change it.
        aspect: height / width is log-uniform in [1 / aspect, aspect].
    """
    height, width = size
    area, ratio, down, right = moment.uniform(4, count)
    area = height * width * (smallest + (largest - smallest) * area)
    ratio = ((2 * ratio - 1) * math.log(aspect)).exp()
    tall = (area * ratio).sqrt().round().clamp(1, height)
    wide = (area / ratio).sqrt().round().clamp(1, width)
    top, left = (down * (height + 1 - tall)).floor(), (right * (width + 1 - wide)).floor()
    return top.long(), left.long(), tall.long(), wide.long()


def filling(images: Tensor, fill: str, generator: torch.Generator) -> Tensor:
    """What a rectangle is painted with, of a shape that spreads to the images'.

    Args:
        images: [batch, channels, height, width].
        fill: "zero"; "mean" of the batch, by channel; "noise", normal with that mean and the batch's deviation by channel.
        generator: of the noise.
    """
    if fill == "zero":
        return images.new_zeros(())
    if fill == "mean":
        return images.mean((0, 2, 3), keepdim=True)
    deviation, mean = torch.std_mean(images, (0, 2, 3), keepdim=True, correction=0)
    noise = torch.randn(images.shape, generator=generator, device=images.device, dtype=images.dtype)
    return noise.mul_(deviation).add_(mean)


@dataclass(frozen=True, kw_only=True)
class Erase(Method):
    """Paint over a random rectangle of each training image, with some probability.

    With smallest = largest, aspect = 1 and fill "zero" it is Cutout, kept inside of the image. A rectangle that would not fit
    is cut to the image, where the paper draws again.

    Args:
        probability: that an image is painted on, in (0, 1].
        smallest: area of a rectangle as a share of the image, above 0.
        largest: as `smallest`, up to 1.
        aspect: height / width is log-uniform in [1 / aspect, aspect]; at least 1.
        fill: "mean" (of the batch, by channel), "noise" (normal, of the batch's mean and deviation) or "zero".

    Source: Zhong et al. 2017, arXiv:1708.04896; DeVries and Taylor 2017, arXiv:1708.04552 (Cutout).
    """

    family = Family.TRAINING
    numerics = Numerics.CHANGED
    source = "arXiv:1708.04896"
    search: ClassVar = {"probability": (0.5, 0.25, 1.0), "largest": (0.2, 0.33, 0.1), "fill": ("mean", "noise", "zero")}
    requires = frozenset({"IMAGES", "TRAIN_DATA"})

    probability: float = 0.5
    smallest: float = 0.02
    largest: float = 0.33
    aspect: float = 3.3
    fill: Literal["mean", "noise", "zero"] = "mean"

    def __post_init__(self) -> None:
        if not 0 < self.probability <= 1:
            raise BadInput(f"erase.probability is {self.probability}", "give a number in (0, 1]")
        if not 0 < self.smallest <= self.largest <= 1:
            problem = f"erase.smallest is {self.smallest} and erase.largest {self.largest}"
            raise BadInput(problem, "give shares of the image with 0 < smallest <= largest <= 1")
        if self.aspect < 1:
            raise BadInput(f"erase.aspect is {self.aspect}", "give a number of at least 1")

    def apply(self, setup: Setup) -> Setup:
        return with_transform(setup, self.transform)

    def transform(self, batch: Batch, moment: Moment) -> Batch:
        """The batch with a rectangle of some images painted over, the same one in every input of an example."""
        height, width = tensors(batch.inputs)[0].shape[2:]
        given = {"smallest": self.smallest, "largest": self.largest, "aspect": self.aspect}
        top, left, tall, wide = draw(len(batch), (height, width), moment, **given)
        tall = tall * (moment.uniform(len(batch)) < self.probability)
        inside = boxes(top, left, tall, wide, (height, width))
        generator = moment.generator
        paint = tree_map(lambda t: torch.where(inside, filling(t, self.fill, generator), t), batch.inputs)
        return replace(batch, inputs=paint)
