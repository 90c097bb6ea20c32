"""PyTorch, as it is and compiled, on the CPU or an NVIDIA GPU."""

from __future__ import annotations

import itertools
import sys
import types
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quadriga.runtime.standalone.folder import RUNTIMES, inside
from quadriga.runtime.standalone.trees import Leaves, Tree, shaped, single_tensor

GPU_REMEDY = "install a PyTorch with CUDA, check the driver with nvidia-smi, or build the model for the CPU"


def eager_model(folder: Path, entry: Mapping[str, Any], threads: int | None) -> Callable[..., Tree]:
    """Run program.py, the exported operations, with the weights of weights.safetensors."""
    torch_settings(entry["session"], threads)
    gpu = gpu_of(entry["session"])
    weights = load_weights(folder, entry, gpu)
    forward = program(folder, entry)
    ready = channels_last if entry["session"]["channels_last"] else lambda x: x

    def single(x: Tensor) -> Tensor:
        with torch.no_grad():  # not inference_mode: its outputs could not be changed or learned from
            return forward(None, *weights, ready(x))[0]

    def call(leaves: list[Tensor]) -> list[Tensor]:
        with torch.no_grad():
            return list(forward(None, *weights, *map(ready, leaves)))

    if gpu is not None:
        return on_gpu(entry, gpu, call)
    return single if single_tensor(entry) else shaped(entry, call)


def inductor_model(folder: Path, entry: Mapping[str, Any], threads: int | None) -> Callable[..., Tree]:
    """Compile program.py with the weights frozen into it, at the first call of each recorded batch size; others share one."""
    import torch._inductor.config as inductor

    torch_settings(entry["session"], threads)
    gpu = gpu_of(entry["session"])
    weights = load_weights(folder, entry, gpu)
    ready = channels_last if entry["session"]["channels_last"] else lambda x: x
    compiled: dict[int | None, Callable[..., Any]] = {}

    def call(leaves: list[Tensor]) -> list[Tensor]:
        key = len(leaves[0]) if entry.get("each_size") or len(leaves[0]) in entry["batches"] else None
        with torch.no_grad():
            if key not in compiled:
                with inductor.patch(freezing=True), warnings.catch_warnings():  # both are read while it compiles
                    warnings.simplefilter("ignore")
                    compiled[key] = torch.compile(Program(program(folder, entry), weights).eval(), dynamic=key is None)
                    return list(compiled[key](*map(ready, leaves)))
            return list(compiled[key](*map(ready, leaves)))

    def single(x: Tensor) -> Tensor:
        return call([x])[0]

    if gpu is not None:
        return on_gpu(entry, gpu, call)
    return single if single_tensor(entry) else shaped(entry, call)


class Program(torch.nn.Module):
    """A program with its weights as parameters, which is what freezing looks for."""

    def __init__(self, forward: Callable[..., Any], weights: list[Tensor | None]) -> None:
        super().__init__()
        self.run, self.count = forward, len(weights)
        for number, weight in enumerate(weights):
            self.register_buffer(f"weight{number}", weight)

    def forward(self, *leaves: Tensor) -> Any:
        """leaves: input tensors → tuple of output tensors."""
        return self.run(None, *[getattr(self, f"weight{number}") for number in range(self.count)], *leaves)


def torch_settings(session: Mapping[str, Any], threads: int | None) -> None:
    """Set the matmul precision and, when a number is given, the threads of this process; for a GPU, cuDNN's precision too."""
    torch.set_float32_matmul_precision(session["matmul"])
    if session.get("device", "cpu") != "cpu":
        torch.backends.cudnn.allow_tf32 = session["matmul"] != "highest"
    if threads is not None:
        torch.set_num_threads(threads)


def channels_last(x: Tensor) -> Tensor:
    """Four-dimensional tensors in channels-last order; others as they are."""
    return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x


def program(folder: Path, entry: Mapping[str, Any]) -> Callable[..., Any]:
    """The function `forward` of program.py, made anew, so that each compilation has its own; a module, as dynamo asks."""
    path = inside(folder, entry["files"][0])
    module = types.ModuleType(f"model_program_{next(_numbers)}")
    sys.modules[module.__name__] = module
    exec(compile(path.read_text(encoding="utf-8"), str(path), "exec"), module.__dict__)
    return module.forward


_numbers = itertools.count()


def load_weights(folder: Path, entry: Mapping[str, Any], gpu: torch.device | None = None) -> list[Tensor | None]:
    """The program's weights in order, on a GPU if one is given; tied ones are one tensor, integers become float again."""
    from safetensors.torch import load_file

    stored, four = load_file(inside(folder, entry["files"][1])), entry.get("four", {})
    for name in entry["quantized"]:
        scale = stored.pop(name + ".scale")
        stored[name] = unpack4(stored[name], scale, four[name]) if name in four else stored[name].float() * scale
    if entry["session"]["channels_last"]:
        stored = {name: channels_last(t) for name, t in stored.items()}
    if gpu is not None:
        stored = {name: t.to(gpu) for name, t in stored.items()}
    return [None if name is None else stored[entry["aliases"].get(name, name)] for name in entry["weights"]]


def unpack4(packed: Tensor, scale: Tensor, shape: list[int]) -> Tensor:
    """Float weights [rows, columns] from two 4-bit integers a byte and scales [rows, groups]."""
    rows, columns = shape
    q = torch.stack((packed & 15, packed >> 4), 2).flatten(1)[:, :columns].float() - 8
    return (q.view(rows, scale.shape[1], -1) * scale[:, :, None]).reshape(rows, columns)


def gpu_of(session: Mapping[str, Any]) -> torch.device | None:
    """The GPU that a model was built for; None if that is the CPU.

    Raises:
        RuntimeError: there is none here; the text says what to do.
    """
    if session.get("device", "cpu") == "cpu":
        return None
    if not torch.cuda.is_available():
        why = "finds none here" if torch.backends.cuda.is_built() else "is built without CUDA"
        raise RuntimeError(f"this model runs on an NVIDIA GPU, and this PyTorch {why}; {GPU_REMEDY}")
    return torch.device("cuda", torch.cuda.current_device())


def on_gpu(entry: Mapping[str, Any], gpu: torch.device, call: Leaves) -> Callable[..., Tree]:
    """Inputs from either memory are copied to the GPU, and outputs to where the first input lies."""

    def moved(leaves: list[Tensor]) -> list[Tensor]:
        home = leaves[0].device
        with torch.cuda.device(gpu):  # where the program's own tensors are made
            outputs = call([x.to(gpu, non_blocking=True) for x in leaves])
        return [y.to(home) for y in outputs]  # towards the CPU this waits for the values

    def single(x: Tensor) -> Tensor:
        return moved([x])[0]

    return single if single_tensor(entry) else shaped(entry, moved)


RUNTIMES["eager"] = eager_model
RUNTIMES["inductor"] = inductor_model
