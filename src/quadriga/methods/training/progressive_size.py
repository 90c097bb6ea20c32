"""Progressive size: train on small images first, on full ones at the end."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from quadriga.core.batch import Batch, device_of, tensors, to_device, tree_map
from quadriga.core.errors import NotApplicable
from quadriga.core.method import Family, Method, Numerics
from quadriga.core.setup import Setup
from quadriga.core.slots import Moment
from quadriga.methods.training._sizes import is_image, obstacle, shrunk

MULTIPLE = 4  # of pixels, of which smaller sides are


def side_at(side: int, progress: float, start: float, until: float, stages: int) -> int:
    """The side of images at a progress: `stages` plateaus from start · side on, then the full side from `until` on.

    Example:
        >>> [side_at(32, p, start=0.5, until=0.8, stages=4) for p in (0.0, 0.2, 0.4, 0.6, 0.8)]
        [16, 20, 24, 28, 32]
    """
    if progress >= until:
        return side
    share = start + (1 - start) * int(progress / until * stages + 1e-9) / stages
    return min(side, max(1, round(share * side / MULTIPLE)) * MULTIPLE)


@dataclass(frozen=True, kw_only=True)
class ProgressiveSize(Method):
    """Shrink training images early, and let them grow to full size at `until`: a convolution's cost goes with their area.

    It acts where it stands among the transforms. Put it behind those that count in pixels (crop), whose shifts would otherwise
    be larger relative to the image while it is small; those that do not care may follow and are cheaper on small images. The
    last part of each train step is at full size, since objects that are larger in training than in the test cost accuracy
    (FixRes); each train step starts small, one that continues another too. Sides are few multiples of 4, so that a compiled
    step sees few shapes. Only 4-d float tensors of the inputs change.

    The network must give outputs of the same shape for smaller images, as those do that end in global pooling: it is tried.

    Args:
        start: the first side as a share of the full one, in (0, 1).
        until: the progress from which images are full, in (0, 1).
        stages: number of smaller sizes, at least 1.

    Source: Tan & Le 2021, arXiv:2104.00298, section 4; Howard et al. 2018 (fastai's progressive resizing,
    https://www.fast.ai/posts/2018-04-30-dawnbench-fastai.html); Touvron et al. 2019, arXiv:1906.06423 (FixRes).
    """

    family = Family.TRAINING
    numerics = Numerics.CHANGED
    source = "arXiv:2104.00298, arXiv:1906.06423"
    search: ClassVar = {"start": (0.5, 0.7), "until": (0.7, 0.5, 0.85), "stages": (3, 1, 2)}
    requires = frozenset({"IMAGES", "TRAIN_DATA"})

    start: float = 0.5
    until: float = 0.7
    stages: int = 3

    def __post_init__(self) -> None:
        self.insist(
            ("start", 0 < self.start < 1, "give a number in (0, 1)"),
            ("until", 0 < self.until < 1, "give a number in (0, 1): the last part is at full size"),
            ("stages", self.stages >= 1, "give at least 1"),
        )

    def apply(self, setup: Setup) -> Setup:
        inputs = to_device(setup.context.example, device_of(setup.model))
        full = next((t.shape[2], t.shape[3]) for t in tensors(inputs) if is_image(t))
        times = [self.until * (k + 0.5) / self.stages for k in range(self.stages)]
        sizes = [s for s in dict.fromkeys(self.size(full, t) for t in times) if s != full]
        if not sizes:
            raise NotApplicable(f"images of {full[0]}×{full[1]} have no smaller size of multiples of 4", "lower start")
        for size in sizes:
            if problem := obstacle(setup.model, inputs, size):
                remedy = "end in global pooling (replace_head puts one there, AdaptiveAvgPool2d is one), or raise start"
                raise NotApplicable(problem, remedy)
        transforms = (*setup.training.transforms, self.transform)
        return replace(setup, training=replace(setup.training, transforms=transforms))

    def size(self, full: tuple[int, int], progress: float) -> tuple[int, int]:
        """Height and width at a progress."""
        height, width = (side_at(side, progress, self.start, self.until, self.stages) for side in full)
        return height, width

    def transform(self, batch: Batch, moment: Moment) -> Batch:
        """The batch with images of the size of this moment."""
        if moment.progress >= self.until:
            return batch
        sized = tree_map(
            lambda t: shrunk(t, self.size((t.shape[2], t.shape[3]), moment.progress)) if is_image(t) else t, batch.inputs
        )
        return replace(batch, inputs=sized)
