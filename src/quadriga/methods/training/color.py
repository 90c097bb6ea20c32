"""Random brightness, contrast, saturation and hue of training images, as one linear map of each image's colours."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from typing import ClassVar

import torch
from torch import Tensor

from quadriga.core.batch import Batch, tree_map
from quadriga.core.errors import BadInput, NotApplicable
from quadriga.core.method import Family, Method, Numerics, invariant
from quadriga.core.setup import Setup
from quadriga.core.slots import Moment
from quadriga.methods.training._images import along, with_transform

LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601
TO_YUV = (LUMA, (-0.147, -0.289, 0.436), (0.615, -0.515, -0.100))


def recolor(images: Tensor, shift: Tensor, contrast: Tensor, saturation: Tensor, angle: Tensor) -> Tensor:
    """Brightness, contrast, saturation and hue, in this order and without clipping.

    Args:
        images: [batch, channels, height, width] float. Saturation and hue act on three channels only.
        shift: [batch], is added, in units of the batch's standard deviation.
        contrast: [batch], multiplies the distance from the mean luma of the image (the plain mean unless of 3 channels).
        saturation: [batch], multiplies the distance of each pixel from its luma.
        angle: [batch] radians, by which colours turn about the luma, in the plane (U, V).
    """
    channels = images.shape[1]
    deviation, means = images.std(correction=0), images.mean((2, 3))
    weights = means.new_tensor(LUMA) if channels == 3 else means.new_full((channels,), 1 / channels)
    grey = (means * weights).sum(1)
    moved = grey + shift.to(images.dtype) * deviation  # after the shift, before the contrast
    offset = moved - contrast.to(images.dtype) * grey
    if channels != 3:
        return torch.addcmul(along(offset, images), images, along(contrast, images))
    matrix = colours(saturation, angle).to(images.dtype) * contrast[:, None, None].to(images.dtype)
    out = along(offset, images)  # a grey, which neither saturation nor hue changes
    for channel in range(3):  # no matrix product, since those may be of lower precision
        out = torch.addcmul(out, images[:, channel, None], matrix[:, :, channel, None, None])
    return out


def colours(saturation: Tensor, angle: Tensor) -> Tensor:
    """The matrices [batch, 3, 3] that turn and stretch RGB about the grey axis, and keep the luma.

    Example:
        >>> still = colours(torch.ones(1), torch.zeros(1))
        >>> torch.allclose(still[0], torch.eye(3).double())
        True
    """
    grey, along_colour, across = basis(angle.device)
    cosine, sine = saturation.double() * angle.double().cos(), saturation.double() * angle.double().sin()
    return grey + cosine[:, None, None] * along_colour + sine[:, None, None] * across


@lru_cache(maxsize=4)
def basis(device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """What 1, cos and sin multiply in a colour matrix: three times [3, 3] float64."""
    yuv = torch.tensor(TO_YUV, dtype=torch.float64)
    rgb = torch.linalg.inv(yuv)
    products = [torch.outer(rgb[:, i], yuv[j]) for i, j in ((0, 0), (1, 1), (2, 2), (2, 1), (1, 2))]
    luma, u, v, u_to_v, v_to_u = (p.to(device) for p in products)
    return luma, u + v, u_to_v - v_to_u


@dataclass(frozen=True, kw_only=True)
class Color(Method):
    """Change brightness, contrast, and of three channels saturation and hue of each training image at random.

    Inputs may be normalised, so that black and white are unknown: brightness is measured in standard deviations of the batch,
    contrast is about the image's own mean, nothing is clipped. Hue and saturation take the channels as RGB, of about equal
    scale.

    Args:
        brightness: the shift is uniform in ± this many standard deviations of the batch; at least 0.
        contrast: the factor is uniform in 1 ± contrast; in [0, 1].
        saturation: the factor is uniform in 1 ± saturation; in [0, 1].
        hue: the turn is uniform in ± this part of a circle; in [0, 0.5].

    Source: Howard 2013, arXiv:1312.5402, section 2.2 (brightness, contrast and colour, in random amounts).
    """

    family = Family.TRAINING
    numerics = Numerics.CHANGED
    source = "arXiv:1312.5402"
    search: ClassVar = {"brightness": (0.2, 0.0, 0.4), "contrast": (0.2, 0.0, 0.4), "saturation": (0.2, 0.0, 0.4)}
    requires = frozenset({"IMAGES", "TRAIN_DATA", invariant("color")})

    brightness: float = 0.2
    contrast: float = 0.2
    saturation: float = 0.2
    hue: float = 0.0

    def __post_init__(self) -> None:
        limits = {"brightness": math.inf, "contrast": 1, "saturation": 1, "hue": 0.5}
        for field in fields(self):
            value, most = getattr(self, field.name), limits[field.name]
            if not 0 <= value <= most:
                raise BadInput(f"color.{field.name} is {value}", f"give a number from 0 to {most}")

    def apply(self, setup: Setup) -> Setup:
        channels: list[int] = []
        tree_map(lambda t: channels.append(t.shape[1]), setup.context.example)
        if not (self.brightness or self.contrast or (3 in channels and (self.saturation or self.hue))):
            had = "grey images" if self.saturation or self.hue else "images"
            raise NotApplicable(f"nothing changes {had}", "give brightness or contrast above 0")
        return with_transform(setup, self.transform)

    def draw(self, count: int, moment: Moment) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What `recolor` takes: shift, contrast, saturation and angle, each [count]."""
        shift, contrast, saturation, angle = moment.uniform(4, count).mul_(2).sub_(1)
        turn = 2 * math.pi * self.hue
        return shift * self.brightness, 1 + contrast * self.contrast, 1 + saturation * self.saturation, angle * turn

    def transform(self, batch: Batch, moment: Moment) -> Batch:
        """The batch with every image recoloured."""
        drawn = self.draw(len(batch), moment)
        return replace(batch, inputs=tree_map(lambda t: recolor(t, *drawn), batch.inputs))
