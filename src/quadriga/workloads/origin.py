"""Where the examples of a split come from: data sets behind `Subset`, `ConcatDataset` and wrappers, and places in them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset, Subset, TensorDataset

from quadriga.core.batch import tensors
from quadriga.core.data import Data, DatasetData, Part, TensorData, split_item

Array = np.ndarray[Any, Any]
TRANSFORMS = ("transform", "transforms", "target_transform")  # as torchvision names them, and most who follow it
LISTS = ("samples", "imgs")  # of torchvision's folders: (path, class)
LABELS = ("targets", "labels")
BLOCK = 1 << 22  # bytes hashed in one go


@dataclass(frozen=True)
class Origin:
    """Of each example of a split, the data set it is read from, and its number there.

    Args:
        bases: the data sets; or the split itself, where it is none of a known form.
        which: [n] int64, places in `bases`.
        rows: [n] int64.
    """

    bases: tuple[Any, ...]
    which: Array
    rows: Array

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, places: Array) -> Origin:
        """Of some of the examples."""
        return Origin(self.bases, self.which[places], self.rows[places])


def origin(data: Data) -> Origin:
    """Follow a split to what it is read from."""
    if isinstance(data, Part):
        return origin(data.source).take(data.index.numpy())
    if type(data) is DatasetData:
        return _behind(data.dataset, np.arange(len(data)))
    return Origin((data,), np.zeros(len(data), np.int64), np.arange(len(data)))


def _behind(dataset: Any, rows: Array) -> Origin:
    if isinstance(dataset, Subset):
        return _behind(dataset.dataset, np.asarray([int(i) for i in dataset.indices], np.int64)[rows])
    if isinstance(dataset, ConcatDataset):
        return _joined(dataset, rows)
    if (inner := _wrapped(dataset)) is not None:
        return _behind(inner, rows)
    return Origin((dataset,), np.zeros(len(rows), np.int64), rows % max(len(dataset), 1))


def _joined(dataset: ConcatDataset[Any], rows: Array) -> Origin:
    ends = np.asarray(dataset.cumulative_sizes)
    part = np.searchsorted(ends, rows, "right")
    bases: list[Any] = []
    which, places = np.zeros_like(rows), np.zeros_like(rows)
    for number, inner in enumerate(dataset.datasets):
        here = part == number
        found = _behind(inner, rows[here] - (ends[number - 1] if number else 0))
        for base in found.bases:
            bases += [] if any(b is base for b in bases) else [base]
        moved = np.asarray([next(i for i, b in enumerate(bases) if b is base) for base in found.bases])
        which[here], places[here] = moved[found.which], found.rows
    return Origin(tuple(bases), which, places)


def _wrapped(dataset: Any) -> Any:
    """The one data set of equal length that a wrapper, such as one that adds a transform, holds."""
    if isinstance(dataset, TensorDataset):
        return None
    held = [v for v in getattr(dataset, "__dict__", {}).values() if isinstance(v, Dataset) and hasattr(v, "__len__")]
    return held[0] if len(held) == 1 and len(held[0]) == len(dataset) else None  # type: ignore[arg-type]


def table(base: Any, *, targets: bool = False) -> list[Any] | None:
    """What holds the rows of a data set before any transform: tensors, arrays or a list of paths; None where none is known.

    Args:
        base: of an `Origin`.
        targets: with the targets, where they stand beside.
    """
    if isinstance(base, TensorData):
        found = tensors(base.inputs) + (tensors(base.target) if targets else [])
        return found if len(found[0]) == len(base) else None
    if type(base) is TensorDataset:
        return list(base.tensors if targets or len(base.tensors) == 1 else base.tensors[:-1])
    held = getattr(base, "__dict__", {})
    beside = [np.asarray(held[name]) for name in LABELS if targets and len(held.get(name, ())) == len(base)]
    if isinstance(rows := held.get("data"), Tensor | np.ndarray) and np.ndim(rows) and len(rows) == len(base):
        return [rows, *(b for b in beside if b.ndim)]
    for name in LISTS:
        if isinstance(rows := held.get(name), list) and len(rows) == len(base):
            return [_from_root(rows, str(held.get("root", "")), targets)]
    return None


def form(parts: Sequence[Any]) -> tuple[str, ...]:
    """What a table holds, since only like can be compared with like."""
    return tuple("path" if isinstance(p, list) else f"{p.dtype} {tuple(p.shape[1:])}".removeprefix("torch.") for p in parts)


def _from_root(rows: list[Any], root: str, targets: bool) -> list[str]:
    """Entries as text, without the folder they are in, which may be another one on another machine."""
    pairs = [(str(r[0]), *map(str, r[1:])) if isinstance(r, tuple | list) else (str(r),) for r in rows]
    return [" ".join([path.removeprefix(root), *(others if targets else ())]) for path, *others in pairs]


def numbers(part: Any) -> Array:
    """A tensor or array as an array of bytes [n, bytes of a row]."""
    if isinstance(part, Tensor):
        part = dense(part.detach().cpu())
        if not part.numel():
            return np.zeros((len(part) if part.dim() else 1, 0), np.uint8)
        flat = part.contiguous().reshape(len(part) if part.dim() else 1, -1)
        return flat.view(torch.uint8).numpy()
    if part.dtype == object:
        part = np.asarray([repr(row) for row in part]) if part.ndim else np.asarray(repr(part))
    part = np.ascontiguousarray(part)
    return np.frombuffer(part.tobytes(), np.uint8).reshape(len(part) if part.ndim else 1, -1)


def dense(t: Tensor) -> Tensor:
    """The numbers of a tensor of any layout, as they are stored."""
    if t.is_quantized:
        return t.int_repr()
    if t.layout is not torch.strided:
        return t.to_dense()
    return torch.view_as_real(t.resolve_conj()) if t.is_complex() else t.resolve_neg()


def digests(parts: Sequence[Any], rows: Array | None = None) -> list[bytes]:
    """One digest for each row, over all parts of it.

    Example:
        >>> one, two, three = digests([torch.tensor([1.0, 2.0, 1.0])])
        >>> one == three != two
        True
    """
    if isinstance(parts[0], list):
        chosen = parts[0] if rows is None else [parts[0][i] for i in rows]
        return [_short(text.encode()) for text in chosen]
    found: list[bytes] = []
    for some in _blocks(parts, len(parts[0]) if rows is None else rows):
        joined = np.concatenate(some, 1) if len(some) > 1 else some[0]
        found += [_short(row) for row in np.ascontiguousarray(joined)]
    return found


def _blocks(parts: Sequence[Any], rows: Array | int) -> Iterator[list[Array]]:
    """The parts' bytes, a few rows at a time, so that no second copy of them all is made."""
    count = rows if isinstance(rows, int) else len(rows)
    width = max(1, sum(numbers(part[:1]).size for part in parts))
    size = max(1, BLOCK // width)
    for start in range(0, count, size):
        here: Any = slice(start, start + size) if isinstance(rows, int) else rows[start : start + size]
        yield [
            numbers(part[torch.as_tensor(here)] if isinstance(part, Tensor) and not isinstance(here, slice) else part[here])
            for part in parts
        ]


def _short(data: Any) -> bytes:
    return hashlib.sha256(data).digest()[:16]


def digest(tree: Any) -> bytes:
    """Of whatever an item is made of: tensors, arrays, pictures, text, numbers."""
    found = hashlib.sha256()
    _feed(tree, found.update)
    return found.digest()[:16]


def _feed(tree: Any, update: Callable[[Any], None]) -> None:
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            update(str(key).encode())
            _feed(value, update)
    elif isinstance(tree, tuple | list):
        for value in tree:
            _feed(value, update)
    elif isinstance(tree, Tensor) or hasattr(tree, "__array_interface__"):  # an array, or a picture of PIL
        update(numbers(tree if isinstance(tree, Tensor) else np.asarray(tree)))
    else:
        update(tree if isinstance(tree, bytes) else str(tree).encode())


def bare(base: Any) -> Any:
    """A shallow copy of a data set that transforms nothing; the data set itself, where it has no transform of a known name."""
    held = [name for name in TRANSFORMS if getattr(base, "__dict__", {}).get(name) is not None]
    if not held:
        return base
    other = copy(base)
    for name in held:
        setattr(other, name, None)
    return other


def inputs_of(item: Any) -> Any:
    """An item's inputs, without its target."""
    try:
        return split_item(item)[0]
    except Exception:
        return item
