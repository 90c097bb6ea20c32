"""`load.py` of a peer's folder: the runtime called as its own documentation does, on tensors as an artifact is."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

Flat = Callable[[list[Tensor]], list[Tensor]]


def load(folder: str | Path, *, check: bool = False) -> Callable[[Any], Any]:
    """inputs tree → the output, or a tuple of them."""
    facts = json.loads((Path(folder) / "peer.json").read_text())
    run = {"onnxruntime": onnxruntime, "openvino": openvino, "executorch": executorch}[facts["kind"]](facts)

    def called(inputs: Any) -> Any:
        found = run(pytree.tree_leaves(inputs))
        return found[0] if len(found) == 1 else tuple(found)

    return called


def onnxruntime(facts: dict[str, Any]) -> Flat:
    """A session with `threads` threads."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = facts["threads"]
    session = ort.InferenceSession(facts["file"], options, providers=["CPUExecutionProvider"])
    names = [i.name for i in session.get_inputs()]

    def run(given: list[Tensor]) -> list[Tensor]:
        found = session.run(None, {n: t.numpy() for n, t in zip(names, given, strict=True)})
        return [torch.from_numpy(y) for y in found]

    return run


def openvino(facts: dict[str, Any]) -> Flat:
    """A compiled model, hint LATENCY; OpenVINO's telemetry module is kept from loading."""
    import sys

    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    import openvino as ov

    config = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": facts["threads"]}
    compiled = ov.Core().compile_model(facts["file"], "CPU", config)
    request = compiled.create_infer_request()

    def run(given: list[Tensor]) -> list[Tensor]:
        found = request.infer([t.numpy() for t in given])
        return [torch.from_numpy(found[o].copy()) for o in compiled.outputs]

    return run


def executorch(facts: dict[str, Any]) -> Flat:
    """A program for each batch size; other sizes go through the largest, in parts, padded."""
    from executorch.extension.pybindings.portable_lib import _unsafe_reset_threadpool
    from executorch.kernels import quantized  # noqa: F401
    from executorch.runtime import Runtime

    _unsafe_reset_threadpool(facts["threads"])
    runtime = Runtime.get()
    methods = {int(n): runtime.load_program(path).load_method("forward") for n, path in facts["files"].items()}
    most = max(methods)

    def run(given: list[Tensor]) -> list[Tensor]:
        batch = len(given[0])
        if batch in methods:
            return list(methods[batch].execute(given))
        parts = []
        for start in range(0, batch, most):
            part = [t[start : start + most] for t in given]
            padded = [torch.cat([t, t[-1:].expand(most - len(t), *t.shape[1:])]) if len(t) < most else t for t in part]
            parts.append([y[: len(part[0])].clone() for y in methods[most].execute(padded)])
        return [torch.cat(list(ys)) for ys in zip(*parts, strict=True)]

    return run
