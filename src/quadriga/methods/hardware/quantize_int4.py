"""4-bit weights."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from torch import nn

from quadriga.core.errors import BadInput, NotApplicable, did_you_mean
from quadriga.core.method import Family, Method, Numerics
from quadriga.core.setup import Setup
from quadriga.core.slots import QuantSpec
from quadriga.methods.hardware._needs import int8_runs


@dataclass(frozen=True, kw_only=True)
class QuantizeInt4(Method):
    """Store the matrices of linear layers as 4-bit integers with a scale per group of inputs, other weights as 8-bit ones.

    About a seventh of the bytes; products stay float. Speed changes only where reading the weights is what takes the time, as
    in large models at batch 1, and the runtime keeps them small in memory, which OpenVINO does.

    Args:
        group: inputs that share a scale: 32 is the most accurate, 128 the smallest; where it does not divide a layer's inputs,
            they share one.
        keep_float: names of layers that stay float.

    Source: Dettmers and Zettlemoyer 2023, arXiv:2212.09720 (4 bits, small groups).
    """

    family = Family.HARDWARE
    numerics = Numerics.CHANGED
    source = "arXiv:2212.09720"
    search: ClassVar = {"group": (32, 64, 128)}
    requires = frozenset({"TRAINED", "FLOAT_WEIGHTS"})
    removes = frozenset({"FLOAT_WEIGHTS"})

    group: int = 32
    keep_float: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        self.insist(("group", self.group >= 1, "it is a number of inputs, such as 32"))

    def apply(self, setup: Setup) -> Setup:
        """Write the specification. NotApplicable without a linear layer."""
        layers = dict(setup.model.named_modules())
        for name in self.keep_float:
            if name not in layers:
                raise BadInput(f'quantize_int4.keep_float: there is no layer "{name}"', did_you_mean(name, layers))
        kept = tuple(f"{name}." for name in self.keep_float)
        if not any(isinstance(m, nn.Linear) and not f"{name}.".startswith(kept) for name, m in layers.items()):
            raise NotApplicable("there is no linear layer", "use quantize_int8")
        spec = QuantSpec(weights=4, activations="none", keep_float=self.keep_float, group=self.group)
        if "RUNTIME" in setup.traits:
            int8_runs(replace(setup.runtime, quant=spec))
        return replace(setup, runtime=replace(setup.runtime, quant=spec))
