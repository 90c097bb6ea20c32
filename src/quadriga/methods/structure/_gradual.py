"""Pruning in the course of a train step: how much has gone by when, and the hooks that let units and blocks fade."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from quadriga.core.batch import Batch, device_of, tensors
from quadriga.core.data import Data
from quadriga.core.errors import BadInput
from quadriga.core.slots import Hook

TIMES = 24  # that the choice is made anew, until all that has to go has gone


def share(progress: float) -> float:
    """Part of the final share that is gone at a progress: fast at first, when there is much to choose from, then slower.

    Source: Zhu & Gupta 2017, arXiv:1710.01878, equation 1.

    Example:
        >>> share(0.0), share(0.5), share(1.0), share(2.0)
        (0.0, 0.875, 1.0, 1.0)
    """
    return 1 - (1 - min(progress, 1.0)) ** 3


def check_gradual(name: str, value: float) -> None:
    """Raise BadInput unless it is a part of a train step."""
    if not 0 <= value <= 1:
        raise BadInput(f"{name}.gradual is {value!r}", "it is a part of the train step, from 0 (at once) to 1")


class Thinning(Hook):
    """Chooses anew now and then what goes, more each time, and keeps at zero after each step what is gone.

    Args:
        part: of the train step, after which all that has to go has gone.
    """

    def __init__(self, part: float) -> None:
        self.part, self.times = part, 0
        self.masks: list[tuple[Tensor, Tensor]] = []  # parameter, and the factor 0 or 1 that it is multiplied with

    def choose(self, share: float) -> None:
        """Decide what is gone at this share, and set `masks`."""
        raise NotImplementedError

    def after_step(self, model: nn.Module, progress: float) -> None:
        """Choose if it is time, and project."""
        due = int(min(progress / self.part, 1.0) * TIMES)
        if due > self.times:
            self.times = due
            self.choose(share(due / TIMES))
        self.project()

    def project(self) -> None:
        """Bring what is gone back to zero."""
        with torch.no_grad():
            for parameter, mask in self.masks:
                parameter.mul_(mask)

    def end(self, model: nn.Module, data: Iterable[Batch]) -> None:
        """Once more, in case another hook changed weights at the end."""
        self.project()


class BlockFade(Hook):
    """Lets blocks turn into the identity: x + gate · (block(x) − x), with a gate that falls from 1 to 0.

    A block that returns neither a tensor nor a tuple that begins with one works in full until it is taken out.
    """

    def __init__(self, model: nn.Module, names: Iterable[str], part: float) -> None:
        self.blocks = [model.get_submodule(name) for name in names]
        self.part, self.gate = part, torch.ones((), device=device_of(model))

    def train(self, model: nn.Module, data: Data) -> AbstractContextManager[Any]:
        """The gates are there as long as the steps last."""
        stack = ExitStack()
        for block in self.blocks:
            stack.callback(block.register_forward_hook(self._gate, with_kwargs=True).remove)
        return stack

    def _gate(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        before = next(iter(tensors((*args, *kwargs.values()))))
        if isinstance(output, Tensor):
            return before + self.gate.to(output.dtype) * (output - before)
        if type(output) in (tuple, list) and isinstance(output[0], Tensor):
            return type(output)((before + self.gate.to(output[0].dtype) * (output[0] - before), *output[1:]))
        return output

    def after_step(self, model: nn.Module, progress: float) -> None:
        """Close the gate a little; a train step that continues one finds it closed."""
        self.gate.fill_(min(float(self.gate), 1 - share(progress / self.part)))

    def state_dict(self) -> dict[str, Any]:
        """The gate."""
        return {"gate": float(self.gate)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """As it was."""
        self.gate.fill_(state["gate"])
