"""int8 weights, and int8 activations where asked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from torch import nn

from quadriga.core.errors import BadInput, NotApplicable, did_you_mean
from quadriga.core.method import Family, Method, Numerics
from quadriga.core.setup import PROBE, Setup
from quadriga.core.slots import QuantSpec
from quadriga.methods.hardware._needs import int8_runs
from quadriga.methods.hardware._simulate import (
    PRODUCTS,
    fewest_floats,
    output_errors,
    products,
    roundings,
    simulated,
    squared_error,
    watch,
)

TYPES = (*PRODUCTS, nn.RNNBase, nn.Embedding)
BATCHES = 8  # of calibration data
ERROR = 0.05  # ‖int8 − float‖ / ‖float‖ of the outputs, that is enough where no floor is known


@dataclass(frozen=True, kw_only=True)
class QuantizeInt8(Method):
    """Store weights as 8-bit integers w ≈ s·q with a scale per output channel; realised by the runtime at the end.

    Args:
        activations: "static" rounds activations too, at scales seen on calibration data: fastest for convolutions;
            "dynamic" finds scales at run time: for linear and recurrent layers; "weights" computes in float from
            int8 storage: a quarter of the bytes at unchanged speed.
        per_channel: a scale per output channel, else one per tensor.
        calibration: the range of static activations: "minmax" covers all seen values; "percentile" leaves out one in 10,000 on
            each side; "mse" has the smallest mean squared error.
        sensitive: "float" leaves the linear and convolution layers that hurt in float, as few as bring a simulation of int8
            within the floor on val; where no floor is known, within an output error of 5 % on calibration data. The layers with
            most error per multiplication are first. A cost probe, which has no trained weights, leaves none out.
        keep_float: names of layers that stay float in any case.

    Source: Jacob et al. 2018, arXiv:1712.05877; Krishnamoorthi 2018, arXiv:1806.08342; Wu et al. 2020, arXiv:2004.09602,
    section 6.1 (layers left out by sensitivity).
    """

    family = Family.HARDWARE
    numerics = Numerics.CHANGED
    source = "arXiv:1712.05877"
    search: ClassVar = {
        "activations": ("static", "dynamic", "weights"),
        "calibration": ("minmax", "percentile", "mse"),
        "sensitive": ("int8", "float"),
    }
    requires = frozenset({"TRAINED", "FLOAT_WEIGHTS"})
    removes = frozenset({"FLOAT_WEIGHTS"})

    activations: Literal["static", "dynamic", "weights"] = "static"
    per_channel: bool = True
    calibration: Literal["minmax", "percentile", "mse"] = "minmax"
    sensitive: Literal["int8", "float"] = "int8"
    keep_float: tuple[str, ...] = ()

    def apply(self, setup: Setup) -> Setup:
        """Write the specification. NotApplicable without a layer to quantize, or without what `activations` needs."""
        layers = {name: module for name, module in setup.model.named_modules() if name}
        for name in self.keep_float:
            if name not in layers:
                raise BadInput(f'quantize_int8.keep_float: there is no layer "{name}"', did_you_mean(name, layers))
        wanted = PRODUCTS if self.activations == "static" else TYPES
        rest = [m for n, m in layers.items() if not self._kept(n)]
        if not any(isinstance(module, wanted) for module in (*rest, *([] if layers else [setup.model]))):
            raise NotApplicable(f"there is no layer for {self.activations} int8", "" if layers else "give a model with layers")
        if self.activations == "static" and not setup.context.calibration:
            raise NotApplicable("static int8 needs calibration batches", 'give data, or use activations = "weights"')
        spec = QuantSpec(8, self._rounded, self.per_channel, self.calibration, self.keep_float)
        if "RUNTIME" in setup.traits:
            int8_runs(replace(setup.runtime, quant=spec))
        spec = replace(spec, keep_float=(*self.keep_float, *self._harmful(setup)))
        return replace(setup, runtime=replace(setup.runtime, quant=spec))

    @property
    def _rounded(self) -> str:
        return "none" if self.activations == "weights" else self.activations

    def _kept(self, name: str) -> bool:
        return any(name == k or name.startswith(f"{k}.") for k in self.keep_float)

    def _harmful(self, setup: Setup) -> list[str]:
        """Which further layers stay float, decided once. NotApplicable where only a float model would be good enough."""
        if self.sensitive == "int8" or PROBE in setup.traits or not setup.context.calibration:
            return []
        found = setup.context.decide("layers left in float", lambda: self._measured(setup))
        if found is None:
            raise NotApplicable("int8 is not good enough in any layer", 'use sensitive = "int8" and train for it with qat')
        return list(found)

    def _measured(self, setup: Setup) -> list[str] | None:
        model, batches = setup.model, setup.context.calibration[:BATCHES]
        seen = watch(model, [name for name in products(model) if not self._kept(name)], batches)
        layers = roundings(seen, self._rounded, self.calibration)
        enough, evaluate = setup.context.enough, setup.context.evaluate
        own = evaluate(model) if enough is not None and evaluate is not None else None

        def holds(left: Sequence[str]) -> bool:
            rounded = {name: one for name, one in layers.items() if name not in left}
            if enough is None:
                return squared_error(model, rounded, batches) <= ERROR**2
            with simulated(model, rounded):
                return enough(model, own)

        return fewest_floats(output_errors(model, layers, batches), {n: one.products for n, one in seen.items()}, holds)
