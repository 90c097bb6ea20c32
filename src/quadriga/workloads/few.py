"""The first examples of a data set's splits, for a try that has to be short."""

from __future__ import annotations

from dataclasses import replace

import torch

from quadriga.core.data import TensorData
from quadriga.core.errors import BadInput
from quadriga.workloads.fashion import Splits


def few(data: Splits, examples: int | None = None, held_out: int | None = None) -> Splits:
    """The same splits with the first `examples` of train and the first `held_out` of val and of test; all where it is None.

    Raises:
        BadInput: a number is not positive.

    Example:
        >>> from quadriga.workloads import shakespeare
        >>> few(shakespeare(context=64), 100, 50).note["examples"]
        {'train': 100, 'val': 50, 'test': 50}
    """
    train = _first(data.train, examples, "examples")
    val, test = _first(data.val, held_out, "held_out"), _first(data.test, held_out, "held_out")
    counts = {"train": len(train), "val": len(val), "test": len(test)}
    return replace(data, train=train, val=val, test=test, note={**data.note, "examples": counts})


def checked(count: int | None, name: str) -> int | None:
    """A number of examples that an option asks for, or None for all.

    Raises:
        BadInput: it is not positive.
    """
    if count is not None and (isinstance(count, bool) or not isinstance(count, int) or count < 1):
        raise BadInput(f"{name} is {count!r}", "give a positive integer")
    return count


def _first(split: TensorData, count: int | None, name: str) -> TensorData:
    wanted = checked(count, name)
    if wanted is None or wanted >= len(split):
        return split
    batch = split.batch(torch.arange(wanted))
    return TensorData(batch.inputs, batch.target)
