"""What workers that share weights tell one another: how far they are, who has updated how often, when to stand still."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from quadriga.parallel.block import Block
from quadriga.parallel.crew import PATIENCE, WorkerFailed, hanging

BINS = 64  # of the histogram of staleness; the last one is for all that is larger
RECENT = 100  # losses that are kept
NAP = 5e-4  # seconds between looks at a board by one who waits
GONE = 2**62  # where a worker stands that will not come back
NUMBERS = ("position", "step", "done", "samples", "asked", "released", "stop")


@dataclass(frozen=True)
class Staleness:
    """How many updates by others fell between a worker's read of the weights and its own update, over all updates.

    Args:
        counts: [BINS] updates by their staleness; the last counts all that are staler.
        total: sum over all updates.
        largest: seen.

    Example:
        >>> found = Staleness.of([0, 1, 1, 4])
        >>> found.mean, found.largest, found.plain()["histogram"]
        (1.5, 4, {'0': 1, '1': 2, '4': 1})
    """

    counts: tuple[int, ...] = (0,) * BINS
    total: int = 0
    largest: int = 0

    @classmethod
    def of(cls, values: list[int]) -> Staleness:
        """Of single updates."""
        counts = [0] * BINS
        for value in values:
            counts[min(value, BINS - 1)] += 1
        return cls(tuple(counts), sum(values), max(values, default=0))

    @property
    def updates(self) -> int:
        """How many were counted."""
        return sum(self.counts)

    @property
    def mean(self) -> float:
        """Over all updates; 0 without one."""
        return self.total / max(self.updates, 1)

    def __add__(self, other: Staleness) -> Staleness:
        counts = tuple(a + b for a, b in zip(self.counts, other.counts, strict=True))
        return Staleness(counts, self.total + other.total, max(self.largest, other.largest))

    def among(self, updates: int) -> Staleness:
        """With the updates of one who worked alone: so many in all, of which those not counted here were not stale."""
        alone = max(updates - self.updates, 0)
        return Staleness((self.counts[0] + alone, *self.counts[1:]), self.total, self.largest)

    def plain(self) -> dict[str, Any]:
        """For records."""
        names = [*map(str, range(BINS - 1)), f"{BINS - 1}+"]
        histogram = {name: count for name, count in zip(names, self.counts, strict=True) if count}
        return {"mean": self.mean, "max": self.largest, "updates": self.updates, "histogram": histogram}

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"counts": list(self.counts), "total": self.total, "largest": self.largest}

    @classmethod
    def of_state(cls, state: Mapping[str, Any] | None) -> Staleness:
        """From `state`; of none, nothing was counted."""
        return cls(tuple(state["counts"]), state["total"], state["largest"]) if state else cls()

    def told(self, workers: int) -> str:
        """For people."""
        found = f"mean staleness {self.mean:.2f}, at most {self.largest}"
        return f"not bit-exact: {workers} workers updated the weights at the same time ({found})"


class Board:
    """Numbers in shared memory. Every entry has one writer; those that have several are written under `lock`.

    The lock guards the place in the stream of examples, a matter of microseconds a step. The weights have none.

    Args:
        workers: rank 0 is the one that leads.
        lock: of `multiprocessing`.
        start: first values of `NUMBERS`, those that are not 0.
    """

    def __init__(self, workers: int, lock: Any, start: Mapping[str, int]) -> None:
        self.workers, self.lock = workers, lock
        counts = torch.zeros(workers, dtype=torch.int64)
        self.block = Block(
            {
                "numbers": torch.tensor([start.get(name, 0) for name in NUMBERS]),
                "updates": counts, "parked": counts, "stale": counts, "largest": counts,
                "histogram": torch.zeros(workers, BINS, dtype=torch.int64),
                "seconds": torch.zeros(workers, dtype=torch.float64),
                "losses": torch.full((RECENT,), math.nan, dtype=torch.float64),
                "factors": torch.ones(4, dtype=torch.float64),
            }
        )  # fmt: skip
        self._look()

    def _look(self) -> None:
        self.see = {name: self.block.view(name).numpy() for name in self.block.layout}

    def __getstate__(self) -> dict[str, Any]:
        return {"workers": self.workers, "lock": self.lock, "block": self.block}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._look()

    def __getitem__(self, name: str) -> int:
        return int(self.see["numbers"][NUMBERS.index(name)])

    def __setitem__(self, name: str, value: int) -> None:
        self.see["numbers"][NUMBERS.index(name)] = value

    @contextmanager
    def locked(self, watch: Callable[[], None]) -> Iterator[None]:
        """Alone at the numbers of the stream. `watch` is called now and then while it waits: the holder may be dead."""
        while not self.lock.acquire(timeout=0.5):
            watch()
        try:
            yield
        finally:
            self.lock.release()

    def others(self, rank: int) -> int:
        """Updates that the others have made so far."""
        return int(self.see["updates"].sum()) - int(self.see["updates"][rank])

    def updated(self, rank: int, stale: int, step: int, loss: float) -> None:
        """A worker has written an update: how stale it was, of which step, and what its loss had been."""
        self.see["histogram"][rank, min(stale, BINS - 1)] += 1
        self.see["stale"][rank] += stale
        self.see["largest"][rank] = max(int(self.see["largest"][rank]), stale)
        self.see["seconds"][rank] = time.process_time()
        self.see["losses"][step % RECENT] = loss
        self.see["updates"][rank] += 1

    def place(self) -> tuple[int, int, int, int]:
        """Position in the stream, step, steps and samples of this train step."""
        return self["position"], self["step"], self["done"], self["samples"]

    @property
    def helped(self) -> float:
        """Processor seconds of all but rank 0."""
        return float(self.see["seconds"][1:].sum())

    @property
    def staleness(self) -> Staleness:
        """Of all workers."""
        counts = tuple(int(n) for n in self.see["histogram"].sum(0))
        return Staleness(counts, int(self.see["stale"].sum()), int(self.see["largest"].max()))

    def recent(self) -> list[float]:
        """The last losses, in the order of the stream, of steps that are over."""
        done = self["done"]
        steps = range(max(0, done - RECENT), done)
        return [loss for k in steps if not math.isnan(loss := float(self.see["losses"][k % RECENT]))]

    def park(self, rank: int) -> None:
        """Stand still while that is asked for."""
        while self["released"] < (asked := self["asked"]):
            self.see["parked"][rank] = asked
            time.sleep(NAP)

    def leave(self, rank: int) -> None:
        """Never be waited for again."""
        self.see["parked"][rank] = GONE

    @contextmanager
    def still(self, watch: Callable[[], None]) -> Iterator[None]:
        """Rank 0 alone acts inside; entered when all others stand still between two steps. `watch` as in `locked`."""
        self["asked"] += 1
        self.assemble(watch)
        try:
            yield
        finally:
            self["released"] = self["asked"]

    def assemble(self, watch: Callable[[], None], clock: Callable[[], float] = time.monotonic) -> None:
        """Wait until all others stand where they were asked to. Raises WorkerFailed when one does not for too long."""
        end = clock() + PATIENCE
        while late := [rank for rank in range(1, self.workers) if self.see["parked"][rank] < self["asked"]]:
            watch()
            if clock() > end:
                raise WorkerFailed(hanging(late, self.workers))
            time.sleep(NAP)
