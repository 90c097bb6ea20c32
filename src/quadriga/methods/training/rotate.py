"""Random rotation of training images by a few degrees."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional

from quadriga.core.batch import Batch, tree_map
from quadriga.core.errors import BadInput
from quadriga.core.method import Family, Method, Numerics, invariant
from quadriga.core.setup import Setup
from quadriga.core.slots import Moment
from quadriga.methods.training._images import with_transform

MODES = {"edge": "border", "zero": "zeros", "reflect": "reflection"}


def rotate(images: Tensor, angles: Tensor, border: str = "edge") -> Tensor:
    """Turn each image about its centre, counter-clockwise as seen for positive angles, with bilinear interpolation.

    The sampling grid is linear in (cos, sin), so that two products of constants give it; `affine_grid`, which
    multiplies a batch of 3×2 matrices, takes more than twice as long as all of this on a CPU.

    Args:
        images: [batch, channels, height, width] float.
        angles: [batch] in radians.
        border: "edge", "zero" or "reflect".
    """
    height, width = images.shape[2:]
    cosine, sine = basis(height, width, images.device, images.dtype)
    turns = angles.to(images.dtype)[:, None]
    grid = torch.addcmul(turns.cos() * cosine, turns.sin(), sine).view(len(images), height, width, 2)
    return functional.grid_sample(images, grid, padding_mode=MODES[border], align_corners=False)


@lru_cache(maxsize=16)
def basis(height: int, width: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """What cos and sin multiply in the grid: two tensors [height·width·2] of (x, y) between -1 and 1."""
    y = (torch.arange(height, device=device, dtype=dtype) * 2 + 1 - height)[:, None].expand(height, width)
    x = (torch.arange(width, device=device, dtype=dtype) * 2 + 1 - width).expand(height, width)
    cosine, sine = torch.stack((x / width, y / height), -1), torch.stack((-y / width, x / height), -1)
    return cosine.flatten(), sine.flatten()


@dataclass(frozen=True, kw_only=True)
class Rotate(Method):
    """Turn each training image by a random angle.

    Args:
        degrees: angles are uniform in [-degrees, degrees]; in (0, 180].
        border: what comes in from outside: the nearest pixel ("edge"), zeros ("zero") or a mirror ("reflect").

    Source: Simard et al. 2003, "Best Practices for Convolutional Neural Networks", ICDAR, section 2.
    """

    family = Family.TRAINING
    numerics = Numerics.CHANGED
    source = "https://doi.org/10.1109/ICDAR.2003.1227801"
    search: ClassVar = {"degrees": (5.0, 10.0, 15.0)}
    requires = frozenset({"IMAGES", "TRAIN_DATA", invariant("rotation")})

    degrees: float = 5.0
    border: Literal["edge", "zero", "reflect"] = "edge"

    def __post_init__(self) -> None:
        if not 0 < self.degrees <= 180:
            raise BadInput(f"rotate.degrees is {self.degrees}", "give a number in (0, 180]")

    def apply(self, setup: Setup) -> Setup:
        return with_transform(setup, self.transform)

    def transform(self, batch: Batch, moment: Moment) -> Batch:
        """The batch with every image turned."""
        angles = moment.uniform(len(batch)).sub_(0.5).mul_(2 * math.radians(self.degrees))
        return replace(batch, inputs=tree_map(lambda t: rotate(t, angles, self.border), batch.inputs))
