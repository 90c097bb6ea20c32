"""Ranges of the activations of an ONNX model, as calibration data give them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch

from quadriga.core.rounding import SAMPLE, thinned, value_range

Feed = Mapping[str, np.ndarray[Any, Any]]


def ranges(proto: Any, feeds: Iterable[Feed], kind: str) -> dict[str, tuple[float, float]]:
    """The range of each float tensor that flows into or out of a node.

    Args:
        proto: `onnx.ModelProto` with inferred shapes; it is left as it is.
        feeds: batches of its inputs.
        kind: of `quadriga.core.rounding.value_range`.
    """
    seen: dict[str, list[torch.Tensor]] = {}
    names = _float_tensors(proto)
    session = _opened(proto, names)
    for feed in feeds:
        inputs = {name: values for name, values in feed.items() if values.dtype == np.float32}
        for name, values in {**inputs, **dict(zip(names, session.run(names, dict(feed)), strict=True))}.items():
            flat = torch.from_numpy(np.ascontiguousarray(values)).flatten()
            if flat.numel():
                some = torch.stack(flat.aminmax()) if kind == "minmax" else thinned(flat, SAMPLE // 8)
                seen.setdefault(name, []).append(some.clone())
    return {name: value_range(torch.cat(parts), kind) for name, parts in seen.items()}


def overrides(found: Mapping[str, tuple[float, float]]) -> dict[str, list[dict[str, Any]]]:
    """Ranges as ONNX Runtime's quantization tools take them. Zero is in each, so that padding and ReLU stay exact."""
    return {n: [{"rmin": np.float32(min(low, 0.0)), "rmax": np.float32(max(high, 0.0))}] for n, (low, high) in found.items()}


def _opened(proto: Any, names: list[str]) -> Any:
    """A session that gives inner tensors too."""
    import onnx
    import onnxruntime

    opened = onnx.ModelProto()
    opened.CopyFrom(proto)
    del opened.graph.output[:]
    opened.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in names)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(opened.SerializeToString(), options, providers=["CPUExecutionProvider"])


def _float_tensors(proto: Any) -> list[str]:
    """Outputs of the graph's nodes that are float32."""
    from onnx import TensorProto

    infos = [*proto.graph.value_info, *proto.graph.output]
    floats = {v.name for v in infos if v.type.tensor_type.elem_type == TensorProto.FLOAT}
    return [name for node in proto.graph.node for name in node.output if name in floats]
