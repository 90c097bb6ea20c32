"""A captured model as one small ONNX file."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from quadriga.core.errors import NotApplicable
from quadriga.core.files import atomic_write
from quadriga.core.half import HALF
from quadriga.core.quiet import quiet
from quadriga.core.slots import RuntimeSpec
from quadriga.runtime._bags import opened
from quadriga.runtime._capture import Capture, reason
from quadriga.runtime._floats import matrix_types, nothing_to_round, without_bfloat16

REGISTRIES: dict[tuple[Any, ...], Any] = {}  # of the exporter's operators, by the arguments that it was asked with
LIMIT = 2_000_000_000  # bytes of one protobuf message


def write_onnx(taken: Capture, spec: RuntimeSpec, path: Path, *, dynamic_operators: bool) -> None:
    """Export, quantize or halve, strip and write; weights are inside, once.

    Args:
        taken: the captured model.
        spec: its `quant` and `weights` say what is stored.
        path: of the file.
        dynamic_operators: realise "dynamic" with ONNX operators; else as int8 weights, for a runtime that does the rest.

    Raises:
        NotApplicable: an operation has no ONNX form, an input or output is bfloat16, there is nothing to quantize or to
            halve, or the file would pass 2 GB.
    """
    without_bfloat16(taken)
    proto = export(taken)
    if spec.quant is not None:
        from quadriga.runtime._int8 import quantize

        proto = quantize(proto, spec.quant, taken, dynamic_operators=dynamic_operators)
    if spec.weights != "fp32":
        store_half(proto, spec.weights)
    data = strip(proto).SerializeToString()
    if len(data) > LIMIT:
        raise NotApplicable(f"model.onnx would have {len(data)} bytes, more than one file may", "use eager or inductor")
    atomic_write(path, data)


def export(taken: Capture) -> Any:
    """The captured model as an `onnx.ModelProto`, inputs and outputs named, constants folded.

    Raises:
        NotApplicable: an operation has no ONNX form; the reason names it.
    """
    with (
        quiet(),
        torch.no_grad(),
        one_registry(),
    ):  # as it was captured: a learned attention bias takes attention apart, in other strides
        try:
            made = torch.onnx.export(opened(taken.program), (), dynamo=True, external_data=False, verbose=False, optimize=True)
        except Exception as error:  # the exporter raises many types
            cause: BaseException = error
            while cause.__cause__ is not None:
                cause = cause.__cause__
            raise NotApplicable(f"the model has no ONNX form: {reason(cause)}", "use eager or inductor") from error
    assert made is not None
    proto = made.model_proto
    for kind, values, names in (("input", proto.graph.input, taken.names), ("output", proto.graph.output, taken.output_names)):
        assert len(values) == len(names), f"{len(values)} {kind}s in ONNX, {len(names)} in the model"
        _rename(proto.graph, {v.name: n for v, n in zip(values, names, strict=True)})
    _rename(proto.graph, {t.name: t.name.removeprefix("model.") for t in proto.graph.initializer})
    return proto


@contextmanager
def one_registry() -> Iterator[None]:
    """Read the exporter's operators once a process: it reads them at each export, which is most of a small network's time."""
    try:
        from torch.onnx._internal.exporter._registration import ONNXRegistry

        found = ONNXRegistry.__dict__["from_torchlib"]
    except (ImportError, AttributeError, KeyError):  # another version of PyTorch: as slow as it is
        yield
        return

    def once(*given: Any) -> Any:
        if given not in REGISTRIES:
            REGISTRIES[given] = found.__get__(None, ONNXRegistry)(*given)
        return REGISTRIES[given]

    ONNXRegistry.from_torchlib = staticmethod(  # type: ignore[method-assign]
        lambda *args, **named: once(*args, *named.values())
    )
    try:
        yield
    finally:
        ONNXRegistry.from_torchlib = found  # type: ignore[method-assign]


def store_half(proto: Any, weights: str) -> None:
    """Store float32 weights in "bf16" or "fp16", with a Cast back to float32 behind each; vectors stay, however shaped."""
    from onnx import TensorProto, helper

    kind, count = {"bf16": TensorProto.BFLOAT16, "fp16": TensorProto.FLOAT16}[weights], len(proto.graph.node)
    for tensor in list(proto.graph.initializer):
        if tensor.data_type != TensorProto.FLOAT or math.prod(tensor.dims) == max(tensor.dims, default=1):
            continue
        name, short = tensor.name, f"{tensor.name}.{weights}"
        values = torch.frombuffer(bytearray(tensor.raw_data), dtype=torch.float32).to(HALF[weights])
        raw = values.view(torch.int16).numpy().tobytes()
        proto.graph.initializer.remove(tensor)
        proto.graph.initializer.append(helper.make_tensor(short, kind, tensor.dims, raw, raw=True))
        proto.graph.node.insert(0, helper.make_node("Cast", [short], [name], to=TensorProto.FLOAT))
    if len(proto.graph.node) == count:
        raise nothing_to_round(matrix_types(proto), weights)


def _rename(graph: Any, names: dict[str, str]) -> None:
    """Rename values; another value that has one of the new names already gets out of the way."""
    final = {old: new for old, new in names.items() if old != new}
    taken = {t.name for t in (*graph.initializer, *graph.input)} | {o for node in graph.node for o in node.output}
    final.update({name: f"{name}_inner" for name in taken & set(final.values()) if name not in final})

    def change(g: Any) -> None:
        for value in (*g.input, *g.output, *g.initializer, *g.value_info):
            value.name = final.get(value.name, value.name)
        for node in g.node:
            for field in (node.input, node.output):
                field[:] = [final.get(n, n) for n in field]
            for attribute in node.attribute:
                if attribute.HasField("g"):
                    change(attribute.g)

    change(graph)


def strip(proto: Any) -> Any:
    """Take out what no runtime reads: stack traces, documentation, intermediate shapes and node names."""
    proto.doc_string = ""
    del proto.metadata_props[:]
    _strip_graph(proto.graph)
    for function in proto.functions:
        function.doc_string = ""
        del function.metadata_props[:], function.value_info[:]
        for node in function.node:
            _strip_node(node)
    return proto


def _strip_graph(graph: Any) -> None:
    graph.doc_string = ""
    del graph.metadata_props[:], graph.value_info[:]
    for value in (*graph.input, *graph.output, *graph.initializer):
        value.doc_string = ""
        del value.metadata_props[:]
    for node in graph.node:
        _strip_node(node)


def _strip_node(node: Any) -> None:
    node.doc_string = node.name = ""
    del node.metadata_props[:]
    for attribute in node.attribute:
        if attribute.HasField("g"):
            _strip_graph(attribute.g)
