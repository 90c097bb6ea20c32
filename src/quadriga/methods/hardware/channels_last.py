"""Channels-last memory format: images as [batch, height, width, channels] in memory."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from torch import nn

from quadriga.core.errors import NotApplicable
from quadriga.core.method import Family, Method, Numerics
from quadriga.core.setup import Setup
from quadriga.methods.hardware._measured import faster


@dataclass(frozen=True, kw_only=True)
class ChannelsLast(Method):
    """Keep 4-dimensional weights and inputs in channels-last order, in training and in PyTorch's runtimes.

    Convolutions then skip a reordering. ONNX Runtime and OpenVINO choose their own layout and do not change.

    Args:
        keep: "always", or "faster": before a train step, only if a few training steps in the recipe's own runtime are measured
            to be faster with it, else the step is refused.

    Source: PyTorch, "Channels Last Memory Format in PyTorch".
    """

    family = Family.HARDWARE
    numerics = Numerics.CLOSE
    trains = True
    common = True
    source = "docs.pytorch.org/tutorials/intermediate/memory_format_tutorial.html"
    requires = frozenset({"IMAGES"})

    keep: Literal["always", "faster"] = "always"

    def apply(self, setup: Setup) -> Setup:
        """Set the memory format. NotApplicable without a 2-d convolution."""
        if not any(isinstance(module, nn.Conv2d | nn.ConvTranspose2d) for module in setup.model.modules()):
            raise NotApplicable("the model has no 2-d convolution, which is what gains from channels-last")
        if self.keep == "faster" and {"TRAIN_DATA"} <= setup.traits and "TRAINED" not in setup.traits:
            faster(setup, "training in channels-last", channels_last=True)
        return replace(setup, runtime=replace(setup.runtime, channels_last=True))
