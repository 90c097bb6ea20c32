"""What a split must be before anything is learned from it: readable and finite."""

from __future__ import annotations

import torch
from torch import Tensor

from quadriga.core.batch import Batch, Tree, tensors
from quadriga.core.data import Data, TensorData
from quadriga.core.errors import BadInput
from quadriga.workloads.place import told

SAMPLED = 256  # examples looked at where a split is not in memory
SCANNED = 2**28  # bytes of examples looked at where they are made when they are read


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
    """Examples as training sees them: all, where they are rows of tensors or fit into a few bytes, else evenly spaced ones."""
    if isinstance(data, TensorData) and data.plain:
        return Batch(data.inputs, data.target, torch.arange(len(data)))
    first = take(name, data, torch.arange(min(2, len(data))))
    row = sum(t.numel() * t.element_size() for t in tensors(first.inputs)) // len(first)
    count = min(len(data), max(SAMPLED, SCANNED // max(row, 1)) if data.resident else SAMPLED)
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


def _kind(tree: Tree) -> str:
    inner = f" of {type(tree[0]).__name__}" if isinstance(tree, tuple | list) and len(tree) else ""
    return type(tree).__name__ + inner
