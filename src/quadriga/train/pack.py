"""Nested state as plain JSON with its tensors set apart: exact, and without pickle."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from quadriga.core.spread import local

MARK = "$"  # a table with this key stands for something that JSON has not


def pack(value: Any, tensors: dict[str, Tensor], path: str) -> Any:
    """Write `value` as JSON data; tensors go to `tensors` under names that start with `path`.

    Raises:
        TypeError: something that is neither a tensor, a number, a text, None nor a dict, list or tuple of such.

    Example:
        >>> kept = {}
        >>> unpack(pack({"beta": (0.5, float("inf"))}, kept, "x"), kept)
        {'beta': (0.5, inf)}
    """
    if isinstance(value, Tensor):
        tensors[path] = local(value.detach()).cpu().contiguous().clone()
        return {MARK: "tensor", "name": path}
    if isinstance(value, float) and not math.isfinite(value):
        return {MARK: "float", "value": repr(value)}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, tuple):
        return {MARK: "tuple", "items": [pack(v, tensors, f"{path}/{i}") for i, v in enumerate(value)]}
    if isinstance(value, list):
        return [pack(v, tensors, f"{path}/{i}") for i, v in enumerate(value)]
    if isinstance(value, Mapping):
        if MARK not in value and all(isinstance(k, str) for k in value):
            return {k: pack(v, tensors, f"{path}/{k}") for k, v in value.items()}
        items = [[pack(k, tensors, f"{path}/key"), pack(v, tensors, f"{path}/{k}")] for k, v in value.items()]
        return {MARK: "dict", "items": items}
    raise TypeError(f"{path} is a {type(value).__name__}, which a checkpoint cannot hold")


def unpack(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Read back what `pack` wrote."""
    if isinstance(value, list):
        return [unpack(v, tensors) for v in value]
    if not isinstance(value, dict):
        return value
    match value.get(MARK):
        case None:
            return {k: unpack(v, tensors) for k, v in value.items()}
        case "tensor":
            return tensors[value["name"]]
        case "float":
            return float(value["value"])
        case "tuple":
            return tuple(unpack(v, tensors) for v in value["items"])
        case _:
            return {unpack(k, tensors): unpack(v, tensors) for k, v in value["items"]}


def like(value: Tensor, parameter: Tensor) -> Tensor:
    """A copy of a state tensor with the parameter's device, and with its memory format where the shapes agree."""
    if value.shape != parameter.shape:
        return value.to(parameter.device, copy=True)
    return torch.empty_like(parameter, dtype=value.dtype, requires_grad=False).copy_(value)
