"""Random crop: shift each training image by a few pixels."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional

from quadriga.core.batch import Batch, tree_map
from quadriga.core.errors import BadInput, NotApplicable
from quadriga.core.method import Family, Method, Numerics, invariant
from quadriga.core.setup import Setup
from quadriga.core.slots import Moment
from quadriga.methods.training._images import with_transform

MODES = {"zero": "constant", "edge": "replicate", "reflect": "reflect"}


def crop(images: Tensor, padding: int, border: str, generator: torch.Generator) -> Tensor:
    """Pad by `padding` on each side and cut the original size out at a random place for each image.

    Args:
        images: [batch, channels, height, width].
        padding: pixels; shifts are uniform in [-padding, padding] in both directions.
        border: "zero", "edge" or "reflect".
        generator: on the images' device.

    Returns:
        as many images, of the same size.
    """
    count, _, height, width = images.shape
    padded = functional.pad(images, (padding,) * 4, mode=MODES[border])
    windows = padded.unfold(2, height, 1).unfold(3, width, 1)  # a view [batch, channels, 2p+1, 2p+1, height, width]
    down, right = torch.randint(2 * padding + 1, (2, count), generator=generator, device=images.device)
    return windows[torch.arange(count, device=images.device), :, down, right]


@dataclass(frozen=True, kw_only=True)
class Crop(Method):
    """Shift each training image at random: pad it, then crop the original size.

    Args:
        padding: pixels on each side, at least 1 and less than the image.
        border: what comes in from outside: the nearest pixel ("edge"), zeros ("zero") or a mirror ("reflect").

    Source: He et al. 2016, arXiv:1512.03385, section 4.2 (4 pixels on 32×32).
    """

    family = Family.TRAINING
    numerics = Numerics.CHANGED
    source = "arXiv:1512.03385"
    search: ClassVar = {"padding": (2, 1, 4)}
    requires = frozenset({"IMAGES", "TRAIN_DATA", invariant("translation")})

    padding: int = 2
    border: Literal["edge", "zero", "reflect"] = "edge"

    def __post_init__(self) -> None:
        if self.padding < 1:
            raise BadInput(f"crop.padding is {self.padding}", "give at least 1 pixel")

    def apply(self, setup: Setup) -> Setup:
        sizes: list[int] = []
        tree_map(lambda t: sizes.extend(t.shape[2:]), setup.context.example)
        if self.padding >= min(sizes):
            raise NotApplicable(
                f"images of {sizes[0]}×{sizes[1]} are too small to be shifted by {self.padding}", "lower padding"
            )
        return with_transform(setup, self.transform)

    def transform(self, batch: Batch, moment: Moment) -> Batch:
        """The batch with every image shifted."""
        return replace(batch, inputs=tree_map(lambda t: crop(t, self.padding, self.border, moment.generator), batch.inputs))
