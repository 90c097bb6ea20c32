"""Mixed precision: training computes in bfloat16 or float16 where that is safe, and keeps its weights in float32."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import ClassVar, Literal

import torch
from torch import nn

from quadriga.core.errors import NotApplicable
from quadriga.core.half import HALF
from quadriga.core.method import Family, Method, Numerics
from quadriga.core.setup import Setup
from quadriga.methods.hardware._measured import faster, native
from quadriga.methods.hardware._needs import ends_on


@cache
def lstm_trains(kind: str) -> bool:
    """Whether this processor runs a training LSTM under autocast: oneDNN has none for types that it lacks products of."""
    try:
        with torch.random.fork_rng(devices=[]), torch.enable_grad(), torch.autocast("cpu", HALF[kind]):
            nn.LSTM(8, 8)(torch.zeros(2, 1, 8))
    except RuntimeError:
        return False
    return True


@dataclass(frozen=True, kw_only=True)
class MixedPrecision(Method):
    """Train under autocast: products and convolutions compute in half precision, sums, norms and losses in float32.

    Weights, gradients and the optimizer stay float32, and so does the finished model. With "fp16" the loss is scaled, so that
    small gradients do not become zero, and a step whose scaled gradients overflow is left out.

    Args:
        kind: "bf16", the range of float32 with 8 bits of precision, or "fp16".
        keep: "faster": only if a few training steps in the recipe's own runtime are measured to be faster with it, else the
            step is refused (bf16 alone trained a small CNN at 0.83× on a CPU, with channels-last at 1.17×); "always".

    Source: Micikevicius et al. 2018, arXiv:1710.03740; Kalamkar et al. 2019, arXiv:1905.12322 (bfloat16).
    """

    family = Family.HARDWARE
    numerics = Numerics.CHANGED
    source = "arXiv:1710.03740, arXiv:1905.12322"
    search: ClassVar = {"kind": ("bf16", "fp16")}
    requires = frozenset({"TRAIN_DATA", "FLOAT_WEIGHTS"})
    trains = True

    kind: Literal["bf16", "fp16"] = "bf16"
    keep: Literal["faster", "always"] = "faster"

    def apply(self, setup: Setup) -> Setup:
        """Ask for autocast. NotApplicable where it is there already, cannot run, or is not faster."""
        if setup.runtime.autocast != "none":
            raise NotApplicable(f"training is in {setup.runtime.autocast} already", "keep one mixed_precision step")
        if any(p.is_floating_point() and p.dtype is not torch.float32 for p in setup.model.parameters()):
            raise NotApplicable("the model's weights are not float32", "autocast starts from float32 weights")
        if (device := ends_on(setup)) != "cpu":
            native(self.kind, device)
        recurrent = any(isinstance(m, nn.LSTM) for m in setup.model.modules())
        if recurrent and device == "cpu" and not lstm_trains(self.kind):
            raise NotApplicable(f"this processor trains no LSTM in {self.kind}", "keep float32")
        after = replace(setup, runtime=replace(setup.runtime, autocast=self.kind))
        if self.keep == "faster":
            faster(setup, f"training in {self.kind}", autocast=self.kind)
        return after
