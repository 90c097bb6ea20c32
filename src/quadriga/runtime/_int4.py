"""4-bit weights of linear layers, with a scale for each group of inputs of each output."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from quadriga.core.slots import QuantSpec

OPSET = 21  # the first with INT4 and scales for blocks
TOP = 7
SHARES = (1.0, 0.95, 0.9, 0.85, 0.8)  # of a group's largest weight, that the largest integer may stand for


def int4(weight: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """Symmetric 4-bit integers: weight ≈ q · scale, scales of least squared error among five; |error| ≤ max|group| / 5.

    Args:
        weight: [outputs, inputs] float.
        group: inputs that share a scale; all of an output's where it does not divide them.

    Returns:
        q: int8 [outputs, inputs] within −7 and 7; scale: float32 [outputs, groups].

    Example:
        >>> q, scale = int4(torch.tensor([[7.0, -3.0, 0.7, 0.1]]), 2)
        >>> q.tolist(), [round(s, 2) for s in scale[0].tolist()]
        ([[7, -3, 7, 1]], [1.0, 0.1])

    Source: Frantar et al. 2022, arXiv:2210.17323, section 4 (groups, as round-to-nearest has them too).
    """
    rows, columns = weight.shape
    size = group if columns % group == 0 else columns
    blocks = weight.detach().float().reshape(rows, columns // size, size)
    peak = blocks.abs().amax(2, keepdim=True)
    scales = torch.stack([torch.where(peak > 0, peak * share / TOP, 1.0) for share in SHARES])
    rounded = (blocks / scales).round().clamp(-TOP, TOP)
    best = (rounded * scales - blocks).square().sum(3, keepdim=True).argmin(0, keepdim=True)
    scale, q = scales.gather(0, best)[0], rounded.gather(0, best.expand(1, *blocks.shape))[0]
    return q.to(torch.int8).reshape(rows, columns), scale[:, :, 0]


def pack(q: Tensor, shift: int = 8) -> Tensor:
    """Integers [outputs, inputs] of −8 to 7 as bytes [outputs, ⌈inputs / 2⌉], the first of two in the low bits.

    Args:
        q: int8.
        shift: is added first: 8 stores −8 as 0, 16 stores two's complement.

    Example:
        >>> pack(torch.tensor([[-8, 7, 0]])).tolist()
        [[240, 8]]
    """
    shifted = torch.nn.functional.pad((q + shift).to(torch.uint8) & 15, (0, q.shape[1] % 2))
    return shifted[:, ::2] | (shifted[:, 1::2] << 4)


def store(proto: Any, quant: QuantSpec, keep: list[str]) -> None:
    """Put 4-bit weights with a DequantizeLinear behind them where a product has a constant matrix on its right.

    Args:
        proto: `onnx.ModelProto`, changed in place; its opset becomes 21 where it was older.
        quant: gives the group.
        keep: names of nodes whose weights stay.
    """
    from onnx import TensorProto, helper, numpy_helper

    for tensor in list(proto.graph.initializer):
        axis = _inputs_axis(proto, tensor, keep)
        if axis is None or tensor.data_type != TensorProto.FLOAT or int(np.prod(tensor.dims)) < 256:
            continue
        values = torch.from_numpy(numpy_helper.to_array(tensor).copy())
        q, scale = int4(values if axis == 1 else values.T.contiguous(), quant.group)
        block = values.shape[axis] // scale.shape[1]
        q, scale = (q, scale) if axis == 1 else (q.T, scale.T)
        name, raw = tensor.name, pack(q.reshape(1, -1), 16).numpy().tobytes()  # two's complement
        proto.graph.initializer.remove(tensor)
        proto.graph.initializer.append(helper.make_tensor(f"{name}.q", TensorProto.INT4, values.shape, raw, raw=True))
        proto.graph.initializer.append(numpy_helper.from_array(scale.contiguous().numpy(), f"{name}.scale"))
        node = helper.make_node("DequantizeLinear", [f"{name}.q", f"{name}.scale"], [name], axis=axis, block_size=block)
        proto.graph.node.insert(0, node)
    for item in proto.opset_import:
        if item.domain in ("", "ai.onnx"):
            item.version = max(item.version, OPSET)


def _inputs_axis(proto: Any, tensor: Any, keep: list[str]) -> int | None:
    """Which axis of a matrix is the inputs of the linear layers that alone use it; None where there is none."""
    users = [(node, list(node.input).index(tensor.name)) for node in proto.graph.node if tensor.name in node.input]
    if len(tensor.dims) != 2 or not users or any(node.name in keep or place != 1 for node, place in users):
        return None
    axes = {_axis(node) for node, _ in users}
    return axes.pop() if len(axes) == 1 else None


def _axis(node: Any) -> int | None:
    if node.op_type == "MatMul":
        return 0
    if node.op_type == "Gemm":
        return 1 if next((a.i for a in node.attribute if a.name == "transB"), 0) else 0
    return None
