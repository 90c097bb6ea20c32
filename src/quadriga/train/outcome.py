"""What a train step did, and the watch over its losses."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from quadriga.core.errors import Diverged
from quadriga.core.slots import Hook


@dataclass(frozen=True)
class Outcome:
    """What a train step did.

    Args:
        samples, steps: seen and made, over all resumptions.
        seconds, cpu_seconds: spent training, over all resumptions.
        loss: mean of the last 100 training losses.
        path: the finished checkpoint, if one was asked for.
        note: for people: what of a resumption was not bit-exact, a damaged state that was passed over, several workers.
        hooks: of this train step.
        staleness: of a step by several workers: for each update, how many others fell between its read of the weights and its
            write; mean, max, updates and a histogram, over all resumptions.
    """

    samples: int
    steps: int
    seconds: float
    cpu_seconds: float
    loss: float
    path: Path | None = None
    note: str = ""
    hooks: tuple[Hook, ...] = field(default=(), compare=False, repr=False)
    staleness: Mapping[str, Any] | None = None

    @property
    def exact(self) -> bool:
        """Whether nothing is known that would make the same run, or its resumption, give other weights."""
        return "not bit-exact" not in self.note

    @contextmanager
    def evaluating(self, model: nn.Module) -> Iterator[None]:
        """The model as the hooks want it evaluated, with averaged weights for example."""
        with ExitStack() as stack:
            for hook in self.hooks:
                stack.enter_context(hook.eval(model))
            yield


class Watch:
    """Keeps losses on their device and reads them every `window` steps, so that the device is not waited for.

    Args:
        window: 1 where reading costs nothing.
    """

    def __init__(self, window: int) -> None:
        self.window = window
        self.pending: list[tuple[int, float, Tensor]] = []
        self.recent: deque[float] = deque(maxlen=100)

    def see(self, step: int, rate: float, loss: Tensor) -> None:
        """Note a loss; read them all when the window is full. Raises Diverged like `look`."""
        self.pending.append((step, rate, loss))
        if len(self.pending) >= self.window:
            self.look()

    def look(self) -> None:
        """Read what is pending.

        Raises:
            Diverged: with the first step whose loss was not finite.
        """
        one = len(self.pending) == 1
        losses = (
            [float(self.pending[0][2])] if one else torch.stack([p[2] for p in self.pending]).tolist() if self.pending else []
        )
        for (step, rate, _), loss in zip(self.pending, losses, strict=True):
            if not math.isfinite(loss):
                raise Diverged(step, float(rate), loss)
        self.recent.extend(losses)
        self.pending.clear()

    def look_at_weights(self, finite: bool, step: int, rate: float) -> None:
        """The last update may have spoilt what no later loss shows. Raises Diverged if a weight is not finite."""
        self.look()
        if not finite:
            raise Diverged(step, float(rate), math.nan)

    @property
    def mean(self) -> float:
        """Of the last losses read; NaN before the first."""
        return sum(self.recent) / len(self.recent) if self.recent else math.nan
