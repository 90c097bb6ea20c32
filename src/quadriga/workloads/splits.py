"""What a split must be before anything is learned from it: readable, finite, and apart from the others."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Subset

from quadriga.core.batch import Batch, Tree, tensors
from quadriga.core.data import Data, DatasetData, TensorData
from quadriga.core.errors import BadInput
from quadriga.workloads.place import told

SAMPLED = 256  # examples looked at where a split is not in memory
OVERLAP = 0.01  # of the smaller split; more would colour the verdict
HASHED = 2**31  # bytes of a split that are hashed, about two seconds


def take(name: str, data: Data, index: Tensor) -> Batch:
    """Read examples and check the form of what comes.

    Raises:
        BadInput: reading failed, or the rows of inputs and targets are not as many as asked for.
    """
    try:
        batch = data.batch(index)
    except BadInput as error:
        raise BadInput(f"{name}: {error.problem}", error.remedy) from error
    except Exception as error:
        raise BadInput(f"{name} cannot be read: {told(error)}", "correct the data set") from error
    if not isinstance(batch, Batch):
        raise BadInput(f"{name} gave a {type(batch).__name__}", "batch() has to return a quadriga Batch")
    if not tensors(batch.inputs):
        raise BadInput(
            f"a batch of {name} has inputs of type {_kind(batch.inputs)} without a tensor", "let collate make tensors"
        )
    for what, tree in (("inputs", batch.inputs), ("targets", batch.target)):
        for t in tensors(tree):
            if t.dim() == 0 or len(t) != len(index):
                shape = list(t.shape)
                raise BadInput(f"a batch of {len(index)} examples of {name} has {what} of shape {shape}", "one row per example")
    return batch


def sample(name: str, data: Data) -> Batch:
    """All of a split that is in memory, else evenly spaced examples."""
    if isinstance(data, TensorData):
        return Batch(data.inputs, data.target, torch.arange(len(data)))
    count = min(len(data), SAMPLED)
    return take(name, data, torch.arange(count) * len(data) // count)


def finite(name: str, batch: Batch) -> None:
    """Refuse NaN and infinities.

    Raises:
        BadInput: with their number and the first example.
    """
    for what, tree in (("inputs", batch.inputs), ("targets", batch.target)):
        for t in tensors(tree):
            if not t.is_floating_point() or bool(torch.isfinite(t.sum())):
                continue
            bad = (~torch.isfinite(t)).flatten(1).any(1) if t.dim() > 1 else ~torch.isfinite(t)
            if count := int(bad.sum()):
                first = int(batch.index[bad.nonzero()[0, 0]])
                kind = "NaN" if bool(torch.isnan(t).any()) else "infinite values"
                remedy = "replace or remove them"
                raise BadInput(
                    f"the {what} of {name} hold {kind} in {count} of {len(t)} examples, first in number {first}", remedy
                )


def apart(splits: dict[str, Data]) -> list[str]:
    """Check that no two splits share examples; returns notes.

    Raises:
        BadInput: two splits are the same data, or more than 1 % of the smaller one is in the other.
    """
    notes, hashes = [], {name: _hashes(name, data) for name, data in splits.items()}
    for (one, a), (two, b) in combinations(splits.items(), 2):
        if a is b or _same_storage(a, b):
            raise BadInput(f"{one} and {two} are the same data", "give examples that the other split does not hold")
        shared, size = _shared(a, b, hashes[one], hashes[two])
        if shared == size:
            raise BadInput(f"{one} and {two} hold the same examples", "give examples that the other split does not hold")
        text = f"{shared} of {size} examples ({shared / size:.1%}) are in both {one} and {two}"
        if shared > OVERLAP * size:
            raise BadInput(text, "remove them from one of the two; at most 1 % is tolerated")
        if shared:
            notes.append(text)
    if any(not isinstance(data, TensorData) for data in splits.values()):
        notes.append(f"splits that are not in memory were compared by their first {SAMPLED} examples only")
    return notes


def _shared(a: Data, b: Data, a_hashes: list[int], b_hashes: list[int]) -> tuple[int, int]:
    """How many examples of the smaller split are in the other, and its size."""
    (a_base, a_rows), (b_base, b_rows) = _origin(a), _origin(b)
    if a_base is not None and a_base is b_base:
        small, large = sorted((a_rows, b_rows), key=len)
        return len(set(small) & set(large)), len(small)
    small_hashes, large_hashes = sorted((a_hashes, b_hashes), key=len)
    known = set(large_hashes)
    return sum(h in known for h in small_hashes), len(small_hashes)


def _origin(data: Data) -> tuple[Any, Sequence[int]]:
    """The data set that a split reads from and the rows that it reads, through any `Subset`."""
    if not isinstance(data, DatasetData):
        return None, ()
    dataset: Any = data.dataset
    rows: Any = range(len(data))
    while isinstance(dataset, Subset):
        rows = [int(dataset.indices[i]) for i in rows]
        dataset = dataset.dataset
    return dataset, rows


def _same_storage(a: Data, b: Data) -> bool:
    if not isinstance(a, TensorData) or not isinstance(b, TensorData):
        return False
    keys = [[(t.data_ptr(), t.shape, t.stride()) for t in tensors(d.inputs)] for d in (a, b)]
    return keys[0] == keys[1]


def _hashes(name: str, data: Data) -> list[int]:
    """One hash of the inputs per example."""
    inputs = data.inputs if isinstance(data, TensorData) else take(name, data, torch.arange(min(len(data), SAMPLED))).inputs
    found = [t.detach().cpu() for t in tensors(inputs)]
    row_bytes = sum(t[:1].numel() * t.element_size() for t in found)
    rows = min(len(found[0]), HASHED // max(row_bytes, 1))
    arrays = [t[:rows].contiguous().view(torch.uint8 if t.dtype == torch.bfloat16 else t.dtype).numpy() for t in found]
    if len(arrays) == 1:
        return [hash(row.tobytes()) for row in arrays[0]]
    return [hash(tuple(row.tobytes() for row in parts)) for parts in zip(*arrays, strict=True)]


def _kind(tree: Tree) -> str:
    inner = f" of {type(tree[0]).__name__}" if isinstance(tree, tuple | list) and len(tree) else ""
    return type(tree).__name__ + inner
