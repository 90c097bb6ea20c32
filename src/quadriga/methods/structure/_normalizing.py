"""Modules that normalize by running statistics: what the normalization is, and what they compute behind it."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from quadriga.core.batch import Tree
from quadriga.core.errors import NotApplicable
from quadriga.core.plain import hooked
from quadriga.verify.promise import answer


@dataclass(frozen=True)
class Statistics:
    """What a batch normalization computes: (x − mean) / √(var + eps) · gain + bias, along axis 1.

    Args:
        mean, var: running statistics, [channels].
        gain, bias: [channels], or None for 1 and 0.
        eps: added to the variance.
    """

    mean: Tensor
    var: Tensor
    gain: Tensor | None
    bias: Tensor | None
    eps: float

    def __call__(self, x: Tensor) -> Tensor:
        """x[batch, channels, ...] normalized."""
        return functional.batch_norm(x, self.mean, self.var, self.gain, self.bias, eps=self.eps)

    def affine(self) -> tuple[Tensor, Tensor]:
        """(scale, shift), float64 [channels]: the same as x · scale + shift."""
        scale = torch.rsqrt(self.var.detach().double() + self.eps)
        shift = -self.mean.detach().double() * scale
        if self.gain is not None:
            scale, shift = scale * self.gain.detach().double(), shift * self.gain.detach().double()
        return scale, shift if self.bias is None else shift + self.bias.detach().double()


class Rest:
    """What a module that normalizes computes after that: nothing, or its parts one after the other (an activation).

    Args:
        module: whose call is watched.
        statistics: of its normalization.
    """

    def __init__(self, module: nn.Module, statistics: Statistics) -> None:
        self.module, self.statistics = module, statistics
        self.value: Tensor | None = None  # what comes next, as far as it is known
        self.parts, self.reason, self.calls = list[nn.Module](), "", 0

    def watch(self, stack: ExitStack) -> None:
        """Until the stack is closed."""
        for part in self.module.children():
            stack.callback(part.register_forward_pre_hook(self._before_part).remove)
            stack.callback(part.register_forward_hook(self._after_part).remove)
        stack.callback(self.module.register_forward_pre_hook(self._begin).remove)
        stack.callback(self.module.register_forward_hook(self._end).remove)

    def made(self) -> nn.Module:
        """What takes the module's place.

        Raises:
            NotApplicable: it computes something else too.
        """
        if self.reason or self.calls != 1:
            raise NotApplicable(self.reason or f"is called {self.calls} times")
        parts = [p for p in self.parts if type(p) is not nn.Identity]
        return parts[0] if len(parts) == 1 else nn.Sequential(*parts) if parts else nn.Identity()

    def _begin(self, module: nn.Module, args: Any) -> None:
        self.calls += 1
        self.value = self.statistics(args[0]) if len(args) == 1 else None

    def _before_part(self, part: nn.Module, args: Any) -> None:
        self._meets(args[0] if len(args) == 1 else None)

    def _after_part(self, part: nn.Module, args: Any, output: Any) -> None:
        self.value = output
        self.parts.append(part)

    def _end(self, module: nn.Module, args: Any, output: Any) -> None:
        self._meets(output)
        self.value = None

    def _meets(self, found: Any) -> None:
        if found is self.value and found is not None:
            return
        expected, close = self.value, False
        if isinstance(found, Tensor) and isinstance(expected, Tensor) and found.shape == expected.shape and not self.parts:
            close = torch.allclose(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
        if not close:
            self.reason = f"is a {type(self.module).__name__} that computes more than a normalization and its parts in a row"


def rests(model: nn.Module, example: Tree, norms: Sequence[tuple[str, Statistics]]) -> list[Rest]:
    """What modules that normalize compute behind it, as one call of the model shows.

    Args:
        norms: path of each module, and the statistics that it normalizes by.
    """
    found = [Rest(model.get_submodule(path), statistics) for path, statistics in norms]
    for rest in found:
        rest.reason = "has a hook" if hooked(rest.module) else ""
    with ExitStack() as stack:
        for rest in found:
            rest.watch(stack)
        answer(model, example)
    return found
