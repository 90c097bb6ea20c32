"""What a paired timing gives: plain data, and the ratios drawn from it. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from quadriga.core.measurement import Interval, Measurement
from quadriga.measure.stats import Ratio, ratio, student

CALM = 0.1  # of the cores taken by others: on two cores a second process shows from about here on
Blocks = list[tuple[float, float]]  # over blocks: (wall, processor) seconds per call


@dataclass
class Timings:
    """Seconds per call of several arms, timed in turn. `timings[batch][arm]` is a list over restarts of `Blocks`.

    Args:
        seconds: batch → arm → restarts of blocks of (wall, processor) seconds per call.
        planned: restarts asked for.
        restarts: restarts made.
        errors: why an arm has fewer restarts than were made.
        startup: arm → seconds from start to ready, per restart (arms start at the same time, so they share the cores).
        peak: arm → peak resident bytes; the largest restart.
        growth: arm → the part of it above torch and the inputs, and what its tensors took on a GPU.
        device: arm → the most bytes that its tensors took on a GPU; 0 where it used none.
        others: for each restart the share of all cores' time that went to other processes or other machines.
        left_out: the same of restarts that were made again since others took more than `CALM`.
    """

    seconds: dict[int, dict[str, list[Blocks]]]
    planned: int
    restarts: int = 0
    errors: dict[str, str] = field(default_factory=dict)
    startup: dict[str, list[float]] = field(default_factory=dict)
    peak: dict[str, int] = field(default_factory=dict)
    growth: dict[str, int] = field(default_factory=dict)
    device: dict[str, int] = field(default_factory=dict)
    others: list[float] = field(default_factory=list)
    left_out: list[float] = field(default_factory=list)

    @classmethod
    def empty(cls, batches: list[int], arms: list[str], planned: int) -> Timings:
        """Nothing timed yet."""
        return cls({batch: {arm: [] for arm in arms} for batch in batches}, planned)

    def __getitem__(self, batch: int) -> dict[str, list[Blocks]]:
        return self.seconds[batch]

    @property
    def batches(self) -> list[int]:
        """Batch sizes, in order of timing."""
        return list(self.seconds)

    def add(self, arm: str, times: Mapping[int, Blocks], facts: Mapping[str, Any]) -> None:
        """Keep one whole restart of an arm."""
        for batch, blocks in times.items():
            self.seconds[batch][arm].append(list(blocks))
        self.startup.setdefault(arm, []).append(float(facts.get("startup", 0.0)))
        self.peak[arm] = max(self.peak.get(arm, 0), int(facts.get("peak", 0)))
        self.growth[arm] = max(self.growth.get(arm, 0), int(facts.get("growth", 0)))
        self.device[arm] = max(self.device.get(arm, 0), int(facts.get("device", 0)))

    def per_call(self, batch: int, arm: str, clock: str = "wall") -> list[list[float]]:
        """Seconds per call of one clock, "wall" or "cpu": restarts × blocks."""
        which = ("wall", "cpu").index(clock)
        return [[block[which] for block in blocks] for blocks in self.seconds[batch][arm]]

    def ratio(self, opponent: str, winner: str, batch: int, *, level: float = 0.99, clock: str = "wall") -> Ratio | None:
        """How many times faster the winner is, over the restarts that both came through; None if there are none.

        Restarts are paired by number: an arm that failed took part in the first ones only.
        """
        one, other = self.per_call(batch, opponent, clock), self.per_call(batch, winner, clock)
        count = min(len(one), len(other))
        return ratio(one[:count], other[:count], level=level) if count else None

    def latency(self, batch: int, arm: str, *, level: float = 0.99, clock: str = "wall") -> Measurement | None:
        """Seconds per call of one arm: geometric mean over restarts of the blocks' median; None if it was never timed.

        Unlike a ratio it is not paired, so it holds for the machine as it was then.
        """
        medians = [float(np.median(blocks)) for blocks in self.per_call(batch, arm, clock)]
        if not medians or min(medians) <= 0:
            return None
        logs = np.log(medians)
        low, high = (float(x[0]) for x in student(logs[None], level))
        interval = Interval(math.exp(low), math.exp(high), level) if len(medians) > 1 else None
        return Measurement(f"latency/{batch}", "s", math.exp(float(logs.mean())), interval, tuple(medians))

    @property
    def disturbed(self) -> float:
        """The share of the cores that others took, in the mean over restarts; 0 where nothing was timed."""
        return sum(self.others) / len(self.others) if self.others else 0.0

    @property
    def calm(self) -> int:
        """Restarts during which others left the cores alone."""
        return sum(share <= CALM for share in self.others)

    def calmest(self, most: int, least: int) -> Timings:
        """Without disturbed restarts, as far as `least` are left; chosen by what others did, whatever the times were.

        Args:
            most: restarts that were asked for.
            least: restarts that are kept, however disturbed.
        """
        order = sorted(
            range(len(self.others)), key=lambda k: (self.others[k] > CALM, self.others[k] * (self.others[k] > CALM), k)
        )
        kept = sorted(order[: max(min(self.calm, most), min(least, len(order)))])
        if len(kept) == len(self.others):
            return self
        seconds = {
            batch: {arm: [blocks[k] for k in kept if k < len(blocks)] for arm, blocks in arms.items()}
            for batch, arms in self.seconds.items()
        }
        out = [share for k, share in enumerate(self.others) if k not in kept]
        shares = [self.others[k] for k in kept]
        return replace(self, seconds=seconds, others=shares, left_out=out, restarts=len(kept))

    def plain(self) -> dict[str, Any]:
        """As JSON data."""
        data = asdict(self)
        data["seconds"] = {str(batch): arms for batch, arms in data["seconds"].items()}
        return data

    @classmethod
    def from_plain(cls, data: Mapping[str, Any]) -> Timings:
        """Read back what `plain` wrote."""
        seconds = {
            int(batch): {arm: [[(w, c) for w, c in blocks] for blocks in restarts] for arm, restarts in arms.items()}
            for batch, arms in data["seconds"].items()
        }
        return cls(**{**data, "seconds": seconds})
