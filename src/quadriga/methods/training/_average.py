"""Weights kept beside the trained ones, which the model is evaluated with and ends with: averages, and slow weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from quadriga.core.batch import Batch, device_of
from quadriga.core.data import Data
from quadriga.core.errors import NotApplicable
from quadriga.core.half import HALF
from quadriga.core.norms import BATCH_NORMS, reestimate
from quadriga.core.setup import Setup
from quadriga.core.spread import local
from quadriga.methods.training._ending import Copies, Ending, copies

LOOK, END = 16, 50  # batches for the statistics of batch normalization, in the course of training and at its end


def trained(model: nn.Module) -> dict[str, Tensor]:
    """The floating parameters that training changes, each once, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad and p.is_floating_point()}


def spread(data: Data, size: int, limit: int, device: torch.device | str = "cpu") -> Iterator[Batch]:
    """At most `limit` batches of at most `size` examples, each from all over the split, which may be sorted.

    Example:
        >>> from quadriga.core.data import TensorData
        >>> [batch.index.tolist() for batch in spread(TensorData(torch.zeros(10)), size=2, limit=3)]
        [[0, 5], [1, 6], [3, 8]]
    """
    count = min(len(data), size * limit)
    places, number = torch.arange(count) * len(data) // count, -(-count // size)
    for k in range(number):
        yield data.batch(places[k::number]).to(device)


class Beside(Ending):
    """Keeps a second set of the trained parameters, shows it to evaluations and leaves it at the end.

    Batch statistics are estimated anew for it, and put back after an evaluation. A weight that is exactly zero among the
    trained ones (pruned, or by a proximal l1) is zero here too, whatever it was before.

    Args:
        model: whose parameters to follow.
        size: examples of a batch for the statistics.

    Attributes:
        weights: the second set; in float32 for parameters in half precision, which cannot hold small changes.
        count: steps that were seen.
        known: whether the second set means something yet.
    """

    known = True

    def __init__(self, model: nn.Module, size: int) -> None:
        super().__init__()
        named = trained(model)
        self.names, self.params, self.size, self.count = list(named), list(named.values()), size, 0
        self.uniform = not any(p.dtype in HALF.values() for p in self.params)
        self.weights = [p.float().clone() if p.dtype in HALF.values() else p.detach().clone() for p in self.here()]

    def here(self) -> list[Tensor]:
        """What of the trained parameters lies in this process."""
        return [local(p.detach()) for p in self.params]

    def begin(self, model: nn.Module, data: Data) -> None:
        """Where no step was seen yet, begin with the weights as they are."""
        super().begin(model, data)
        if not self.count:
            with torch.no_grad():
                torch._foreach_copy_(self.weights, self.here())

    @torch.no_grad()
    def move(self, share: float) -> None:
        """weights ← (1 - share) · weights + share · parameters."""
        params = self.here()
        if not self.uniform:
            params = [p.to(w.dtype) for p, w in zip(params, self.weights, strict=True)]
        torch._foreach_lerp_(self.weights, params, share)

    @contextmanager
    def shown(self, model: nn.Module, limit: int) -> Iterator[None]:
        """The second set in the model, with statistics from so many batches; afterwards all is as before to the bit."""
        norms = [b for m in model.modules() if isinstance(m, BATCH_NORMS) for b in m.buffers(recurse=False)]
        kept = [(t, t.detach().clone()) for t in (*self.here(), *norms)]
        with torch.no_grad():
            for p, w in zip(self.here(), self.weights, strict=True):
                p.copy_(w.masked_fill(p == 0, 0))
        try:
            if self.data is not None:
                reestimate(model, spread(self.data, self.size, limit, device_of(model)), limit)
            yield
        finally:
            with torch.no_grad():
                for tensor, value in kept:
                    tensor.copy_(value)

    @contextmanager
    def eval(self, model: nn.Module) -> Iterator[None]:
        """The second set for a while; after the end the model has it anyway."""
        if self.raw is not None or not self.known:
            yield
            return
        with self.shown(model, LOOK):
            yield

    def leave(self, model: nn.Module) -> Copies | None:
        """The second set, with its statistics."""
        if not self.known:
            return None
        with self.shown(model, END):
            return copies(model)

    def state_dict(self) -> dict[str, Any]:
        """The second set too."""
        return {**super().state_dict(), "weights": dict(zip(self.names, self.weights, strict=True)), "count": self.count}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """As it was."""
        super().load_state_dict(state)
        self.count = state["count"]
        for name, weight in zip(self.names, self.weights, strict=True):
            weight.copy_(local(state["weights"][name]))


class Average(Beside):
    """An average of the weights that the steps went through."""


def check(setup: Setup, name: str) -> None:
    """Raises NotApplicable where nothing is trained, or what is evaluated is other than what is trained already."""
    if not trained(setup.model):
        raise NotApplicable("no floating parameter is trained", "put it before the step that freezes them")
    if setup.optimizer.make_hooks:
        raise NotApplicable(f"the optimizer averages its weights already, so that {name} has nothing to add", "leave it out")


def check_average(setup: Setup, name: str) -> None:
    """As `check`. Raises NotApplicable where another average stands, since a model can end with one only."""
    check(setup, name)
    makers = [make.func for make in setup.training.make_hooks if isinstance(make, partial)]
    if any(isinstance(maker, type) and issubclass(maker, Average) for maker in makers):
        raise NotApplicable("another average of the weights stands already", "take one of them")
