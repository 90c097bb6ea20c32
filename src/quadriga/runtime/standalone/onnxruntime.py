"""ONNX Runtime."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quadriga.runtime.standalone.folder import RUNTIMES, cores, inside, needs
from quadriga.runtime.standalone.trees import Tree, shaped, single_tensor


def onnxruntime_model(folder: Path, entry: Mapping[str, Any], threads: int | None) -> Callable[..., Tree]:
    """Run model.onnx with ONNX Runtime: threads do not spin, products are exactly what the file says."""
    session, plain = onnxruntime_session(folder, entry, threads)
    run = onnxruntime_call(session)
    names, used = [o.name for o in session.get_outputs()], [i.name for i in session.get_inputs()]
    places = entry["names"] if set(used) <= set(entry["names"]) else used  # another's file has its own names: by place
    first, tensor = places[0], torch.from_numpy

    def single(x: Tensor) -> Tensor:  # the output is new memory in every call
        return tensor(run(names, {first: x.numpy(force=True)}, plain)[0])

    def call(leaves: list[Tensor]) -> list[Tensor]:
        feed = {name: x.numpy(force=True) for name, x in zip(places, leaves, strict=True) if name in used}
        return [torch.as_tensor(y) for y in run(names, feed, plain)]

    return single if single_tensor(entry) and used == [first] else shaped(entry, call)


def onnxruntime_session(folder: Path, entry: Mapping[str, Any], threads: int | None) -> tuple[Any, Any]:
    """A session, and the options of its calls."""
    try:
        import onnxruntime
    except ImportError as error:
        raise needs(error, entry) from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or cores()
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    for key, value in {"session.intra_op.allow_spinning": "0", **entry["session"]}.items():
        options.add_session_config_entry(key, value)
    path = inside(folder, entry["files"][0])
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"]), onnxruntime.RunOptions()


def onnxruntime_call(session: Any) -> Any:
    """Its execution, 1.5 µs shorter than session.run where there is the inner object."""
    return getattr(getattr(session, "_sess", None), "run", session.run)


RUNTIMES["onnxruntime"] = onnxruntime_model
