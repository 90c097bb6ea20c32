"""Where the weights of a model file are: the bytes that are worth a coder of their own."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

LEAST = 64  # bytes; what is smaller stays where it is, and is compressed with its neighbours
WIDTHS = {"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2}


@dataclass(frozen=True)
class Cut:
    """A tensor's bytes in a file.

    Args:
        file: its name.
        start: place of the first byte.
        width: bytes of an element.
        data: the bytes.
    """

    file: str
    start: int
    width: int
    data: bytes


def cuts_of(name: str, data: bytes) -> list[Cut]:
    """The tensors of a model file in order, without overlaps; none in a file of another kind.

    Args:
        name: of the file; its ending says the kind, .onnx or .safetensors.
        data: its content.
    """
    found = list(_onnx(data) if name.endswith(".onnx") else _safetensors(data) if name.endswith(".safetensors") else ())
    return [Cut(name, start, width, data[start : start + size]) for start, size, width in sorted(found) if size >= LEAST]


def _safetensors(data: bytes) -> Iterator[tuple[int, int, int]]:
    size = int.from_bytes(data[:8], "little")
    for name, row in json.loads(data[8 : 8 + size]).items():
        if name != "__metadata__":
            start, end = row["data_offsets"]
            yield 8 + size + start, end - start, WIDTHS.get(row["dtype"], 1)


def _onnx(data: bytes) -> Iterator[tuple[int, int, int]]:
    """Bytes are looked for from where the last were found: a file holds its tensors in order. A find elsewhere is as good."""
    import onnx

    place = 0
    for tensor in _tensors(onnx.load_model_from_string(data).graph):
        raw = tensor.raw_data
        start = data.find(raw, place) if len(raw) >= LEAST else -1
        if start >= 0:
            place = start + len(raw)
            yield start, len(raw), _width(tensor)


def _tensors(graph: Any) -> Iterator[Any]:
    """Tensors in the order of a serialized graph: nodes with their attributes, then initializers."""
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            if attribute.HasField("g"):
                yield from _tensors(attribute.g)
    yield from graph.initializer


def _width(tensor: Any) -> int:
    elements = 1
    for size in tensor.dims:
        elements *= size
    width = len(tensor.raw_data) // max(1, elements)
    return width if width in (1, 2, 4, 8) and width * elements == len(tensor.raw_data) else 1
