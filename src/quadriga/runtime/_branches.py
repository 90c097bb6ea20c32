"""Many small models in one export: each is then a session of its own, and the exporter's start is paid once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from quadriga.core.batch import Batch
from quadriga.core.errors import NotApplicable
from quadriga.core.files import atomic_write
from quadriga.core.metric import accuracy
from quadriga.core.setup import Context
from quadriga.core.slots import RuntimeSpec
from quadriga.runtime import onnxruntime, openvino, prepare, standalone
from quadriga.runtime._capture import capture
from quadriga.runtime._onnx import write_onnx

OF_ONNX = {module.NAME: module for module in (onnxruntime, openvino)}
_WEIGHTS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
Branch = tuple[nn.Module, Tensor]  # a model, and two examples of its one input
Call = Callable[[], Any]


class _Beside(nn.Module):
    def __init__(self, models: Sequence[nn.Module]) -> None:
        super().__init__()
        self.models = nn.ModuleList(models)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return tuple(model(x) for model, x in zip(self.models, inputs, strict=True))


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
    module, made = OF_ONNX[spec.name], dict[int, Call]()
    lstms = [n for n, (model, _) in enumerate(branches) if isinstance(model, nn.LSTM)]
    others = [n for n in range(len(branches)) if n not in lstms]
    for n in lstms:
        made[n] = _alone(*branches[n], spec, module, folder / f"lstm{n}")
    if others:
        made.update(zip(others, _cut([branches[n] for n in others], spec, module, folder), strict=True))
    return [made[n] for n in range(len(branches))]


def _eager(model: nn.Module, x: Tensor, spec: RuntimeSpec) -> Call:
    run = prepare(model, spec)
    return lambda: run(x[:1])


def _cut(branches: Sequence[Branch], spec: RuntimeSpec, runtime: ModuleType, folder: Path) -> list[Call]:
    import onnx
    from onnx.utils import Extractor

    inputs = tuple(x for _, x in branches)
    seen = Batch(inputs, None, torch.arange(len(inputs[0])))
    with torch.inference_mode(False):
        taken = capture(_Beside([model for model, _ in branches]), Context(inputs, (seen,), accuracy))
        write_onnx(taken, spec, folder / "all.onnx", dynamic_operators=runtime.DYNAMIC_OPERATORS)
    whole = Extractor(onnx.load(folder / "all.onnx"))
    made = []
    for number, (name, output) in enumerate(zip(taken.names, taken.output_names, strict=True)):
        place = folder / str(number)
        atomic_write(place / "model.onnx", whole.extract_model([name], [output]).SerializeToString())
        made.append(_session(place, name, inputs[number], spec, runtime))
    return made


def _alone(model: nn.Module, x: Tensor, spec: RuntimeSpec, runtime: ModuleType, folder: Path) -> Call:
    """An LSTM, whose export takes seconds: written as the one operator that it becomes. Static int8 leaves it in float."""
    assert isinstance(model, nn.LSTM)
    if spec.quant is not None and spec.quant.activations != "static":
        raise NotApplicable("dynamic int8 of an LSTM is not measured")
    atomic_write(folder / "model.onnx", _lstm(model, x.shape[1]).SerializeToString())
    return _session(folder, "x", x, spec, runtime)


def _lstm(model: nn.LSTM, steps: int) -> Any:
    """One layer in one direction, from [batch, steps, in] to [batch, steps, hidden]. ONNX has its gates in another order."""
    from onnx import TensorProto, helper, numpy_helper

    order = torch.cat([torch.arange(model.hidden_size) + model.hidden_size * gate for gate in (0, 3, 1, 2)])
    inside, within, first, second = (getattr(model, f"{name}_l0").detach()[order] for name in _WEIGHTS)
    stored = {"W": inside[None], "R": within[None], "B": torch.cat([first, second])[None], "axis": torch.tensor([1])}
    nodes = [
        helper.make_node("Transpose", ["x"], ["turned"], perm=[1, 0, 2]),
        helper.make_node("LSTM", ["turned", "W", "R", "B"], ["states"], hidden_size=model.hidden_size),
        helper.make_node("Squeeze", ["states", "axis"], ["flat"]),
        helper.make_node("Transpose", ["flat"], ["y"], perm=[1, 0, 2]),
    ]
    ends = (("x", model.input_size), ("y", model.hidden_size))
    given, made = ([helper.make_tensor_value_info(n, TensorProto.FLOAT, ["batch", steps, size])] for n, size in ends)
    kept = [numpy_helper.from_array(value.numpy(), name) for name, value in stored.items()]
    graph = helper.make_graph(nodes, "lstm", given, made, kept)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)


def _session(folder: Path, name: str, x: Tensor, spec: RuntimeSpec, runtime: ModuleType) -> Call:
    one = {"kind": "tensor", "index": 0}
    entry = {
        "files": ["model.onnx"], "session": runtime.session(spec), "names": [name], "inputs": one, "outputs": one,
        "rank": x.dim(), "batches": [1], "needs": [],
    }  # fmt: skip
    run, example = standalone.RUNTIMES[spec.name](folder, entry, spec.threads), x[:1].contiguous()
    return lambda: run(example)
