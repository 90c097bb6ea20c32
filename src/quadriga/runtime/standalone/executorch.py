"""ExecuTorch."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quadriga.runtime.standalone.folder import RUNTIMES, cores, inside, needs
from quadriga.runtime.standalone.trees import Tree, shaped, single_tensor


def executorch_model(folder: Path, entry: Mapping[str, Any], threads: int | None) -> Callable[..., Tree]:
    """Run model.pte with ExecuTorch. Its threads are the process's; a batch above the planned one is split."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from executorch.extension.pybindings import portable_lib
            from executorch.runtime import Runtime

            portable_lib._unsafe_reset_threadpool(threads or cores())  # the only way it has; unsafe while a model runs
    except ImportError as error:
        raise needs(error, entry) from error
    method = Runtime.get().load_program(inside(folder, entry["files"][0])).load_method("forward")
    assert method is not None
    most, places = entry["session"]["most"], entry["session"]["places"]

    def call(leaves: list[Tensor]) -> list[Tensor]:  # outputs are new memory in every call
        ready = [x.detach().contiguous() for x in leaves]
        count = len(ready[0])
        if count <= most:
            return list(method.execute(ready))
        if None in places:
            raise ValueError(f"this model takes at most {most} examples a call, got {count}")
        parts = [method.execute([x[i : i + most] for x in ready]) for i in range(0, count, most)]
        return [torch.cat(ys, place) for place, ys in zip(places, zip(*parts, strict=True), strict=True)]

    def single(x: Tensor) -> Tensor:
        return call([x])[0]

    return single if single_tensor(entry) else shaped(entry, call)


RUNTIMES["executorch"] = executorch_model
