"""OpenVINO."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quadriga.runtime.standalone.folder import RUNTIMES, cores, inside, needs
from quadriga.runtime.standalone.trees import Tree, shaped, single_tensor


def openvino_model(folder: Path, entry: Mapping[str, Any], threads: int | None) -> Callable[..., Tree]:
    """Run model.onnx with OpenVINO: one static graph for each recorded batch size, and a dynamic one for others."""
    requests: dict[int | None, Any] = {}

    def request(batch: int) -> Any:
        key = batch if batch in entry["batches"] else None
        if key not in requests:
            requests[key] = openvino_request(folder, entry, key, threads)
        return requests[key]

    def single(x: Tensor) -> Tensor:
        ready = requests.get(x.size(0)) or request(x.size(0))
        ready.infer({0: x.contiguous().numpy(force=True)}, share_inputs=True)
        return torch.from_numpy(ready.get_output_tensor(0).data.copy())  # its own memory: the next call writes there

    def call(leaves: list[Tensor]) -> list[Tensor]:
        ready = request(len(leaves[0]))
        used = {i.any_name for i in ready.model_inputs}
        given = zip(entry["names"], leaves, strict=True)
        ready.infer({name: x.contiguous().numpy(force=True) for name, x in given if name in used}, share_inputs=True)
        return [torch.as_tensor(t.data.copy()) for t in ready.output_tensors]

    request(entry["batches"][0] if entry["batches"] else 0)  # what fails, fails when loading
    return single if single_tensor(entry) else shaped(entry, call)


def openvino_core(entry: Mapping[str, Any]) -> Any:
    """OpenVINO, which is imported so that nothing is reported to anyone."""
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]  # importing openvino sends an event otherwise
    try:
        import openvino
    except ImportError as error:
        raise needs(error, entry) from error
    return openvino.Core()


def openvino_request(folder: Path, entry: Mapping[str, Any], batch: int | None, threads: int | None) -> Any:
    """An inference request for one batch size, or for any."""
    core = openvino_core(entry)
    network = core.read_model(inside(folder, entry["files"][0]))
    if batch is not None:
        network.reshape({i.any_name: [batch, *list(i.partial_shape)[1:]] for i in network.inputs})
    hints = {"PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": "1", "INFERENCE_NUM_THREADS": str(threads or cores())}
    return core.compile_model(network, "CPU", {**hints, **entry["session"]}).create_infer_request()


RUNTIMES["openvino"] = openvino_model
