"""Single layers as a runtime executes them: written as ONNX operators by hand, since an export of each would take seconds."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from quadriga.core.batch import Batch
from quadriga.core.errors import NotApplicable
from quadriga.core.files import atomic_write
from quadriga.core.slots import RuntimeSpec
from quadriga.runtime import onnxruntime, openvino, prepare, standalone
from quadriga.runtime._onnx import store_half

OF_ONNX = {module.NAME: module for module in (onnxruntime, openvino)}
LSTM = ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0")
Branch = tuple[nn.Module, Tensor]  # convolutions, Linears and ReLUs in a row, or an LSTM; and two examples of its input
Call = Callable[[], Any]
Node = tuple[str, list[str], dict[str, Tensor], dict[str, Any]]  # operator, further inputs, their values, attributes


def calls(branches: Sequence[Branch], spec: RuntimeSpec, folder: Path) -> list[Call]:
    """One call of each model with one example, as a runtime executes it alone.

    Args:
        branches: the models.
        spec: of a runtime that reads an ONNX file, or of eager without quantization.
        folder: for the files; it has to stay while the calls are used.

    Raises:
        NotApplicable: the runtime is another one, or does not take these models.
    """
    if spec.name == "eager" and spec.quant is None:
        return [_eager(model, x, spec) for model, x in branches]
    if spec.name not in OF_ONNX:
        raise NotApplicable(f"{spec.name} builds each model by itself")
    return _cut(branches, spec, OF_ONNX[spec.name], folder)


def _eager(model: nn.Module, x: Tensor, spec: RuntimeSpec) -> Call:
    run = prepare(model, spec)
    return lambda: run(x[:1])


def _cut(branches: Sequence[Branch], spec: RuntimeSpec, runtime: ModuleType, folder: Path) -> list[Call]:
    """All in one file, which is quantized once; then each cut out of it."""
    from onnx.utils import Extractor

    proto = _beside(branches)
    if spec.quant is not None:
        from quadriga.runtime._int8 import quantize

        inputs = tuple(x for _, x in branches)
        seen = SimpleNamespace(
            names=[f"x{n}" for n in range(len(branches))], calibration=(Batch(inputs, None, torch.arange(len(inputs[0]))),)
        )
        proto = quantize(proto, spec.quant, seen, dynamic_operators=runtime.DYNAMIC_OPERATORS)  # type: ignore[arg-type]
    if spec.weights != "fp32":
        store_half(proto, spec.weights)
    whole, made = Extractor(proto), []
    for number, (_, x) in enumerate(branches):
        place = folder / str(number)
        atomic_write(place / "model.onnx", whole.extract_model([f"x{number}"], [f"y{number}"]).SerializeToString())
        made.append(_session(place, f"x{number}", x, spec, runtime))
    return made


def _session(folder: Path, name: str, x: Tensor, spec: RuntimeSpec, runtime: ModuleType) -> Call:
    one = {"kind": "tensor", "index": 0}
    entry = {
        "files": ["model.onnx"], "session": runtime.session(spec), "names": [name], "inputs": one, "outputs": one,
        "rank": x.dim(), "batches": [1], "needs": [],
    }  # fmt: skip
    run, example = standalone.RUNTIMES[spec.name](folder, entry, spec.threads), x[:1].contiguous()
    return lambda: run(example)


def _beside(branches: Sequence[Branch]) -> Any:
    """One ONNX model with an input x0, x1, … and an output y0, y1, … for each."""
    from onnx import TensorProto, helper, numpy_helper

    nodes, stored, ends = list[Any](), list[Any](), list[Any]()
    for number, (model, x) in enumerate(branches):
        with torch.no_grad():
            output = model(x)
        steps = [node for layer in model.modules() if not isinstance(layer, nn.Sequential) for node in _nodes(layer)]
        for k, (operator, more, values, attributes) in enumerate(steps):
            here = f"b{number}.{k}"
            source, target = (f"b{number}.{k - 1}" if k else f"x{number}", here if k < len(steps) - 1 else f"y{number}")
            inputs = [source, *(f"{here}.{name}" for name in more)]
            nodes.append(helper.make_node(operator, inputs, [target], **attributes))
            stored += [numpy_helper.from_array(v.detach().contiguous().numpy(), f"{here}.{n}") for n, v in values.items()]
        shapes = (x.shape, (output[0] if isinstance(output, tuple) else output).shape)
        ends.append([
            helper.make_tensor_value_info(f"{name}{number}", TensorProto.FLOAT, ["batch", *shape[1:]])
            for name, shape in zip("xy", shapes, strict=True)
        ])  # fmt: skip
    graph = helper.make_graph(nodes, "branches", [x for x, _ in ends], [y for _, y in ends], stored)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def _nodes(layer: nn.Module) -> Iterator[Node]:
    """The operators that an export makes of a layer."""
    if isinstance(layer, nn.Conv2d):
        pads, kernel = [*layer.padding, *layer.padding], list(layer.kernel_size)
        values = {"weight": layer.weight, "bias": layer.bias}
        yield "Conv", ["weight", "bias"], values, {"kernel_shape": kernel, "pads": pads, "group": layer.groups}  # type: ignore[misc]
    elif isinstance(layer, nn.Linear):
        yield "MatMul", ["weight"], {"weight": layer.weight.T}, {}
        yield "Add", ["bias"], {"bias": layer.bias}, {}
    elif isinstance(layer, nn.LSTM):
        yield from _lstm(layer)
    else:
        assert isinstance(layer, nn.ReLU), f"no ONNX form of {layer}"
        yield "Relu", [], {}, {}


def _lstm(layer: nn.LSTM) -> Iterator[Node]:
    """One layer in one direction, [batch, steps, in] to [batch, steps, hidden]. ONNX has its gates in another order."""
    order = torch.cat([torch.arange(layer.hidden_size) + layer.hidden_size * gate for gate in (0, 3, 1, 2)])
    inside, within, first, second = (getattr(layer, name).detach()[order] for name in LSTM)
    values = {"w": inside[None], "r": within[None], "b": torch.cat([first, second])[None]}
    yield "Transpose", [], {}, {"perm": [1, 0, 2]}
    yield "LSTM", ["w", "r", "b"], values, {"hidden_size": layer.hidden_size}
    yield "Squeeze", ["axis"], {"axis": torch.tensor([1])}, {}
    yield "Transpose", [], {}, {"perm": [1, 0, 2]}
