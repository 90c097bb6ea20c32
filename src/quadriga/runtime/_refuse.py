"""What a runtime or the export says of a model it cannot take, as a refusal: the informative line, and a way out."""

from __future__ import annotations

import re
import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence

from quadriga.core.errors import NotApplicable
from quadriga.runtime._capture import reason

PACKAGES = ("onnxruntime", "onnx", "onnxscript", "onnx_ir", "openvino", "executorch", "torchao", "tinygrad")  # theirs to fail
COMPILER = ("torch._inductor", "torch._dynamo")
NAMES = {"torch._inductor": "inductor", "torch._dynamo": "inductor", "onnx": "onnxruntime", "onnxscript": "onnxruntime"}
PYTORCH = "use eager or inductor, which run PyTorch's own operators"
OTHERS = "use eager, onnxruntime or openvino"
FRAME = re.compile(r"^(Exception from |Check '|While validating|FrontEnd API|Model wasn't|Summary:|-- |\[CPU\]$)")
# What stands in the way of an export: its words, or the functions of PyTorch that were active; and a way out that was tried.
WAYS = (
    (
        r"pack_padded_sequence|forward_packed|PackedSequence",
        "packed sequences, whose lengths torch.export cannot trace",
        "give the padded batch to the recurrent layer and take each sequence's state at its length with torch.gather",
    ),
    (
        r"data-dependent|Could not (guard|extract)|GuardOnDataDependent",
        "a data-dependent branch or size, which the values of the inputs decide",
        "choose with torch.where in place of if, and keep sizes that come from shapes",
    ),
    (r"batch size is fixed", "", "write the batch as x.shape[0], or use flatten(1)"),
    (
        r"quantized\.\w*PackedParams|torchao|AffineQuantizedTensor",
        "a layer that is quantized already, whose packed weights torch.export cannot take",
        "give the float model: quantize_int8 rounds it for the runtime that is chosen",
    ),
    (
        r"\bsparse\b|Sparse(CPU|CSR|COO)",
        "a sparse tensor, which torch.export cannot take",
        "keep the matrix dense (.to_dense())",
    ),
)
GENERAL = "rewrite that line in tensor operations until torch.export.export(model, inputs, strict=False) accepts it"


def refusal(error: BaseException, runtime: str = "") -> NotApplicable | None:
    """The refusal that a runtime's own exception stands for; None where the error is a mistake of ours, or a lack of memory.

    Args:
        error: as it was raised.
        runtime: that was asked, where it is known.

    Example:
        >>> refusal(KeyError("a mistake of ours")) is None
        True
        >>> said = "Exception from src/inference/src/cpp/core.cpp:84:\\nCheck 'false' failed at a.cpp:1:\\nno f64 here"
        >>> str(refusal(RuntimeError(said)))
        "openvino cannot run the model: no f64 here (use eager or inductor, which run PyTorch's own operators)"
    """
    package = _package(error)
    if not package or isinstance(error, MemoryError | ImportError | NotApplicable) or "out of memory" in str(error):
        return None
    who = runtime or NAMES.get(package, package)
    remedy = OTHERS if who == "inductor" else "" if who == "eager" else PYTORCH
    return NotApplicable(f"{who} cannot run the model: {said(error)}", remedy)


@contextmanager
def refusing(runtime: str) -> Iterator[None]:
    """What the runtime raises inside becomes a refusal; what is ours stays an error."""
    try:
        yield
    except Exception as error:
        found = refusal(error, runtime)
        if found is None:
            raise
        raise found from error


def _package(error: BaseException) -> str:
    """The package that raised: by the exception's type, its text, or the place; "" if it is none of a runtime's."""
    for kind in type(error).__mro__[:-1]:
        if kind.__module__.startswith(COMPILER):
            return ".".join(kind.__module__.split(".")[:2])
        if kind.__module__.split(".")[0] in PACKAGES:
            return kind.__module__.split(".")[0]
    if re.search(r"Exception from (src|.*[/\\])\S+\.[ch]pp:\d+", str(error)):
        return "openvino"
    frames = traceback.extract_tb(error.__traceback__)
    return next((name for name in PACKAGES if frames and f"/{name}/" in Path(frames[-1].filename).as_posix()), "")


def said(error: BaseException) -> str:
    """The line of an exception's text that tells something.

    Example:
        >>> said(ValueError("[ONNXRuntimeError] : 9 : NOT_IMPLEMENTED : Could not find an implementation for Gemm(13)"))
        'Could not find an implementation for Gemm(13)'
    """
    text = str(error).strip()
    if blocks := re.findall(r"^-- (\w+?)(?:-\d+)? with a message:\n(.*?)(?=^-- |^Summary|\Z)", text, re.M | re.S):
        told = [(operator, lines[-1]) for operator, block in blocks if (lines := _telling(block))]
        causes = [pair for pair in told if "type dynamic" not in pair[1]] or told  # what follows from another's failure
        return _short("; ".join(f"{operator}: {line}" for operator, line in causes[:2])) if causes else _short(text)
    if unknown := re.search(r"^-- No conversion rule found for operations: (.*)", text, re.M):
        return _short("it has no " + re.sub(r"-\d+", "", unknown[1]))
    text = re.sub(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ", "", text)
    text = re.sub(r"Load model from .*? failed:\s*", "", text)
    lines = _telling(text)
    return _short(lines[0]) if lines else type(error).__name__


def _telling(text: str) -> list[str]:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return [line for line in lines if not FRAME.match(line)]


def _short(line: str) -> str:
    line = re.sub(r"\S*/(\w[\w.-]*\.(?:[ch]pp|cc|h|py))", r"\1", line)  # places of another's build tell nobody anything
    return (line if len(line) <= 300 else f"{line[:297]}…").rstrip(" .:")


def not_exported(refused: NotApplicable, model: nn.Module) -> NotApplicable:
    """A refusal of the export, which every runtime needs, with the module that stands in the way and a way out.

    Args:
        refused: as `capture` raised it, from what torch.export raised; a refusal without such a cause stays.
        model: that was to be exported.
    """
    error = refused.__cause__
    if error is None or not refused.reason.startswith("the model cannot be exported"):
        return refused
    name, active = _where(error, model)
    strided = all(t.layout is torch.strided for t in (*model.parameters(), *model.buffers()))
    text = f"{refused.reason}\n{error}\n{active}{'' if strided else ' sparse'}"
    found = next((way for way in WAYS if re.search(way[0], text, re.I)), ("", "", GENERAL))
    place = match[0] if (match := re.search(r" \(at [^()]+:\d+\)$", reason(error))) else ""
    told = f"{found[1]}{place}" if found[1] else refused.reason.removeprefix("the model cannot be exported: ")
    layer = f'in "{name}" ' if name else ""
    return NotApplicable(f"the model cannot be exported, which every runtime needs: {layer}{told}", found[2])


def _where(error: BaseException, model: nn.Module) -> tuple[str, str]:
    """The innermost module whose forward was active, by name, and the functions of PyTorch's layers that were active."""
    modules = list(model.named_modules())
    names = {id(module): name for name, module in modules}
    count = Counter(type(module) for _, module in modules)
    kinds = {type(module): name for name, module in modules if count[type(module)] == 1}  # a copy in half precision was traced
    name, active, seen = "", [], error
    root = str(Path(torch.__file__).parent / "nn")
    while seen is not None:
        for frame, _ in traceback.walk_tb(seen.__traceback__):
            owner = frame.f_locals.get("self")
            active += ["PackedSequence"] * any(isinstance(v, PackedSequence) for v in frame.f_locals.values())
            name = names.get(id(owner), kinds.get(type(owner), name)) or name
            if frame.f_code.co_filename.startswith(root):
                active.append(frame.f_code.co_name)
        seen = seen.__cause__ or seen.__context__
    return name, " ".join(active)
