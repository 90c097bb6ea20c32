"""Run this model without Quadriga: `load()` returns a callable on torch tensors; `python load.py` checks the folder.

    from load import load
    model = load()
    outputs = model(inputs)  # the same tensors, tuple or dict that the original model took

It reads only files of its own folder, by plain names. Errors name the damaged file.
"""

from __future__ import annotations

import atexit
import hashlib
import itertools
import json
import lzma
import os
import re
import shutil
import sys
import tempfile
import threading
import types
import warnings
import zlib
from collections.abc import Callable, Mapping
from copy import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

FORMAT = 1
NAME = r"[A-Za-z0-9_][A-Za-z0-9._-]{0,99}"  # a plain file name
OPENCL_REMEDY = "apt-get install pocl-opencl-icd ocl-icd-libopencl1 (the CPU), or the OpenCL driver of your GPU's vendor"
SHAPES = 16  # of inputs, for which OpenCL and CUDA graphs keep a recorded network
GPU_REMEDY = "install a PyTorch with CUDA, check the driver with nvidia-smi, or build the model for the CPU"
PACKED = "model.qdz"  # the model files and what runtime.json says else, in one entropy-coded file
Tree = Any
Leaves = Callable[[list[Tensor]], list[Tensor]]


class Damaged(RuntimeError):
    """A file of the folder is missing or changed, or the model does not compute what it did when it was made."""


def load(folder: str | os.PathLike[str] | None = None, check: bool = True, threads: int | None = None) -> Callable[..., Tree]:
    """Load the model.

    Args:
        folder: where the files are; by default beside this file.
        check: compare the files with manifest.json and the outputs with probes.safetensors, where there are such files.
        threads: of the CPU, in place of the recorded number; PyTorch's number holds for the whole process.

    Returns:
        inputs tree of tensors (batch first) → outputs tree of new tensors. A dict may be given as keywords.

    Raises:
        Damaged: a file is missing or changed, or the outputs differ.
        ImportError: the runtime is not installed; the text says what to install.
    """
    place = Path(folder) if folder is not None else Path(__file__).resolve().parent
    if check:
        check_files(place)
    entry = read_entry(place)
    model = unpacked(place, entry) if "packed" in entry else place
    read = {**entry, "files": entry["packed"]} if "packed" in entry else entry
    run = RUNTIMES[entry["runtime"]](model, read, threads if threads is not None else entry["threads"])
    if check and (place / "probes.safetensors").exists():
        check_probes(place, entry, run)
    return run


# ---- the folder


def inside(folder: Path, name: str) -> Path:
    """The path of a file of the folder; a name that could leave it, and a link, are refused."""
    path = folder / name
    if not re.fullmatch(NAME, name) or path.is_symlink():
        raise Damaged(f"{name!r} is not a plain file of this folder")
    if not path.is_file():
        raise Damaged(f"{name} is missing")
    return path


def read_entry(folder: Path) -> dict[str, Any]:
    """What runtime.json says, checked for what this file can run."""
    try:
        entry = json.loads(inside(folder, "runtime.json").read_text(encoding="utf-8"))
        entry = _packed_entry(folder, entry) if "packed" in entry else entry
        format_, runtime = entry["format"], entry["runtime"]
    except (ValueError, TypeError, KeyError) as error:
        raise Damaged(f"runtime.json is damaged: {error!r}") from error
    if format_ != FORMAT or runtime not in RUNTIMES:
        raise Damaged(f"runtime.json has format {format_!r} and runtime {runtime!r}, which this load.py cannot run")
    return dict(entry)


def _packed_entry(folder: Path, short: Mapping[str, Any]) -> dict[str, Any]:
    """The entry that a packed file holds; its own name takes the place of those of the files in it."""
    try:
        entry = _decoder().read_head(inside(folder, short["packed"]).read_bytes())[0]["entry"]
        return {**entry, "packed": entry["files"], "files": [short["packed"]]}
    except (ValueError, TypeError, KeyError, IndexError, lzma.LZMAError, zlib.error) as error:
        raise Damaged(f"{short['packed']} is damaged: {error!r}") from error


def unpacked(folder: Path, entry: Mapping[str, Any]) -> Path:
    """Decode the packed model files into a private folder, which goes with the process."""
    data, place = inside(folder, entry["files"][0]).read_bytes(), Path(tempfile.mkdtemp(prefix="quadriga-"))
    atexit.register(shutil.rmtree, place, ignore_errors=True)
    for number, name in enumerate(entry["packed"]):
        if not re.fullmatch(NAME, name):
            raise Damaged(f"{name!r} is not a plain file name")
        try:
            (place / name).write_bytes(_decoder().unpack(data, number))
        except (ValueError, TypeError, KeyError, IndexError, lzma.LZMAError, zlib.error) as error:
            raise Damaged(f"{entry['files'][0]} is damaged: {error!r}") from error
    return place


def _decoder() -> types.ModuleType:
    """_unpack.py, which lies beside this file."""
    path = Path(__file__).resolve().with_name("_unpack.py")
    if not path.is_file():
        raise Damaged("_unpack.py is missing")
    module = types.ModuleType("_unpack")
    exec(compile(path.read_text(encoding="utf-8"), str(path), "exec"), module.__dict__)
    return module


def check_files(folder: Path) -> int:
    """Compare every file with manifest.json, and return how many there are; 0 when there is no manifest."""
    if not (folder / "manifest.json").exists():
        return 0
    text = inside(folder, "manifest.json").read_bytes()
    try:
        manifest = json.loads(text)
        canonical = (json.dumps(manifest, indent=1, ensure_ascii=False) + "\n").encode()
        files = {name: (row["sha256"], row["bytes"]) for name, row in manifest["files"].items()}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise Damaged(f"manifest.json is damaged: {error!r}") from error
    if canonical != text or manifest.get("format") != FORMAT:
        raise Damaged("manifest.json is damaged: it is not as it was written")
    for name, (digest, size) in files.items():
        path = inside(folder, name)
        if path.stat().st_size != size or _sha256(path) != digest:
            raise Damaged(f"{name} is damaged: its size or SHA-256 differs from manifest.json")
    for name in ("runtime.json", *read_entry(folder)["files"]):
        if name not in files:
            raise Damaged(f"manifest.json is damaged: it lacks {name}")
    return len(files)


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_probes(folder: Path, entry: Mapping[str, Any], run: Callable[..., Tree]) -> float:
    """Run the probe inputs and return the largest difference relative to the largest recorded output."""
    from safetensors.torch import load_file

    probes = load_file(inside(folder, "probes.safetensors"))
    leaves = [probes[f"input.{i}"] for i in range(len(entry["names"]))]
    found = flatten(entry["outputs"], run(rebuild(entry["inputs"], leaves)))
    worst = max([difference(probes[f"output.{i}"], y) for i, y in enumerate(found)], default=0.0)
    if not worst <= entry["tolerance"]:
        raise Damaged(
            f"the outputs for probes.safetensors differ by {worst:.2g} on this machine, allowed {entry['tolerance']:g}"
        )
    return worst


def difference(expected: Tensor, found: Tensor) -> float:
    """max |found − expected| / max |expected|; infinite where shapes or NaNs differ.

    For integers: the share that differs, where it is above 1 % (an argmax of near equals may fall either way).
    """
    if expected.shape != found.shape or expected.dtype != found.dtype:
        return float("inf")
    if not expected.numel():
        return 0.0
    if not expected.is_floating_point():
        share = float((expected != found).double().mean())
        return share if share > 0.01 else 0.0
    same = (expected == found) | (expected.isnan() & found.isnan())  # equal infinities too
    gap = torch.where(same, 0.0, (expected.double() - found.double()).abs())
    scale = expected.double().abs().nan_to_num(0.0, 0.0).max().clamp_min(1e-30)
    return float((gap.max() / scale).nan_to_num(float("inf")))


# ---- inputs and outputs


def flatten(shape: Mapping[str, Any], tree: Tree) -> list[Tensor]:
    """The tensors of a tree in the recorded order.

    Raises:
        ValueError: the tree has another structure than the model was exported with.
    """
    leaves: list[Tensor] = []
    _flatten(shape, tree, leaves)
    return leaves


def _flatten(shape: Mapping[str, Any], tree: Tree, leaves: list[Tensor]) -> None:
    kind = shape["kind"]
    if kind == "tensor":
        if not isinstance(tree, Tensor):
            raise ValueError(f"expected a tensor, got {type(tree).__name__}")
        leaves.append(tree)
    elif kind == "value":
        if tree != shape["value"]:
            raise ValueError(f"the model was exported with {shape['value']!r}, got {tree!r}")
    elif kind == "dict":
        if not isinstance(tree, Mapping) or set(tree) != set(shape["items"]):
            got = sorted(map(str, tree)) if isinstance(tree, Mapping) else type(tree).__name__
            raise ValueError(f"expected a dict of {', '.join(shape['items'])}; got {got}")
        for key, item in shape["items"].items():
            _flatten(item, tree[key], leaves)
    else:
        if not isinstance(tree, tuple | list) or len(tree) != len(shape["items"]):
            raise ValueError(f"expected a tuple of {len(shape['items'])}, got {type(tree).__name__}")
        for item, part in zip(shape["items"], tree, strict=True):
            _flatten(item, part, leaves)


def rebuild(shape: Mapping[str, Any], leaves: list[Tensor]) -> Tree:
    """The tree that holds these tensors."""
    kind = shape["kind"]
    if kind == "tensor":
        return leaves[shape["index"]]
    if kind == "value":
        return shape["value"]
    if kind == "dict":
        return {key: rebuild(item, leaves) for key, item in shape["items"].items()}
    return tuple(rebuild(item, leaves) for item in shape["items"])


def _shaped(entry: Mapping[str, Any], call: Leaves) -> Callable[..., Tree]:
    inputs, outputs = entry["inputs"], entry["outputs"]

    def run(tree: Tree = None, **named: Tree) -> Tree:
        return rebuild(outputs, call(flatten(inputs, named if tree is None else tree)))

    return run


def _single(entry: Mapping[str, Any]) -> bool:
    """One tensor in, one tensor of at least one dimension out: the case with the shortest way."""
    return bool(entry["inputs"]["kind"] == entry["outputs"]["kind"] == "tensor" and entry["rank"] > 0)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _needs(error: ImportError, entry: Mapping[str, Any]) -> ImportError:
    return ImportError(f"{error}; this model needs: pip install {' '.join(entry['needs'])}")


# ---- ONNX Runtime


def onnxruntime_model(folder: Path, entry: Mapping[str, Any], threads: int | None) -> Callable[..., Tree]:
    """Run model.onnx with ONNX Runtime: threads do not spin, products are exactly what the file says."""
    try:
        import onnxruntime
    except ImportError as error:
        raise _needs(error, entry) from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or _cores()
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    for key, value in {"session.intra_op.allow_spinning": "0", **entry["session"]}.items():
        options.add_session_config_entry(key, value)
    session = onnxruntime.InferenceSession(inside(folder, entry["files"][0]), options, providers=["CPUExecutionProvider"])
    names = [o.name for o in session.get_outputs()]
    plain = onnxruntime.RunOptions()
    execute = getattr(getattr(session, "_sess", None), "run", session.run)  # 1.5 µs less than session.run
    used = [i.name for i in session.get_inputs()]
    places = entry["names"] if set(used) <= set(entry["names"]) else used  # another's file has its own names: by place
    first, tensor = places[0], torch.from_numpy

    def single(x: Tensor) -> Tensor:  # the output is new memory in every call
        return tensor(execute(names, {first: x.numpy(force=True)}, plain)[0])

    def call(leaves: list[Tensor]) -> list[Tensor]:
        feed = {name: x.numpy(force=True) for name, x in zip(places, leaves, strict=True) if name in used}
        return [torch.as_tensor(y) for y in execute(names, feed, plain)]

    return single if _single(entry) and used == [first] else _shaped(entry, call)


# ---- OpenVINO


def openvino_model(folder: Path, entry: Mapping[str, Any], threads: int | None) -> Callable[..., Tree]:
    """Run model.onnx with OpenVINO: one static graph for each recorded batch size, and a dynamic one for others."""
    requests: dict[int | None, Any] = {}

    def request(batch: int) -> Any:
        key = batch if batch in entry["batches"] else None
        if key not in requests:
            requests[key] = openvino_request(folder, entry, key, threads)
        return requests[key]

    def single(x: Tensor) -> Tensor:
        ready = requests.get(len(x)) or request(len(x))
        ready.infer({0: x.contiguous().numpy(force=True)}, share_inputs=True)
        return torch.from_numpy(ready.get_output_tensor(0).data.copy())  # its own memory: the next call writes there

    def call(leaves: list[Tensor]) -> list[Tensor]:
        ready = request(len(leaves[0]))
        used = {i.any_name for i in ready.model_inputs}
        given = zip(entry["names"], leaves, strict=True)
        ready.infer({name: x.contiguous().numpy(force=True) for name, x in given if name in used}, share_inputs=True)
        return [torch.as_tensor(t.data.copy()) for t in ready.output_tensors]

    request(entry["batches"][0] if entry["batches"] else 0)  # what fails, fails when loading
    return single if _single(entry) else _shaped(entry, call)


def openvino_request(folder: Path, entry: Mapping[str, Any], batch: int | None, threads: int | None) -> Any:
    """An inference request for one batch size, or for any."""
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]  # importing openvino sends an event otherwise
    try:
        import openvino
    except ImportError as error:
        raise _needs(error, entry) from error
    core = openvino.Core()
    network = core.read_model(inside(folder, entry["files"][0]))
    if batch is not None:
        network.reshape({i.any_name: [batch, *list(i.partial_shape)[1:]] for i in network.inputs})
    hints = {"PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": "1", "INFERENCE_NUM_THREADS": str(threads or _cores())}
    return core.compile_model(network, "CPU", {**hints, **entry["session"]}).create_infer_request()


# ---- ExecuTorch


def executorch_model(folder: Path, entry: Mapping[str, Any], threads: int | None) -> Callable[..., Tree]:
    """Run model.pte with ExecuTorch. Its threads are the process's; a batch above the planned one is split."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from executorch.extension.pybindings import portable_lib
            from executorch.runtime import Runtime

            portable_lib._unsafe_reset_threadpool(threads or _cores())  # the only way it has; unsafe while a model runs
    except ImportError as error:
        raise _needs(error, entry) from error
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

    return single if _single(entry) else _shaped(entry, call)


# ---- OpenCL


def opencl_model(folder: Path, entry: Mapping[str, Any], threads: int | None) -> Callable[..., Tree]:
    """Run model.onnx with tinygrad on an OpenCL device, and nowhere else.

    Kernels are compiled at the first call of each shape of inputs, and recorded at the second; the weights are there once.
    """
    cl_device(entry, threads)
    runner = opencl_runner(inside(folder, entry["files"][0]))
    ready: dict[tuple[torch.Size, ...], Callable[..., list[Any]]] = {}

    def call(leaves: list[Tensor]) -> list[Tensor]:
        key = tuple(x.shape for x in leaves)
        if key not in ready:
            while len(ready) >= SHAPES:  # each keeps its intermediate results on the device
                ready.pop(next(iter(ready)))
            ready[key] = opencl_shape(runner, entry["names"])
        return [from_cl(y) for y in on_cl(ready[key], *map(to_cl, leaves))]

    def single(x: Tensor) -> Tensor:
        return call([x])[0]

    return single if _single(entry) else _shaped(entry, call)


def cl_device(entry: Mapping[str, Any], threads: int | None = None) -> Any:
    """tinygrad's OpenCL device, opened.

    Args:
        entry: its "needs" are what pip installs.
        threads: of a device that is the CPU, through PoCL; counts if this is the first use in the process.

    Raises:
        ImportError: there is no tinygrad.
        RuntimeError: there is no OpenCL device; the text says what to install.
    """
    try:
        from tinygrad import Device
    except ImportError as error:
        raise _needs(error, entry) from error
    for name in ("POCL_MAX_PTHREAD_COUNT", "POCL_CPU_MAX_CU_COUNT"):  # by PoCL's version; read when the device is opened
        if threads is not None:
            os.environ.setdefault(name, str(threads))
    try:
        return Device["CL"]
    except Exception as error:  # AttributeError without a library, RuntimeError without a driver, IndexError without a device
        raise RuntimeError(f"there is no OpenCL device ({error}); install a driver: {OPENCL_REMEDY}") from error


def opencl_runner(path: Path) -> Any:
    """The ONNX file as tinygrad reads it, its weights on the OpenCL device."""
    from tinygrad.nn.onnx import OnnxRunner

    return on_cl(lambda: OnnxRunner(str(path)).to("CL"))


def opencl_shape(runner: Any, names: list[str]) -> Callable[..., list[Any]]:
    """The network for inputs of one shape, recorded as one list of kernels; what the runner learned of a shape stays here."""
    from tinygrad import TinyJit

    own = copy(runner)
    own.graph_values, own.variable_dims, own._python_const_cache = dict(runner.graph_values), {}, {}

    def forward(*leaves: Any) -> list[Any]:
        given = {name: x for name, x in zip(names, leaves, strict=True) if name in own.graph_inputs}
        outputs = own(given)
        return [outputs[name].contiguous().realize() for name in own.graph_outputs]

    return TinyJit(forward)


def on_cl(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call with the OpenCL device as the one where new tensors go, whatever the environment says."""
    from tinygrad.helpers import Context

    with Context(DEV="CL"):
        return function(*arguments)


def to_cl(x: Tensor) -> Any:
    """A copy on the OpenCL device; of no dimensions too, which tinygrad would make a constant of no device."""
    import tinygrad

    return (
        tinygrad.Tensor(x.reshape(x.shape or (1,)).contiguous().numpy(force=True), device="CL")
        .reshape(tuple(x.shape))
        .realize()
    )


def from_cl(y: Any) -> Tensor:
    """A copy in memory of its own. Never of a tensor that lies elsewhere: the model would not have run on the device."""
    if y.device != "CL":
        raise RuntimeError(f"the output lies on {y.device}, not on the OpenCL device CL")
    return torch.from_numpy(y.numpy().copy())


# ---- PyTorch


def eager_model(folder: Path, entry: Mapping[str, Any], threads: int | None) -> Callable[..., Tree]:
    """Run program.py, the exported operations, with the weights of weights.safetensors."""
    torch_settings(entry["session"], threads)
    gpu = gpu_of(entry["session"])
    weights = load_weights(folder, entry, gpu)
    forward = program(folder)
    ready = channels_last if entry["session"]["channels_last"] else lambda x: x

    def single(x: Tensor) -> Tensor:
        with torch.no_grad():  # not inference_mode: its outputs could not be changed or learned from
            return forward(None, *weights, ready(x))[0]

    def call(leaves: list[Tensor]) -> list[Tensor]:
        with torch.no_grad():
            return list(forward(None, *weights, *map(ready, leaves)))

    if gpu is not None:
        return on_gpu(entry, gpu, call)
    return single if _single(entry) else _shaped(entry, call)


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
                    compiled[key] = torch.compile(Program(program(folder), weights).eval(), dynamic=key is None)
                    return list(compiled[key](*map(ready, leaves)))
            return list(compiled[key](*map(ready, leaves)))

    def single(x: Tensor) -> Tensor:
        return call([x])[0]

    if gpu is not None:
        return on_gpu(entry, gpu, call)
    return single if _single(entry) else _shaped(entry, call)


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


def program(folder: Path) -> Callable[..., Any]:
    """The function `forward` of program.py, made anew, so that each compilation has its own; a module, as dynamo asks."""
    path = inside(folder, "program.py")
    module = types.ModuleType(f"model_program_{next(_numbers)}")
    sys.modules[module.__name__] = module
    exec(compile(path.read_text(encoding="utf-8"), str(path), "exec"), module.__dict__)
    return module.forward


_numbers = itertools.count()


def load_weights(folder: Path, entry: Mapping[str, Any], gpu: torch.device | None = None) -> list[Tensor | None]:
    """The program's weights in order, on a GPU if one is given; tied ones are one tensor, integers become float again."""
    from safetensors.torch import load_file

    stored, four = load_file(inside(folder, "weights.safetensors")), entry.get("four", {})
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


# ---- NVIDIA GPUs


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

    return single if _single(entry) else _shaped(entry, moved)


def cuda_graphs_model(folder: Path, entry: Mapping[str, Any], threads: int | None) -> Callable[..., Tree]:
    """Replay program.py, recorded as a CUDA graph at the first call of each shape of inputs. Calls take turns."""
    torch_settings(entry["session"], threads)
    gpu = gpu_of(entry["session"])
    assert gpu is not None, "cuda_graphs is built for a GPU"
    weights, forward, nhwc = load_weights(folder, entry, gpu), program(folder), entry["session"]["channels_last"]
    call = Replay(lambda leaves: list(forward(None, *weights, *leaves)), gpu, nhwc)

    def single(x: Tensor) -> Tensor:
        return call([x])[0]

    return single if _single(entry) else _shaped(entry, call)


class Replay:
    """Recordings by the shapes and types of inputs, the last `SHAPES` of them; they share intermediate memory."""

    def __init__(self, run: Leaves, gpu: torch.device, nhwc: bool) -> None:
        self.run, self.gpu, self.nhwc = run, gpu, nhwc
        self.ready: dict[tuple[Any, ...], Recording] = {}
        self.lock, self.last = threading.Lock(), torch.cuda.current_stream(gpu)
        self.place = (gpu, torch.cuda.Stream(gpu), torch.cuda.graph_pool_handle())

    def __call__(self, leaves: list[Tensor]) -> list[Tensor]:
        """Input tensors in either memory → outputs in memory of their own, where the first input lies."""
        home, key = leaves[0].device, tuple((x.shape, x.dtype) for x in leaves)
        with self.lock, torch.no_grad():
            stream = torch.cuda.current_stream(self.gpu)
            if stream != self.last:  # the buffers may still be in use on the other one
                stream.wait_stream(self.last)
                self.last = stream
            recording = self.ready.get(key) or self.record(key, leaves)
            outputs = recording.replay(leaves)
            return [y.clone() if home == self.gpu else y.to(home) for y in outputs]  # the next call writes there

    def record(self, key: tuple[Any, ...], leaves: list[Tensor]) -> Recording:
        """A new recording, in place of the oldest one if there are too many."""
        while len(self.ready) >= SHAPES:
            torch.cuda.synchronize(self.gpu)  # it may be running
            self.ready.pop(next(iter(self.ready)))
        self.ready[key] = made = Recording(self.run, leaves, self.place, self.nhwc)
        return made


class Recording:
    """A program's kernels for inputs of one shape, with buffers for its inputs and outputs.

    Args:
        run: the program.
        leaves: inputs of that shape.
        place: the GPU, the stream to record on, and the memory that recordings share: they are replayed in turn, and nothing is
            left in it from one to the next.
        nhwc: whether buffers of images are channels-last.

    Raises:
        RuntimeError: it reads values back while it runs.
    """

    def __init__(self, run: Leaves, leaves: list[Tensor], place: tuple[Any, Any, Any], nhwc: bool) -> None:
        self.run, self.graph, gpu = run, None, place[0]
        with torch.inference_mode(False), torch.no_grad(), torch.cuda.device(gpu), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.inputs = [channels_last(x.to(gpu, copy=True)) if nhwc else x.to(gpu, copy=True) for x in leaves]
            if all(x.numel() for x in self.inputs):  # of no examples, no kernel would be recorded
                self._warm(*place)
                self._record(*place)

    def _warm(self, gpu: torch.device, side: Any, pool: Any) -> None:
        """Run beside the caller's stream, so that libraries and plans are ready; the last time, reading back is an error."""
        here, mode = torch.cuda.current_stream(gpu), torch.cuda.get_sync_debug_mode()
        side.wait_stream(here)
        try:
            with torch.cuda.stream(side):
                for number in range(3):
                    if number == 2:
                        torch.cuda.set_sync_debug_mode("error")
                    self.run(self.inputs)
        except RuntimeError as error:
            raise RuntimeError(f"no CUDA graph can be recorded: {error}") from error
        finally:
            torch.cuda.set_sync_debug_mode(mode)
            here.wait_stream(side)

    def _record(self, gpu: torch.device, side: Any, pool: Any) -> None:
        graph, here = torch.cuda.CUDAGraph(), torch.cuda.current_stream(gpu)
        recording = torch.cuda.graph(graph, pool=pool, stream=side, capture_error_mode="thread_local")
        with torch.cuda.stream(here), recording:  # one that fails leaves its own stream behind as the current one
            self.outputs = self.run(self.inputs)
        self.graph = graph

    def replay(self, leaves: list[Tensor]) -> list[Tensor]:
        """The outputs' buffers, once these inputs have been worked off."""
        for buffer, x in zip(self.inputs, leaves, strict=True):
            buffer.copy_(x, non_blocking=True)
        if self.graph is None:
            return self.run(self.inputs)
        self.graph.replay()
        return self.outputs


RUNTIMES = {
    "cuda_graphs": cuda_graphs_model,
    "eager": eager_model,
    "executorch": executorch_model,
    "inductor": inductor_model,
    "onnxruntime": onnxruntime_model,
    "openvino": openvino_model,
    "opencl": opencl_model,
}


def main(folder: str | None = None) -> int:
    """Check the folder, print the result, and return 0, or 1 when something is wrong."""
    place = Path(folder) if folder else Path(__file__).resolve().parent
    try:
        files = check_files(place)
        entry = read_entry(place)
        run = load(place, check=False)
        worst = check_probes(place, entry, run) if (place / "probes.safetensors").exists() else None
    except (Damaged, ImportError, RuntimeError, ValueError) as error:
        print(f"FAILED: {error}")
        return 1
    probes = (
        "no probes" if worst is None else f"probe outputs within {worst:.2g} of the recorded (allowed {entry['tolerance']:g})"
    )
    print(f"ok: {entry['runtime']}, {files} files as in manifest.json, {probes}")
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:2]))
