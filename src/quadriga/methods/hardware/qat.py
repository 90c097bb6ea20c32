"""Quantization-aware training: train under the rounding of int8."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from quadriga.core.data import Data
from quadriga.core.errors import NotApplicable
from quadriga.core.method import Family, Method, Numerics
from quadriga.core.setup import Setup
from quadriga.core.slots import Hook
from quadriga.methods.hardware._simulate import Rounding, products, simulated

MOMENTUM = 0.05  # with which the range of a layer's inputs follows the batches' own


class RoundedTraining(Hook):
    """Lets layers round in training and in evaluations during it; their ranges follow the batches."""

    def __init__(self, method: QAT, model: nn.Module) -> None:
        self.start = method.start
        one = partial(Rounding, method.rounded, method.bits, momentum=MOMENTUM, acts=not method.start)
        self.layers = {name: one() for name in products(model)}

    def train(self, model: nn.Module, data: Data) -> AbstractContextManager[Any]:
        """The layers round as long as the steps last; the model ends with the weights that were rounded, in float."""
        return simulated(model, self.layers)

    def after_step(self, model: nn.Module, progress: float) -> None:
        """Begin when it is time."""
        for one in self.layers.values():
            one.acts = progress >= self.start

    def state_dict(self) -> dict[str, Any]:
        """The ranges so far, and whether it has begun."""
        seen = {name: one for name, one in self.layers.items() if one.low is not None}
        ends = {name: [torch.as_tensor(end) for end in (one.low, one.high)] for name, one in seen.items()}
        return {"acts": any(one.acts for one in self.layers.values()), "ends": ends}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """As it was."""
        for name, one in self.layers.items():
            one.acts = bool(state["acts"])
            low, high = state["ends"].get(name, (None, None))
            one.low, one.high = (low.clone(), high.clone()) if isinstance(low, Tensor) else (None, None)


@dataclass(frozen=True, kw_only=True)
class QAT(Method):
    """In the `train` step that follows, linear and convolution layers round weights and inputs as int8 will; gradients pass.

    The weights stay float; `quantize_int8` behind the train step makes them integers. With `distill` before the train step the
    float teacher guides the rounded student. Attention that PyTorch fuses with its layers' weights is not rounded.

    Args:
        activations: what `quantize_int8` will do: "static" rounds inputs in ranges that follow the batches, "dynamic" in each
            batch's own range, "weights" leaves them.
        bits: of the weights, 2 to 8.
        start: part of the train step after which rounding begins; in [0, 1).

    Source: Jacob et al. 2018, arXiv:1712.05877, section 3; Mishra and Marr 2018, arXiv:1711.05852 (with distillation).
    """

    family = Family.HARDWARE
    numerics = Numerics.CHANGED
    source = "arXiv:1712.05877"
    search: ClassVar = {"activations": ("static", "dynamic", "weights"), "start": (0.0, 0.5)}
    requires = frozenset({"TRAIN_DATA", "FLOAT_WEIGHTS"})
    writes = frozenset({"training"})
    trains = True
    shapes = False
    name = "qat"

    activations: Literal["static", "dynamic", "weights"] = "static"
    bits: int = 8
    start: float = 0.0

    def __post_init__(self) -> None:
        self.insist(
            ("start", 0 <= self.start < 1, "it is a part of the train step, from 0 to below 1"),
            ("bits", 2 <= self.bits <= 8, "weights have 2 to 8 bits"),
        )

    @property
    def rounded(self) -> str:
        """What the layers' inputs are rounded by."""
        return "none" if self.activations == "weights" else self.activations

    def apply(self, setup: Setup) -> Setup:
        """Add the hook. NotApplicable without a layer that rounds, or where the step is compiled."""
        if not products(setup.model):
            raise NotApplicable("the model has no linear or convolution layer")
        if setup.runtime.compile or setup.context.runtime.compile:
            raise NotApplicable("a compiled training step does not see the rounding", "leave out compile")
        training = setup.training
        return replace(setup, training=replace(training, make_hooks=(*training.make_hooks, partial(RoundedTraining, self))))
