"""Early stopping: end a train step that no longer improves, with the best weights that it had."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

from torch import nn

from quadriga.core.data import Data
from quadriga.core.errors import NotApplicable
from quadriga.core.method import Family, Method, Numerics
from quadriga.core.setup import Setup
from quadriga.core.slots import Look
from quadriga.methods.training._ending import Copies, Ending, add_hook, copies


class Stopping(Ending):
    """Looks as `EarlyStopping` says.

    Attributes:
        best: the best quality.
        kept: the tensors it was measured with.
        mark: the quality that improvements are counted from.
        waited: looks since.
    """

    def __init__(self, method: EarlyStopping, model: nn.Module) -> None:
        super().__init__()
        self.method, self.interval = method, method.interval
        self.best: float | None = None
        self.mark: float | None = None
        self.kept: Copies | None = None
        self.waited, self.evaluated = 0, Copies()

    def begin(self, model: nn.Module, data: Data) -> None:
        """A train step that continues one that was stopped is given as much patience again."""
        super().begin(model, data)
        if self.stopped:
            self.stopped, self.waited = False, 0

    @contextmanager
    def eval(self, model: nn.Module) -> Iterator[None]:
        """Note the tensors as all other hooks want them evaluated: averages, with their statistics."""
        if self.raw is None:
            self.evaluated = copies(model)
        yield

    def look(self, model: nn.Module, look: Look) -> None:
        """Measure; keep what is better, stop after too long without it."""
        if look.progress < self.method.start:
            return
        assert look.quality is not None
        quality = look.quality()
        if math.isfinite(quality):
            if self.best is None or look.gain(quality, self.best) > 0:
                self.best, self.kept = quality, self.evaluated
            gain = math.inf if self.mark is None else look.gain(quality, self.mark)
            if gain > 0 and gain >= self.method.least:
                self.mark, self.waited = quality, -1
        self.evaluated = []
        self.waited += 1
        self.stopped = self.waited >= self.method.patience

    def leave(self, model: nn.Module) -> Copies | None:
        """The best."""
        return self.kept

    def state_dict(self) -> dict[str, Any]:
        """The best, and how long ago it was."""
        own = {"best": self.best, "mark": self.mark, "kept": self.kept, "waited": self.waited, "stopped": self.stopped}
        return {**super().state_dict(), **own}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """As it was."""
        super().load_state_dict(state)
        self.best, self.mark, self.kept = state["best"], state["mark"], state["kept"]
        self.waited, self.stopped = state["waited"], state["stopped"]


@dataclass(frozen=True, kw_only=True)
class EarlyStopping(Method):
    """Measure quality on val now and then; end the train step when it has not improved for some looks, and leave the weights
    that were best.

    Those are the weights as they are evaluated: with `ema`, `swa`, `lookahead` or an optimizer that averages, the averages
    and their batch statistics. It acts behind these wherever it stands. A train step that continues another goes on from the
    trained weights, not from the best, which it still leaves if it finds none that are better. Schedules know nothing of the
    stop: with a rate that falls to zero quality often rises until the end.

    Args:
        interval: of progress, from one look to the next; in (0, 1]. Weights after the last look are not considered.
        patience: looks without an improvement, after which training stops.
        least: the gain that counts as an improvement, in the metric's unit; smaller ones add up.
        start: the progress before which nothing is measured, in [0, 1). With pruning that is gradual, let it be where the
            pruning ends, or the best weights are those of a network that was not pruned yet.

    Source: Prechelt 1998, "Early stopping, but when?".
    """

    family = Family.TRAINING
    numerics = Numerics.CHANGED
    source = "https://doi.org/10.1007/3-540-49430-8_3"
    search: ClassVar = {"patience": (5, 3, 10)}
    requires = frozenset({"TRAIN_DATA"})

    interval: float = 0.05
    patience: int = 5
    least: float = 0.0
    start: float = 0.0

    def __post_init__(self) -> None:
        self.insist(
            ("interval", 0 < self.interval <= 1, "give a part of the train step, in (0, 1]"),
            ("patience", self.patience >= 1, "give at least 1 look"),
            ("least", self.least >= 0, "give a gain of at least 0"),
            ("start", 0 <= self.start < 1, "give a part of the train step, in [0, 1)"),
        )

    def apply(self, setup: Setup) -> Setup:
        if setup.context.evaluate is None:
            raise NotApplicable("nobody measures quality on val here", "run it in a study, or give the context `evaluate`")
        return add_hook(setup, partial(Stopping, self), "last")
