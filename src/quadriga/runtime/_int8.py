"""int8 of an ONNX model: static (calibrated), dynamic, or weights only."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from quadriga.core.batch import resize, tensors
from quadriga.core.errors import NotApplicable
from quadriga.core.quiet import quiet
from quadriga.core.slots import QuantSpec
from quadriga.runtime import _int4
from quadriga.runtime._calibrate import overrides, ranges
from quadriga.runtime._capture import Capture
from quadriga.runtime._floats import SMALLEST, matrix_types, nothing_to_round

PRODUCTS = {"Conv", "ConvTranspose", "Gemm", "MatMul"}
HOLDERS = PRODUCTS | {"Gather", "LSTM", "GRU", "RNN", "Transpose"}
BATCHES, ROWS = 8, 64  # of calibration


def quantize(proto: Any, quant: QuantSpec, taken: Capture, *, dynamic_operators: bool) -> Any:
    """Quantize a model's weights, and its activations as the specification says.

    Args:
        proto: float `onnx.ModelProto` as exported, with its scopes.
        quant: what to do; `keep_float` names layers by their module path.
        taken: gives the calibration batches.
        dynamic_operators: realise "dynamic" with ONNX operators; else as int8 weights.

    Raises:
        NotApplicable: nothing to quantize, also since weights are no float32, or no calibration batches.
    """
    for number, node in enumerate(proto.graph.node):
        node.name = f"n{number}"
    keep = [node.name for node in proto.graph.node if _kept(node, quant.keep_float)]
    found = {node.op_type for node in proto.graph.node if node.name not in keep}
    if not found & (HOLDERS - {"Transpose"}):
        raise NotApplicable("there is no convolution, linear, recurrent or embedding layer to quantize")
    if quant.activations == "static":
        if not found & PRODUCTS:
            raise NotApplicable("static int8 needs a convolution or a linear layer", 'use activations = "dynamic" or "weights"')
        return _rounded(_static(proto, quant, taken, keep))
    if quant.activations == "dynamic" and dynamic_operators:
        proto = _dynamic(proto, quant, keep)
    if quant.weights == 4:
        fold_transposes(proto)
        _int4.store(proto, quant, keep)
    return _rounded(weights_only(proto, quant, keep))


def _rounded(proto: Any) -> Any:
    """The model, if a weight of it was rounded; what is too small or no float32 is left as it is by all tools.

    Raises:
        NotApplicable: none was.
    """
    from onnx import TensorProto

    if not any(t.data_type in (TensorProto.INT8, TensorProto.UINT8, TensorProto.INT4) for t in proto.graph.initializer):
        raise nothing_to_round(matrix_types(proto), "int8")
    return proto


def scope(node: Any) -> list[str]:
    """The module paths that a node was exported from, outermost first, as the exporter's metadata says."""
    for item in node.metadata_props:
        if item.key == "pkg.torch.onnx.name_scopes":
            return [part.strip(" '\"").removeprefix("model.") for part in item.value.strip("[]").split(",")]
    return []


def _kept(node: Any, layers: tuple[str, ...]) -> bool:
    paths = scope(node)
    stored = [name.rpartition(".")[0] for name in node.input]
    return any(path == layer or path.startswith(f"{layer}.") for layer in layers for path in (*paths, *stored))


def _static(proto: Any, quant: QuantSpec, taken: Capture, keep: list[str]) -> Any:
    """QDQ with unsigned activations (signed ones run 2 to 3 times slower) and signed weights.

    Where products saturate, weights have 7 bits. Attention keeps its inner products in float: with every operator quantized
    a small GPT lost 1.0 bits per byte.
    """
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static

    if not taken.calibration:
        raise NotApplicable("static int8 needs calibration batches", "give the workload training data")
    attention = any(node.op_type in ("Softmax", "LayerNormalization", "Attention") for node in proto.graph.node)
    with tempfile.TemporaryDirectory() as folder, quiet(""):  # the tools advise through the root logger
        path = _simplified(proto, Path(folder))
        quantize_static(
            path,
            (out := Path(folder) / "int8.onnx"),
            _Reader(taken, proto),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=sorted(PRODUCTS) if attention else None,
            per_channel=quant.per_channel,
            reduce_range=saturates(),
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            nodes_to_exclude=keep,
            extra_options={"MatMulConstBOnly": True, "TensorQuantOverrides": _ranges(path, quant, taken, proto)},
        )
        return int8_tables(_load(out), keep)


def _ranges(path: Path, quant: QuantSpec, taken: Capture, proto: Any) -> dict[str, Any]:
    """Ranges that are not those of all seen values, which the tools find themselves."""
    import onnx

    if quant.calibration == "minmax":
        return {}
    return overrides(ranges(onnx.load(path), _Reader(taken, proto), quant.calibration))


@cache
def saturates() -> bool:
    """Whether this processor's products of unsigned and signed bytes overflow 16 bits on their way: x86 without VNNI.

    Asked of ONNX Runtime itself: 64 · 255 · 127 has to be 2,072,640; AVX2 alone gives 1,048,544.
    """
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    ends = [
        helper.make_tensor_value_info(n, t, s)
        for n, t, s in (("a", TensorProto.UINT8, [1, 64]), ("y", TensorProto.INT32, [1, 32]))
    ]
    full = numpy_helper.from_array(np.full((64, 32), 127, np.int8), "b")
    graph = helper.make_graph([helper.make_node("MatMulInteger", ["a", "b"], ["y"])], "full", ends[:1], ends[1:], [full])
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    return bool((session.run(None, {"a": np.full((1, 64), 255, np.uint8)})[0] != 64 * 255 * 127).any())


def _simplified(proto: Any, folder: Path) -> Path:
    """Shapes inferred, and transposes of weights folded, so that the tools see which weights are constant."""
    import onnx

    fold_transposes(proto)
    path = folder / "float.onnx"
    onnx.save(onnx.shape_inference.infer_shapes(proto), path)
    return path


def fold_transposes(proto: Any) -> None:
    """Weights that are transposed before they are used are stored transposed."""
    from onnx import numpy_helper

    constants = {t.name: t for t in proto.graph.initializer}
    for node in list(proto.graph.node):
        if node.op_type == "Transpose" and node.input[0] in constants:
            turned = numpy_helper.to_array(constants[node.input[0]])
            order = next((list(a.ints) for a in node.attribute if a.name == "perm"), None)
            proto.graph.initializer.append(
                numpy_helper.from_array(np.ascontiguousarray(turned.transpose(order)), node.output[0])
            )
            proto.graph.node.remove(node)
    _drop_unused(proto)


def _dynamic(proto: Any, quant: QuantSpec, keep: list[str]) -> Any:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with tempfile.TemporaryDirectory() as folder, quiet(""):  # the tools advise through the root logger
        quantize_dynamic(
            _simplified(proto, Path(folder)),
            (out := Path(folder) / "int8.onnx"),
            reduce_range=saturates(),
            op_types_to_quantize=["MatMul", "Gemm", "LSTM"],  # dynamic convolutions run 2 to 5 times slower than float
            per_channel=quant.per_channel,
            weight_type=QuantType.QInt8,
            nodes_to_exclude=keep,
            extra_options={"MatMulConstBOnly": True},
        )
        return _load(out)


def _load(path: Path) -> Any:
    import onnx

    proto = onnx.load(path)
    _drop_unused(proto)
    return proto


def weights_only(proto: Any, quant: QuantSpec, keep: list[str]) -> Any:
    """Store float weights as int8 with a DequantizeLinear behind them: symmetric, one scale per output channel.

    |error| ≤ scale / 2 = max|row| / 254 for every element.
    """
    from onnx import TensorProto, helper, numpy_helper

    plans = {}
    for tensor in proto.graph.initializer:
        users = [node for node in proto.graph.node if tensor.name in node.input]
        small = len(tensor.dims) < 2 or int(np.prod(tensor.dims)) < SMALLEST
        if tensor.data_type != TensorProto.FLOAT or small or not users or any(node.op_type not in HOLDERS for node in users):
            continue
        if not any(node.name in keep for node in users):
            plans[tensor.name] = _axis(users[0], tensor)
    for tensor in [t for t in proto.graph.initializer if t.name in plans]:
        name, axis = tensor.name, plans[tensor.name] if quant.per_channel else None
        q, scale = _int8(numpy_helper.to_array(tensor), axis)
        proto.graph.initializer.remove(tensor)
        proto.graph.initializer.extend(
            [numpy_helper.from_array(q, f"{name}.q"), numpy_helper.from_array(scale, f"{name}.scale")]
        )
        attributes: dict[str, Any] = {} if axis is None else {"axis": axis}
        proto.graph.node.insert(0, helper.make_node("DequantizeLinear", [f"{name}.q", f"{name}.scale"], [name], **attributes))
    return proto


def int8_tables(proto: Any, keep: list[str]) -> Any:
    """Store embedding tables as int8 with one scale a row, both gathered: no table is made float at run time."""
    from onnx import TensorProto, helper, numpy_helper

    for tensor in list(proto.graph.initializer):
        users = [node for node in proto.graph.node if tensor.name in node.input]
        gathers = all(n.op_type == "Gather" and n.input[0] == tensor.name and n.name not in keep for n in users)
        if (
            not gathers
            or tensor.data_type != TensorProto.FLOAT
            or len(tensor.dims) != 2
            or int(np.prod(tensor.dims)) < SMALLEST
        ):
            continue
        q, scale = _int8(numpy_helper.to_array(tensor), 0)
        names = [f"{tensor.name}.q", f"{tensor.name}.scale"]
        tables = [numpy_helper.from_array(q, names[0]), numpy_helper.from_array(scale[:, None], names[1])]
        proto.graph.initializer.remove(tensor)
        proto.graph.initializer.extend(tables)
        for node in users:
            place, out = list(proto.graph.node).index(node), node.output[0]
            rows, scales = (helper.make_node("Gather", [n, node.input[1]], [f"{out}.{i}"]) for i, n in enumerate(names))
            cast = helper.make_node("Cast", [f"{out}.0"], [f"{out}.2"], to=TensorProto.FLOAT)
            product = helper.make_node("Mul", [f"{out}.2", f"{out}.1"], [out])
            proto.graph.node.remove(node)
            for made in (product, cast, scales, rows):
                proto.graph.node.insert(place, made)
    return proto


def _axis(node: Any, tensor: Any) -> int:
    """The axis of output channels: rows, but columns of a matrix that is multiplied from the right."""
    if node.op_type == "MatMul":
        return len(tensor.dims) - 1 if tensor.name == node.input[1] else len(tensor.dims) - 2
    if node.op_type == "Gemm":
        turned = next((a.i for a in node.attribute if a.name == "transB"), 0)
        return 0 if turned else 1
    return 1 if node.op_type in ("LSTM", "GRU", "RNN", "ConvTranspose") else 0


def _int8(values: np.ndarray[Any, Any], axis: int | None) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    rest = tuple(d for d in range(values.ndim) if d != axis)
    peak = np.abs(values).max(axis=rest, keepdims=True).astype(np.float32)
    scale = np.where(peak > 0, peak / np.float32(127), np.float32(1))
    q = np.clip(np.rint(values / scale), -127, 127).astype(np.int8)
    return q, scale.reshape(-1) if axis is not None else scale.reshape(())


def _drop_unused(proto: Any) -> None:
    used = {name for node in proto.graph.node for name in node.input} | {o.name for o in proto.graph.output}
    for tensor in [t for t in proto.graph.initializer if t.name not in used]:
        proto.graph.initializer.remove(tensor)
    domains = {node.domain for node in proto.graph.node} | {""}
    for item in [i for i in proto.opset_import if i.domain not in domains]:
        proto.opset_import.remove(item)


class _Reader:
    """Calibration batches as ONNX Runtime's tools read them: one dict of arrays a call, then None."""

    def __init__(self, taken: Capture, proto: Any) -> None:
        used = {i.name for i in proto.graph.input}
        self.rows: Iterator[dict[str, Any]] = iter(
            [
                {
                    n: t.detach().numpy()
                    for n, t in zip(taken.names, tensors(resize(b.inputs, min(len(b), ROWS))), strict=True)
                    if n in used
                }
                for b in taken.calibration[:BATCHES]
            ]
        )

    def get_next(self) -> dict[str, Any] | None:
        """The next batch."""
        return next(self.rows, None)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return self.rows
