"""Weights of two bytes in the finished model."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch

from quadriga.core.errors import NotApplicable
from quadriga.core.method import Family, Method, Numerics
from quadriga.core.setup import Setup
from quadriga.methods.hardware._measured import native
from quadriga.methods.hardware._needs import ends_on, half_runs

LARGEST = torch.finfo(torch.float16).max


@dataclass(frozen=True, kw_only=True)
class HalfWeights(Method):
    """Finish with weights in bfloat16 or float16: half the bytes; norms, inputs and outputs stay float32.

    PyTorch's runtimes compute in that type, OpenVINO computes in bfloat16 for "bf16"; ONNX Runtime, and OpenVINO for "fp16",
    store the weights so and compute in float32 at unchanged speed. Training, before and after, keeps its float32 weights.

    Args:
        kind: "bf16", the range of float32 with 8 bits of precision, or "fp16", 11 bits in a narrower range.

    Source: Kalamkar et al. 2019, arXiv:1905.12322 (bfloat16); IEEE 754-2008 (binary16).
    """

    family = Family.HARDWARE
    numerics = Numerics.CHANGED
    source = "arXiv:1905.12322"
    search: ClassVar = {"kind": ("bf16", "fp16")}
    requires = frozenset({"TRAINED", "FLOAT_WEIGHTS"})
    removes = frozenset({"FLOAT_WEIGHTS"})

    kind: Literal["bf16", "fp16"] = "bf16"

    def apply(self, setup: Setup) -> Setup:
        """Write the type. NotApplicable for weights that are not float32, that float16 cannot hold, or where it would crawl."""
        weights = [p.detach() for p in setup.model.parameters() if p.is_floating_point()]
        if not weights or any(w.dtype is not torch.float32 for w in weights):
            raise NotApplicable("the model's weights are not float32", "half_weights starts from float32 weights")
        if self.kind == "fp16" and any(bool((w.abs() > LARGEST).any()) for w in weights):
            raise NotApplicable(f"a weight is larger than {LARGEST:,.0f}, the largest number of float16", 'use kind = "bf16"')
        if setup.ending.by_torch:
            native(self.kind, ends_on(setup))
        chosen = replace(setup.runtime, weights=self.kind)
        if "RUNTIME" in setup.traits:
            half_runs(chosen)
        return replace(setup, runtime=chosen)
