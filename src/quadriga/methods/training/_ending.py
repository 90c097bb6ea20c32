"""Hooks that leave other weights at the end of a train step than those that were trained, and the order of such hooks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from quadriga.core.batch import Batch
from quadriga.core.data import Data
from quadriga.core.setup import Setup
from quadriga.core.slots import Hook
from quadriga.core.spread import local

Copies = dict[str, Tensor]
MakeHook = Callable[[nn.Module], Hook]


def copies(model: nn.Module) -> Copies:
    """A copy of what lies here of every parameter and buffer, by name, each once."""
    return {name: local(t.detach()).clone() for name, t in (*model.named_parameters(), *model.named_buffers())}


@torch.no_grad()
def put(model: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Copy values, as from `copies`, into a model of the same kind."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        local(tensor).copy_(local(values[name]))


class Ending(Hook):
    """Leaves what `leave` gives in the model at the end; a train step that continues goes on from the trained weights.

    Both are taken when the last step is over and before any hook's `end`, so that however many such hooks there are, each
    keeps the same trained weights, and it does not matter in which order they put them back.
    """

    spreads = True

    def __init__(self) -> None:
        self.raw: Copies | None = None  # the trained tensors, once other ones are left
        self.left: Copies | None = None
        self.data: Data | None = None

    def leave(self, model: nn.Module) -> Copies | None:
        """What the model gets, as `copies`; None for what it has."""
        raise NotImplementedError

    def begin(self, model: nn.Module, data: Data) -> None:
        """Steps are about to be made."""
        self.data = data
        if self.raw is not None:
            put(model, self.raw)
            self.raw = None

    @contextmanager
    def train(self, model: nn.Module, data: Data) -> Iterator[None]:
        """Back to the trained weights; afterwards, unless it was broken off, keep them."""
        self.begin(model, data)
        yield
        self.left = self.leave(model)
        self.raw = None if self.left is None else copies(model)

    def end(self, model: nn.Module, data: Iterable[Batch]) -> None:
        """Leave what was chosen."""
        if self.left is not None:
            put(model, self.left)
            self.left = None

    def state_dict(self) -> dict[str, Any]:
        """The trained weights, where the model has others."""
        return {"raw": self.raw}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """As it was."""
        self.raw = state["raw"]


@dataclass(frozen=True)
class Last:
    """Makes a hook that has to stay behind those that come later."""

    make: MakeHook

    def __call__(self, model: nn.Module) -> Hook:
        return self.make(model)


def add_hook(setup: Setup, make: MakeHook, place: Literal["first", "next", "last"] = "next") -> Setup:
    """The setup with one more hook.

    Args:
        setup: to be changed.
        make: model → hook.
        place: "first" is before all that stand there (behind the optimizer's), for a hook that belongs to the update and whose
            weights others project; "next" is behind them, for one that reads the projected weights; "last" is behind those
            too that are added as "next" later, for one that has the last word on the weights.
    """
    hooks = setup.training.make_hooks
    if place == "first":
        hooks = (make, *hooks)
    elif place == "last":
        hooks = (*hooks, Last(make))
    else:
        at = next((i for i, other in enumerate(hooks) if isinstance(other, Last)), len(hooks))
        hooks = (*hooks[:at], make, *hooks[at:])
    return replace(setup, training=replace(setup.training, make_hooks=hooks))
