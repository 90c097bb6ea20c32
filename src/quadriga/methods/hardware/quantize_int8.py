"""int8 weights, and int8 activations where asked."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from torch import nn

from quadriga.core.errors import BadInput, NotApplicable, did_you_mean
from quadriga.core.method import Family, Method, Numerics
from quadriga.core.setup import Setup
from quadriga.core.slots import QuantSpec
from quadriga.methods.hardware._needs import int8_runs

PRODUCTS = (nn.Linear, nn.modules.conv._ConvNd)
TYPES = (*PRODUCTS, nn.RNNBase, nn.Embedding)


@dataclass(frozen=True, kw_only=True)
class QuantizeInt8(Method):
    """Store weights as 8-bit integers w ≈ s·q with a scale per output channel; realised by the runtime at the end.

    Args:
        activations: "static" rounds activations too, at scales seen on calibration data: fastest for convolutions;
            "dynamic" finds scales at run time: for linear and recurrent layers; "weights" computes in float from
            int8 storage: a quarter of the bytes at unchanged speed.
        per_channel: a scale per output channel, else one per tensor.
        calibration: "minmax" covers all seen values; "percentile" clips outliers.
        keep_float: names of layers that stay float.

    Source: Jacob et al. 2018, arXiv:1712.05877; Krishnamoorthi 2018, arXiv:1806.08342.
    """

    family = Family.HARDWARE
    numerics = Numerics.CHANGED
    source = "arXiv:1712.05877"
    search: ClassVar = {"activations": ("static", "dynamic", "weights"), "calibration": ("minmax", "percentile")}
    requires = frozenset({"TRAINED", "FLOAT_WEIGHTS"})
    removes = frozenset({"FLOAT_WEIGHTS"})

    activations: Literal["static", "dynamic", "weights"] = "static"
    per_channel: bool = True
    calibration: Literal["minmax", "percentile"] = "minmax"
    keep_float: tuple[str, ...] = ()

    def apply(self, setup: Setup) -> Setup:
        """Write the specification. NotApplicable without a layer to quantize, or without what `activations` needs."""
        layers = {name: module for name, module in setup.model.named_modules() if name}
        for name in self.keep_float:
            if name not in layers:
                raise BadInput(f'quantize_int8.keep_float: there is no layer "{name}"', did_you_mean(name, layers))
        wanted = PRODUCTS if self.activations == "static" else TYPES
        rest = [m for n, m in layers.items() if not any(n == k or n.startswith(f"{k}.") for k in self.keep_float)]
        if not any(isinstance(module, wanted) for module in (*rest, *([] if layers else [setup.model]))):
            raise NotApplicable(f"there is no layer for {self.activations} int8", "" if layers else "give a model with layers")
        if self.activations == "static" and not setup.context.calibration:
            raise NotApplicable("static int8 needs calibration batches", 'give data, or use activations = "weights"')
        activations = "none" if self.activations == "weights" else self.activations
        spec = QuantSpec(8, activations, self.per_channel, self.calibration, self.keep_float)
        runtime = replace(setup.runtime, quant=spec)
        if "RUNTIME" in setup.traits:
            int8_runs(runtime)
        return replace(setup, runtime=runtime)
