"""int8 by PT2E: operations that quantize and dequantize around the products of a captured program, at calibrated scales."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from importlib import util
from typing import Any

import torch
from torch import Tensor, fx

from quadriga.core.batch import resize, tensors
from quadriga.core.errors import NotApplicable
from quadriga.core.quiet import quiet
from quadriga.core.slots import QuantSpec
from quadriga.runtime._capture import Capture
from quadriga.runtime._int8 import BATCHES, ROWS
from quadriga.runtime._reexport import reexport

EPSILON = 2**-12  # the smallest scale, as both quantizers of PyTorch have it


def needs_torchao() -> None:
    """Refuse where torchao, which holds PT2E's quantizers, is absent."""
    if util.find_spec("torchao") is None:
        raise NotApplicable("int8 activations in PyTorch need the package torchao", "pip install quadriga[pt2e]")


def quantize(taken: Capture, quant: QuantSpec, quantizer: Any, most: int | None = None) -> Capture:
    """Quantize a captured program where a quantizer says so.

    Args:
        taken: the float program and the calibration batches; it stays.
        quant: "static" observes `BATCHES` calibration batches; `keep_float` names layers by their module path.
        quantizer: of torchao or of a runtime: it annotates which tensors become int8, and how.
        most: as `reexport` takes it.

    Returns:
        A capture whose program holds int8 weights, and operations of `torch.ops.quantized_decomposed`.

    Raises:
        NotApplicable: there are no calibration batches, or nothing to quantize.

    Source: Jacob et al. 2018, arXiv:1712.05877; PyTorch, "PyTorch 2 Export Post Training Quantization".
    """
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    if quant.activations == "static" and not taken.calibration:
        raise NotApplicable("static int8 needs calibration batches", "give the workload training data")
    with torch.no_grad(), quiet("torchao"):
        module = prepare_pt2e(taken.program.module(check_guards=False), _leave_out(quantizer, quant.keep_float))
        for leaves in _batches(taken):
            module(*leaves)
        converted = convert_pt2e(module)
    if not any(_is_weight(node) for node in converted.graph.nodes):
        raise NotApplicable(f"there is no layer for {quant.activations} int8")
    return reexport(taken, converted, most)


def observed(config: Any, quant: QuantSpec) -> Any:
    """A quantizer's configuration with the scales of activations found as the specification says.

    "minmax" covers all values seen; "percentile" and "mse" clip where a histogram's squared error is least.
    """
    from torchao.quantization.pt2e import HistogramObserver, MinMaxObserver

    if quant.activations != "static":
        return config
    kind = MinMaxObserver if quant.calibration == "minmax" else HistogramObserver
    spec = replace(config.input_activation, observer_or_fake_quant_ctr=kind.with_args(eps=EPSILON))
    return replace(config, input_activation=spec, output_activation=spec)


def _batches(taken: Capture) -> Iterator[tuple[Tensor, ...]]:
    """Calibration inputs; a dynamic quantizer observes nothing, and is run once."""
    for batch in taken.calibration[:BATCHES]:
        yield tuple(tensors(resize(batch.inputs, min(len(batch), ROWS))))
    if not taken.calibration:
        yield taken.example


def _leave_out(quantizer: Any, layers: tuple[str, ...]) -> Any:
    """A quantizer that takes its annotations from these layers again."""
    from torchao.quantization.pt2e.quantizer import Quantizer

    class Rest(Quantizer):
        def transform_for_annotation(self, model: fx.GraphModule) -> fx.GraphModule:
            return quantizer.transform_for_annotation(model)

        def annotate(self, model: fx.GraphModule) -> fx.GraphModule:
            quantizer.annotate(model)
            for node in model.graph.nodes:
                if _inside(node, layers):
                    node.meta.pop("quantization_annotation", None)
            return model

        def validate(self, model: fx.GraphModule) -> None:
            quantizer.validate(model)

    return Rest() if layers else quantizer


def _inside(node: fx.Node, layers: tuple[str, ...]) -> bool:
    paths = [
        path.removeprefix("L['self'].").removeprefix("model.") for path, _ in node.meta.get("nn_module_stack", {}).values()
    ]
    return any(path == layer or path.startswith(f"{layer}.") for layer in layers for path in paths)


def _is_weight(node: fx.Node) -> bool:
    """Whether a node makes a stored int8 tensor float again."""
    if node.op != "call_function" or "dequantize" not in str(node.target):
        return False
    source = node.args[0]
    return isinstance(source, fx.Node) and source.op == "get_attr"
