"""PyTorch's stand-alone form: the captured operations as a Python file, the weights in safetensors, each once."""

from __future__ import annotations

import re
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, fx
from torch.export.graph_signature import InputKind

from quadriga.core.errors import NotApplicable
from quadriga.core.files import atomic_write
from quadriga.core.slots import QuantSpec, RuntimeSpec
from quadriga.runtime._capture import Capture
from quadriga.runtime._floats import SMALLEST, nothing_to_round
from quadriga.runtime._int4 import int4, pack


def write_program(taken: Capture, spec: RuntimeSpec, folder: Path) -> dict[str, Any]:
    """Write program.py and weights.safetensors; return their part of runtime.json.

    Float weights become int8 where the specification says so; what a quantized program holds as int8 already stays.

    Raises:
        NotApplicable: an operation is not data (a script object), or there is nothing to quantize.
    """
    names, tensors = program_weights(taken)
    used = {name: tensors[name] for name in names if name is not None}
    stored, aliases = unique({**used, **tensors})
    stored = {name: t for name, t in stored.items() if name in used}
    aliases = {name: other for name, other in aliases.items() if other in used}
    quantized = [n for n, t in stored.items() if spec.quant is not None and quantizable(n, t, spec.quant)]
    if spec.quant is not None and not (quantized or any(t.dtype == torch.int8 for t in stored.values())):
        raise nothing_to_round((str(t.dtype).removeprefix("torch.") for t in stored.values() if t.dim() >= 2), "int8")
    linear = linear_weights(taken) if spec.quant is not None and spec.quant.weights == 4 else set()
    four = {name: list(stored[name].shape) for name in quantized if name in linear}
    for name in quantized:
        if name in four and spec.quant is not None:
            q, scale = int4(stored[name], spec.quant.group)
            stored[name], stored[name + ".scale"] = pack(q), scale
        else:
            stored[name], stored[name + ".scale"] = int8(stored[name])
    atomic_write(folder / "weights.safetensors", save({n: t.detach().contiguous() for n, t in stored.items()}))
    module = taken.program.graph_module
    placed = module if spec.device == "cpu" else on_device(module, spec.device)
    atomic_write(folder / "program.py", source(placed, len(names)))
    return {
        "files": ["program.py", "weights.safetensors"],
        "weights": names,
        "aliases": aliases,
        "quantized": quantized,
        "four": four,
        "session": {"channels_last": spec.channels_last, "matmul": spec.matmul, "device": spec.device},
        "tolerance": 0.1 if spec.weights != "fp32" or _rounds(spec) else 1e-2 if spec.tf32 else 1e-4,
        "needs": [f"torch>={torch.__version__.split('+')[0]}", "safetensors"],
    }


def float_products(spec: RuntimeSpec) -> None:
    """Refuse int8 activations, which PyTorch's operators could only imitate in float."""
    if spec.quant is not None and spec.quant.activations != "none":
        remedy = "use onnxruntime or openvino, or inductor on the CPU"
        raise NotApplicable(f"{spec.name} does not run {spec.quant.activations} int8", remedy)


def on_device(module: fx.GraphModule, device: str) -> fx.GraphModule:
    """A copy whose operators make new tensors on a device, where weights and inputs will be: a model's forward may name the
    CPU, and says it where it only means the place of its inputs."""
    module, place = deepcopy(module), torch.device(device)

    def there(value: Any) -> Any:
        return place if isinstance(value, torch.device) else value

    for part in (m for m in module.modules() if isinstance(m, fx.GraphModule)):
        for node in list(part.graph.nodes):
            node.args = tuple(map(there, node.args))
            node.kwargs = {name: there(value) for name, value in node.kwargs.items()}
            if node.target is torch.ops.aten._assert_tensor_metadata.default:  # of the device that it was traced on
                part.graph.erase_node(node)
        part.recompile()
    return module


def _rounds(spec: RuntimeSpec) -> bool:
    return spec.quant is not None and spec.quant.activations != "none"


def program_weights(taken: Capture) -> tuple[list[str | None], dict[str, Tensor]]:
    """The program's weights in the order of its arguments (None for one that is not used), and the tensors by name."""
    users = {node.name: len(node.users) for node in taken.program.graph.nodes if node.op == "placeholder"}
    names: list[str | None] = []
    tensors: dict[str, Tensor] = {}
    for item in taken.program.graph_signature.input_specs:
        if item.kind is InputKind.USER_INPUT:
            continue
        target = item.target or ""
        value = taken.program.state_dict.get(target, taken.program.constants.get(target))
        if not isinstance(value, Tensor):
            raise NotApplicable(f"the model holds {target}, a {type(value).__name__} that is not a tensor")
        name = target.removeprefix("model.")
        names.append(name if users[item.arg.name] else None)
        tensors[name] = value
    return names, tensors


def linear_weights(taken: Capture) -> set[str]:
    """Names of the weights that only linear layers use, as matrices [outputs, inputs]."""
    kinds: dict[str, set[str]] = {}
    names = {i.arg.name: (i.target or "").removeprefix("model.") for i in taken.program.graph_signature.input_specs if i.target}
    for node in taken.program.graph.nodes:
        if node.op == "placeholder" and node.name in names:
            places = {(str(user.target), user.all_input_nodes.index(node)) for user in node.users}
            kinds[names[node.name]] = {kind if place == 1 else "" for kind, place in places}
    return {name for name, found in kinds.items() if found == {"aten.linear.default"}}


def unique(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors without those that share memory with an earlier equal one, and the names that stand for such: tied weights."""
    stored: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    seen: dict[tuple[Any, ...], str] = {}
    for name, t in tensors.items():
        key = (t.data_ptr(), t.shape, t.stride(), t.dtype) if t.numel() else (name,)
        if key in seen:
            aliases[name] = seen[key]
        else:
            seen[key], stored[name] = name, t
    return stored, aliases


def quantizable(name: str, t: Tensor, quant: QuantSpec) -> bool:
    """Whether a weight becomes int8: a float32 matrix or more, large enough, its layer not left out."""
    return (
        t.dtype == torch.float32
        and t.dim() >= 2
        and t.numel() >= SMALLEST
        and not any(name == layer or name.startswith(f"{layer}.") for layer in quant.keep_float)
    )


def int8(t: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric int8, one scale per row: t ≈ q · scale with |error| ≤ scale / 2.

    Args:
        t: [rows, …] float.

    Returns:
        q: int8 of t's shape; scale: float32 [rows, 1, …].

    Example:
        >>> q, scale = int8(torch.tensor([[1.0, -127.0], [0.0, 0.0]]))
        >>> q.tolist(), scale.flatten().tolist()
        ([[1, -127], [0, 0]], [1.0, 1.0])
    """
    peak = t.detach().float().abs().flatten(1).amax(1)
    scale = torch.where(peak > 0, peak / 127, 1.0).view(-1, *[1] * (t.dim() - 1))
    return (t.detach().float() / scale).round().clamp(-127, 127).to(torch.int8), scale


def source(module: fx.GraphModule, weights: int) -> str:
    """The operations as a Python file with one function, `forward(self, w0, w1, …, *inputs) -> tuple of tensors`."""
    long = [node.name for node in module.graph.nodes if node.op == "placeholder"][:weights]
    short = {name: f"w{number}" for number, name in enumerate(long)}
    body = re.sub(r"\b[pbc]_\w+", lambda m: short.get(m[0], m[0]), _function(module, "forward"))
    return f'"""The model\'s operations as PyTorch exported them. Made by Quadriga."""\n\n{_imports(module)}\n{body}\n'


def _imports(module: fx.GraphModule) -> str:
    skip = {"torch", "device", "inf", "nan", "NoneType", "fx_pytree", "pytree"}
    lines = ["import torch", "from torch import device, inf, nan", "NoneType = type(None)"]
    for part in module.modules():
        if isinstance(part, fx.GraphModule):
            for name, value in part.graph.python_code("self").globals.items():
                if name not in skip:
                    lines.append(f"from {value.__module__} import {value.__qualname__} as {name}")
    if any("quantized_decomposed" in str(node.target) for node in module.graph.nodes):
        lines.append("import torch.ao.quantization.fx._decomposed  # registers the operations of int8")
    return "\n".join(dict.fromkeys(lines)) + "\n"


def _function(module: fx.GraphModule, name: str) -> str:
    children = [(key, child) for key, child in module.named_children() if isinstance(child, fx.GraphModule)]
    bodies = [_function(child, f"{name}_{key}") for key, child in children]
    holder = (
        [f"class {name}_parts:", *(f"    {key} = classmethod({name}_{key})" for key, _ in children), ""] if children else []
    )
    text = module.graph.python_code("self").src.strip("\n").replace("def forward(", f"def {name}(", 1)
    if children:
        head, _, rest = text.partition(":\n")
        text = f"{head}:\n    self = {name}_parts\n{rest}"
    return "\n".join([*bodies, *holder, text, ""])
