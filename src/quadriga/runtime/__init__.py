"""How a finished model executes: one file a runtime, one call shape.

A runtime is a module of this folder with `NAME`, `probe() -> Probe` and `write(capture, spec, folder, batches) -> dict`;
adding one touches its file and its part of `load.py` in `standalone/`.
"""

from __future__ import annotations

import importlib
import json
import pkgutil
import shutil
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from quadriga.core import cuda
from quadriga.core.batch import Tree, call, evaluating, resize, tensors, to_device, tree_map
from quadriga.core.copies import copy_model
from quadriga.core.errors import BadInput, NotApplicable, did_you_mean
from quadriga.core.files import atomic_write, write_json
from quadriga.core.half import HALF, halved, in_float, in_half
from quadriga.core.setup import Context
from quadriga.core.slots import RuntimeSpec
from quadriga.runtime import _beside, standalone
from quadriga.runtime._floats import TOLERANCE, computes, stored_tolerance
from quadriga.runtime._refuse import PYTORCH, not_exported, refusal, refusing, said
from quadriga.runtime._types import Built, Probe

__all__ = ["PYTORCH", "Built", "Probe", "build", "open_built", "prepare", "probe", "refusal"]


@cache
def _modules() -> dict[str, ModuleType]:
    names = [m.name for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_") and m.name != "standalone"]
    found = [importlib.import_module(f"{__name__}.{name}") for name in names]
    return {module.NAME: module for module in found}


def probe() -> dict[str, Probe]:
    """Every runtime by name, and whether it can run here. Nothing heavy is imported.

    Example:
        >>> probe()["eager"].ok
        True
    """
    return {name: module.probe() for name, module in sorted(_modules().items())}


@torch.inference_mode(mode=False)  # a copy that is made in the caller's inference mode could not be exported
def build(model: nn.Module, spec: RuntimeSpec, context: Context, folder: str | Path, batches: Sequence[int] = (1, 64)) -> Built:
    """Realise a specification: write the model's files, `load.py` and `runtime.json` into a folder.

    Args:
        model: finished; it is not changed.
        spec: what to realise.
        context: its example inputs give the structure, its calibration batches the ranges of int8 activations
            and the dimensions that vary.
        folder: is made when missing; files of the same names are replaced.
        batches: sizes to specialise for, where the runtime can; any other size runs too.

    Raises:
        BadInput: no such runtime.
        NotApplicable: the runtime is absent, cannot realise the specification, or the model cannot be exported;
            the reason names the line or the layer.
    """
    _able(spec)
    if spec.alone is not None:
        _able(spec.alone)
        _beside.same_process(spec, spec.alone)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    taken, entry = _written(model, spec, context, folder, sorted({b for b in batches if b > 1 or spec.alone is None}))
    if (one := spec.alone) is not None:
        _beside.add(entry, folder, lambda there: _written(model, one, context, there, [1])[1])
    if spec.storage == "entropy":
        _store_packed(folder, entry)
    else:
        write_json(folder / "runtime.json", entry)
    atomic_write(folder / "load.py", standalone.source(*standalone.runtimes(entry)).encode())
    shutil.rmtree(folder / "__pycache__", ignore_errors=True)
    built = open_built(folder, spec)
    _check(model, built, taken)
    return built


def _written(
    model: nn.Module, spec: RuntimeSpec, context: Context, folder: Path, sizes: list[int]
) -> tuple[Any, dict[str, Any]]:
    """Export the model and write one runtime's files; what was exported, and what runtime.json is to say."""
    from quadriga.runtime._capture import capture

    try:
        taken = capture(model, context, spec.weights if spec.by_torch else "fp32")
    except NotApplicable as refused:
        raise not_exported(refused, model) from refused.__cause__
    computed = computes(taken)
    _steady(model, taken, computed)
    with refusing(spec.name):
        written = _modules()[spec.name].write(taken, spec, folder, sizes)
    entry = {
        "format": standalone.FORMAT, "runtime": spec.name, "threads": spec.threads, "batches": sizes,
        "inputs": taken.inputs, "names": taken.names, "outputs": taken.outputs, "rank": taken.rank, "quantized": [],
        **written, "computes": computed, "tolerance": max(written["tolerance"], stored_tolerance(computed)),
    }  # fmt: skip
    return taken, entry


def _able(spec: RuntimeSpec) -> None:
    """Raise as `build` does if a runtime cannot run here."""
    modules = _modules()
    if spec.name not in modules:
        raise BadInput(f'there is no runtime "{spec.name}"', did_you_mean(spec.name, modules))
    state = modules[spec.name].probe()
    if not state.ok:
        raise NotApplicable(f"{spec.name} cannot run here: {state.reason}", state.remedy)
    if spec.device not in ("cpu", "cuda"):
        raise BadInput(f'there is no device "{spec.device}"', "known: cpu, cuda")
    if spec.by_torch and spec.device != "cpu" and (gpus := cuda.found()).used is None:
        raise NotApplicable(f"{spec.name} cannot run on the GPU here: {gpus.reason}", gpus.remedy)


def _store_packed(folder: Path, entry: dict[str, Any]) -> None:
    """Put the model files and the entry into one entropy-coded file, with what decodes it beside `load.py`."""
    from quadriga.runtime import _pack
    from quadriga.runtime.standalone import _unpack

    entry = {**entry, "needs": [*entry["needs"], *(["numpy"] if "numpy" not in entry["needs"] else [])]}
    files = {name: (folder / name).read_bytes() for name in entry["files"]}
    atomic_write(folder / standalone.PACKED, _pack.pack(files, entry))
    atomic_write(folder / "_unpack.py", Path(_unpack.__file__).read_bytes())
    atomic_write(folder / "runtime.json", json.dumps({"format": standalone.FORMAT, "packed": standalone.PACKED}).encode())
    for name in files:
        (folder / name).unlink()


def _check(model: nn.Module, built: Built, taken: Any) -> None:
    """Run what was built on 1, 2 and the sizes of its entry: equal shapes and types, close values where nothing was quantized.

    A part that would have to be compiled first is left out.

    Raises:
        NotApplicable: it fails or computes something else.
    """
    entry, run = built.entry, None
    for batch in (1, 2, *entry.get("check", ())):
        part = entry.get("alone", entry) if batch == 1 else entry
        if part.get("compiles"):
            continue
        name = part["runtime"]
        inputs = standalone.rebuild(taken.inputs, list(resize(taken.sample, batch)))
        expected = _outputs(model, inputs)
        try:
            run = run or built.run()
            found = standalone.flatten(taken.outputs, run(inputs))
        except Exception as error:  # each runtime raises its own types
            remedy = "" if name == "eager" else PYTORCH
            raise NotApplicable(f"{name} fails at batch {batch}: {said(error)}", remedy) from error
        worst = _apart(expected, found)
        if not worst <= (TOLERANCE[entry["computes"]] if built.spec.exact else float("inf")) or worst == float("inf"):
            how = f"{worst:.2g} apart" if worst < float("inf") else "of another shape or type, or not finite"
            raise _differs(taken, inputs, expected, f"{name} computes other outputs at batch {batch}: {how}")


def _apart(expected: Sequence[torch.Tensor], found: Sequence[torch.Tensor]) -> float:
    return max(standalone.difference(e, f) for e, f in zip(expected, found, strict=True))


def _outputs(model: nn.Module, inputs: Tree) -> list[torch.Tensor]:
    with evaluating(model), torch.no_grad():
        return tensors(call(model, inputs))


def _steady(model: nn.Module, taken: Any, computed: str) -> None:
    """Refuse a model that gives other outputs each time: no runtime could be compared with it, whatever its own words are."""
    inputs = standalone.rebuild(taken.inputs, list(resize(taken.sample, 2)))
    if (worst := _apart(_outputs(model, inputs), _outputs(model, inputs))) > TOLERANCE[computed]:
        raise NotApplicable(
            f"the model gives other outputs for equal inputs in eval mode, {worst:.2g} apart",
            "draw random numbers in training mode only (if self.training)",
        )


def _differs(taken: Any, inputs: Tree, expected: list[torch.Tensor], problem: str) -> NotApplicable:
    """Who is to blame where outputs differ: the export, which every runtime needs, or this runtime alone."""
    try:
        with torch.no_grad():
            exported = list(taken.program.module(check_guards=False)(*tensors(inputs)))
    except Exception as error:  # an exported program may hold to sizes that it was traced with
        return NotApplicable(f"{problem}, and the export fails: {said(error)}", "write the forward for any batch size")
    if _apart(expected, exported) > TOLERANCE["float32"]:
        return NotApplicable(
            f"{problem}, and so does what torch.export made of the model, which every runtime needs",
            "look for Python values in the forward that depend on the inputs: the export keeps those of its example",
        )
    return NotApplicable(problem, PYTORCH)


def open_built(folder: str | Path, spec: RuntimeSpec | None = None) -> Built:
    """The built model of a folder that `build` or an artifact wrote.

    Raises:
        quadriga.runtime.standalone.Damaged: a file is missing or unreadable.
    """
    folder = Path(folder)
    entry = standalone.read_entry(folder)
    files = ("runtime.json", *entry["files"])
    size = sum(standalone.inside(folder, name).stat().st_size for name in files)
    return Built(folder, spec or _spec_of(entry), entry, files, size)


def _spec_of(entry: Mapping[str, Any]) -> RuntimeSpec:
    alone = entry.get("alone")
    return RuntimeSpec(entry["runtime"], entry["threads"], alone=_spec_of(alone) if alone else None)


def prepare(model: nn.Module, spec: RuntimeSpec) -> Callable[[Tree], Tree]:
    """A live module as eager PyTorch runs it under a specification: weights, memory format, matmul precision and threads.

    The matmul precision and the threads are the process's. The model is not changed: other weights are a copy, and so is a
    model on a GPU, which takes inputs from where they are and gives outputs back there.

    Args:
        model: any module.
        spec: of the runtime eager, without quantization.

    Returns:
        inputs tree → outputs tree, in inference mode.
    """
    assert spec.alone is None, "a live module executes in one way"
    session = {"matmul": spec.matmul, "device": spec.device}
    standalone.torch_settings(session, spec.threads)
    gpu = standalone.gpu_of(session)
    half = HALF.get(spec.weights)
    if half is not None:
        model = halved(model, half)
    if gpu is not None:
        model = copy_model(model).to(gpu)
    if spec.channels_last:
        model = copy_model(model).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    modes = model.eval()

    def run(inputs: Tree) -> Any:
        if spec.channels_last:
            inputs = tree_map(standalone.channels_last, inputs)
        with torch.inference_mode():
            return call(modes, inputs) if half is None else in_float(call(modes, in_half(inputs, half)))

    def there(inputs: Tree) -> Any:
        return to_device(run(to_device(inputs, gpu)), tensors(inputs)[0].device)

    return run if gpu is None else there
