"""Batch ramp: small batches first, larger ones as training goes on."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from quadriga.core.errors import NotApplicable
from quadriga.core.method import Family, Method, Numerics
from quadriga.core.setup import Setup
from quadriga.core.slots import Factors, Schedule

MULTIPLE = 8  # of which early batches are, since vector units and tensor cores work on so many at a time
POWERS = {"none": 0.0, "sqrt": 0.5, "linear": 1.0}


def plateaus(batch_size: int, kind: str, start: float, stages: int) -> list[int]:
    """Batch sizes of the ramp, rising and all smaller than `batch_size`.

    Args:
        batch_size: the full one.
        kind: "steps" doubles from start · batch_size; "linear" goes up in `stages` equal steps.
        start: of the full size, where it begins.
        stages: of "linear".

    Example:
        >>> plateaus(128, "steps", 0.125, 4), plateaus(128, "linear", 0.25, 3), plateaus(16, "steps", 0.125, 4)
        ([16, 32, 64], [32, 64, 96], [8])
    """
    if kind == "steps":
        count = 0
        while start * 2**count < 1 - 1e-9:
            count += 1
        shares = [start * 2**k for k in range(count)]
    else:
        shares = [start + (1 - start) * k / stages for k in range(stages)]
    sizes = (max(1, round(share * batch_size / MULTIPLE)) * MULTIPLE for share in shares)
    return sorted({size for size in sizes if size < batch_size})


@dataclass(frozen=True, kw_only=True)
class BatchRamp(Method):
    """Begin with small batches and let them grow to full size at `until`: early gradients are alike, so that few examples tell
    the direction, and more steps are taken with as many examples.

    Sizes are few plateaus of equal length, each a multiple of 8, so that a compiled step or a cached kernel sees few shapes.
    Progress counts examples, so the number of examples stays and that of steps grows. It pays where steps are what a quality
    needs; a processor that is slower on small batches loses time. Under `accumulate` all sizes grow by its number of steps.

    Args:
        kind: "steps" (each plateau twice the one before) or "linear".
        start: the first size as a share of the full one, in (0, 1).
        until: the progress at which the batch is full, in (0, 1].
        stages: of "linear", the number of smaller sizes.
        rate: how the learning rate follows the batch: "none", "sqrt" (its square root, usual for adaptive optimizers) or
            "linear" (usual for SGD). At full size it is the optimizer's own.

    Source: Smith et al. 2018, arXiv:1711.00489; Merrill et al. 2025, arXiv:2505.23971 (batch-size warm-up, with the square
    root); Meterez et al. 2025, arXiv:2510.14717 (Seesaw).
    """

    family = Family.TRAINING
    numerics = Numerics.CHANGED
    source = "arXiv:1711.00489, arXiv:2505.23971, arXiv:2510.14717"
    search: ClassVar = {"start": (0.25, 0.125, 0.5), "until": (0.5, 0.25), "rate": ("none", "sqrt", "linear")}
    requires = frozenset({"TRAIN_DATA"})

    kind: Literal["steps", "linear"] = "steps"
    start: float = 0.25
    until: float = 0.5
    stages: int = 4
    rate: Literal["none", "sqrt", "linear"] = "none"

    def __post_init__(self) -> None:
        self.insist(
            ("start", 0 < self.start < 1, "give a number in (0, 1)"),
            ("until", 0 < self.until <= 1, "give a number in (0, 1]"),
            ("stages", self.stages >= 1, "give at least 1"),
        )

    def apply(self, setup: Setup) -> Setup:
        full = min(setup.training.batch_size, setup.context.examples or setup.training.batch_size)
        sizes = plateaus(full, self.kind, self.start, self.stages)
        if not sizes:
            reason = f"below the batch of {full} there is no multiple of {MULTIPLE} to begin with"
            raise NotApplicable(reason, "enlarge the batch")
        schedules = (*setup.training.schedules, self.schedule([size / full for size in sizes]))
        return replace(setup, training=replace(setup.training, schedules=schedules))

    def schedule(self, shares: list[float]) -> Schedule:
        """The factors that give one share of the full batch after the other, then all of it."""

        def factors(progress: float) -> Factors:
            share = shares[int(progress / self.until * len(shares))] if progress < self.until else 1.0
            return Factors(lr=share ** POWERS[self.rate], batch=share)

        return factors
