"""Channels-last memory format: images as [batch, height, width, channels] in memory."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import nn

from quadriga.core.errors import NotApplicable
from quadriga.core.method import Family, Method, Numerics
from quadriga.core.setup import Setup


@dataclass(frozen=True, kw_only=True)
class ChannelsLast(Method):
    """Keep 4-dimensional weights and inputs in channels-last order, in training and in PyTorch's runtimes.

    Convolutions then skip a reordering. ONNX Runtime and OpenVINO choose their own layout and do not change.

    Source: PyTorch, "Channels Last Memory Format in PyTorch".
    """

    family = Family.HARDWARE
    numerics = Numerics.CLOSE
    source = "docs.pytorch.org/tutorials/intermediate/memory_format_tutorial.html"
    requires = frozenset({"IMAGES"})

    def apply(self, setup: Setup) -> Setup:
        """Set the memory format. NotApplicable without a 2-d convolution."""
        if not any(isinstance(module, nn.Conv2d | nn.ConvTranspose2d) for module in setup.model.modules()):
            raise NotApplicable("the model has no 2-d convolution, which is what gains from channels-last")
        return replace(setup, runtime=replace(setup.runtime, channels_last=True))
