"""ExecuTorch on the CPU: one model.pte with the weights inside, its layers executed by XNNPACK."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import metadata
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quadriga.core.batch import resize
from quadriga.core.errors import NotApplicable
from quadriga.core.files import atomic_write
from quadriga.core.quiet import quiet
from quadriga.core.slots import QuantSpec, RuntimeSpec
from quadriga.runtime._capture import Capture, reason
from quadriga.runtime._reexport import batch_places, reexport
from quadriga.runtime._refuse import PYTORCH
from quadriga.runtime._types import Probe, package_probe
from quadriga.runtime.standalone import difference

NAME = "executorch"
MOST = 64  # examples of one call at least, for which memory is planned; more are split


def probe() -> Probe:
    """It needs executorch, to export and to run, with the packages that it imports."""
    return package_probe("executorch", "executorch", also=("torchao", "flatbuffers", "ruamel", "tabulate"))


def write(taken: Capture, spec: RuntimeSpec, folder: Path, batches: list[int]) -> dict[str, Any]:
    """Write model.pte, quantized as asked. Its memory is planned for the largest batch; `load.py` splits larger ones.

    Raises:
        NotApplicable: half-precision or int8 weights with float products, or a program that ExecuTorch cannot express.
    """
    if spec.weights != "fp32":
        raise NotApplicable(f"executorch stores no {spec.weights} weights here", "use onnxruntime, openvino or inductor")
    most = max(*batches, MOST)
    if spec.quant is None:
        bounded = reexport(taken, taken.program.module(check_guards=False), most)  # type: ignore[arg-type]
    else:
        bounded = _int8(taken, spec.quant, most)
    atomic_write(folder / "model.pte", _lowered(bounded))
    places = batch_places(bounded) if _independent(taken) else [None] * len(taken.output_names)
    return {
        "files": ["model.pte"],
        "session": {"most": most, "places": places},
        "check": [most],
        "tolerance": 1e-4 if spec.quant is None else 0.1,
        "needs": ["torch", "safetensors", f"executorch>={metadata.version('executorch')}"],
    }


def _int8(taken: Capture, quant: QuantSpec, most: int) -> Capture:
    """Signed activations and weights, 8 bits each; whether that saturates without VNNI was not measured."""
    if quant.activations == "none":
        raise NotApplicable("executorch has no float products of int8 weights", 'use activations = "static" or "dynamic"')
    with quiet("torchao"):
        from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import XNNPACKQuantizer, get_symmetric_quantization_config

        from quadriga.runtime._pt2e import observed, quantize

        config = get_symmetric_quantization_config(is_per_channel=quant.per_channel, is_dynamic=quant.activations == "dynamic")
        quantizer = XNNPACKQuantizer().set_global(observed(config, quant))
    return quantize(taken, quant, quantizer, most)


def _lowered(taken: Capture) -> bytes:
    """The program as ExecuTorch stores it."""
    with torch.no_grad(), quiet("torchao", "executorch"):
        from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
        from executorch.exir import to_edge_transform_and_lower
        from executorch.kernels import quantized  # noqa: F401  # registers the operators of int8 between layers

        try:
            program = taken.program.run_decompositions({op: _slices for op in SPLITS})
            edge = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()])
            return bytes(edge.to_executorch().buffer)
        except Exception as error:  # its passes raise many types
            raise NotApplicable(f"the model has no ExecuTorch form: {reason(error)}", PYTORCH) from error


def _slices(value: Tensor, sizes: int | Sequence[int], dim: int = 0) -> list[Tensor]:
    """Parts of a tensor as `split` gives them, one operation each: where the verifier of the edge dialect calls a copying
    `split_with_sizes` on a fake tensor, PyTorch 2.13 takes its symbolic batch for a constant.

    Example:
        >>> [part.tolist() for part in _slices(torch.arange(5), [2, 3])]
        [[0, 1], [2, 3, 4]]
        >>> [len(part) for part in _slices(torch.arange(5), 2)]
        [2, 2, 1]
    """
    length = value.shape[dim]
    steps = [sizes] * -(-length // sizes) if isinstance(sizes, int) else sizes
    ends = [*accumulate(steps, initial=0)]
    return [torch.ops.aten.slice.Tensor(value, dim, a, b) for a, b in pairwise(ends)]


SPLITS = (torch.ops.aten.split.Tensor, torch.ops.aten.split_with_sizes.default)


def _independent(taken: Capture) -> bool:
    """Whether two examples together give what they give one by one, so that a batch may be split."""
    pair, module = resize(list(taken.sample), 2), taken.program.module(check_guards=False)
    with torch.no_grad():
        both = module(*pair)
        parts = [module(*(leaf[i : i + 1] for leaf in pair)) for i in range(2)]
    places = batch_places(taken)
    return all(
        place is None or difference(y, torch.cat([a, b], place)) < 1e-4
        for place, y, a, b in zip(places, both, *parts, strict=True)
    )
