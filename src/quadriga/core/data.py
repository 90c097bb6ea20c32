"""Data splits: anything with a length that returns a batch for given indices."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, default_collate

from quadriga.core import loaders, rng
from quadriga.core.batch import Batch, Tree, copied, tensors, tree_map
from quadriga.core.errors import BadInput


class Data(ABC):
    """One split. Whatever reads it, to train, score, calibrate, time or export, goes by its `batch`.

    What `batch` gives is the reader's own: nothing that a model, loss or metric writes into it reaches the split. A class that
    makes fresh tensors says so, as in `class Mine(Data, fresh=True)`; those of others are copied.

    Attributes:
        resident: slicing costs nothing, so no loader is needed.
        notes: what of the user's loader is not kept, for people.
    """

    resident: bool = True
    notes: tuple[str, ...] = ()

    def __init_subclass__(cls, *, fresh: bool = False, **options: Any) -> None:
        super().__init_subclass__(**options)
        for name in ("batches", "fixed"):
            if name in vars(cls):
                raise BadInput(
                    f"{cls.__name__} has {name}() of its own, which training does not read", "override batch() instead"
                )
        if "batch" in vars(cls) and not fresh and not getattr(cls.batch, "__isabstractmethod__", False):
            setattr(cls, "batch", _copying(cls.batch))  # noqa: B010 (mypy takes a method for fixed)

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def batch(self, index: Tensor) -> Batch:
        """The examples at `index` [n] int64."""

    @property
    def plain(self) -> bool:
        """Whether batches are rows of tensors, `inputs` and `target`, as they are."""
        return False

    def fixed(self, index: Tensor) -> Batch:
        """As `batch`; what examples draw at random depends on the first one's place alone, and is the same in every process."""
        if self.plain:
            return self.batch(index)
        with rng.isolated():
            rng.seed_all(rng.derive("fixed", int(index[0])))
            return self.batch(index)

    def batches(self, size: int) -> Iterator[Batch]:
        """All examples in order, `size` at a time, as `fixed`; the last may be smaller."""
        for start in range(0, len(self), size):
            yield self.fixed(torch.arange(start, min(start + size, len(self))))

    def part(self, index: Tensor) -> Data:
        """The examples at `index` as a split of their own."""
        return Part(self, index)


def _copying(batch: Callable[[Any, Tensor], Batch]) -> Callable[[Any, Tensor], Batch]:
    @functools.wraps(batch)
    def fresh(self: Any, index: Tensor) -> Batch:
        return copied(batch(self, index))

    return fresh


class Part(Data, fresh=True):
    """Some examples of another split, read as that one reads them.

    Args:
        source: the split.
        index: [n] int64, the places in it.

    Example:
        >>> Part(TensorData(torch.arange(5.0)), torch.tensor([4, 2])).batch(torch.tensor([1])).inputs
        tensor([2.])
    """

    def __init__(self, source: Data, index: Tensor) -> None:
        self.source, self.index, self.resident = source, index.cpu().clone(), source.resident
        self.workers, self.timeout = getattr(source, "workers", 0), getattr(source, "timeout", 300.0)

    def __len__(self) -> int:
        return len(self.index)

    def batch(self, index: Tensor) -> Batch:
        return replace(self.source.batch(self.index[index.cpu()]), index=index)


class TensorData(Data, fresh=True):
    """Examples held in memory as tensors.

    Args:
        inputs: a tensor, tuple or dict of tensors, examples along dimension 0.
        target: a tensor (or tree) with as many examples, or None.

    Raises:
        BadInput: lengths differ, or there is no tensor.
    """

    def __init__(self, inputs: Tree, target: Tree = None) -> None:
        leaves = tensors(inputs) + tensors(target)
        if not tensors(inputs):
            raise BadInput(f"the inputs are {type(inputs).__name__} without a tensor", "give tensors")
        lengths = {len(t) for t in leaves if t.dim()}
        if len(lengths) != 1 or any(t.dim() == 0 for t in leaves):
            raise BadInput(f"inputs and targets have different lengths {sorted(lengths)}", "one row per example in each")
        self.inputs, self.target, self.length = inputs, target, lengths.pop()

    def __len__(self) -> int:
        return self.length

    @property
    def plain(self) -> bool:
        """Whether no subclass has a way of its own to make a batch, or another length."""
        mine = type(self)
        return mine.batch is TensorData.batch and mine.__len__ is TensorData.__len__

    def batch(self, index: Tensor) -> Batch:
        if isinstance(self.inputs, Tensor) and isinstance(self.target, Tensor):  # the usual case, in each step
            return Batch(self.inputs[index], self.target[index], index)
        return Batch(tree_map(lambda t: t[index], self.inputs), tree_map(lambda t: t[index], self.target), index)

    def part(self, index: Tensor) -> Data:
        """The examples at `index` as a split of their own, in memory where it is the rows that `batch` gives."""
        if type(self) is not TensorData:
            return super().part(index)
        batch = self.batch(index)
        return TensorData(batch.inputs, batch.target)


class DatasetData(Data, fresh=True):
    """A map-style `Dataset`, read example by example and collated; `separate` splits a collated item.

    Args:
        dataset: with `__len__` and `__getitem__`.
        collate: joins a list of items.
        separate: collated item → (inputs, target); by default a pair, or a dict with "labels" or "label".
        workers: processes that read training examples ahead; 0: the loop reads them itself.
        timeout: seconds that a batch may take a worker.
        begin: called with its number in each of these processes, as a loader's `worker_init_fn`.
        method: how these processes are started; by default the safest that works.
        batch_size: of the user's loader, for a note where training has another.
        notes: what of a loader is not kept.
    """

    resident = False

    def __init__(
        self, dataset: Dataset[Any], collate: Callable[[list[Any]], Any] = default_collate,
        separate: Callable[[Any], tuple[Tree, Tree]] | None = None, workers: int = 0, timeout: float = 300.0,
        begin: Callable[[int], None] | None = None, method: str | None = None, batch_size: int | None = None,
        notes: Sequence[str] = (),
    ) -> None:  # fmt: skip
        self.dataset, self.collate, self.separate = dataset, collate, separate or split_item
        self.workers, self.timeout, self.begin, self.method = workers, timeout, begin, method
        self.batch_size, self.notes = batch_size, tuple(notes)

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def batch(self, index: Tensor) -> Batch:
        inputs, target = self.separate(self.collate([self._item(i) for i in index.tolist()]))
        batch = Batch(inputs, target, index)
        stacks = self.collate is default_collate and self.separate is split_item
        return batch if stacks else copied(batch)  # a collate of the user's may hand out what the data set keeps

    def _item(self, i: int) -> Any:
        try:
            return self.dataset[i]
        except Exception as error:
            error.add_note(f"example {i} of the data set")
            raise


def split_item(item: Any) -> tuple[Tree, Tree]:
    """Separate a collated item: `(inputs, target)`, or a dict with "labels" or "label".

    Raises:
        BadInput: neither form.
    """
    if isinstance(item, Mapping):
        for key in ("labels", "label", "target"):
            if key in item:
                return {k: v for k, v in item.items() if k != key}, item[key]
        raise BadInput(f'a batch has the keys {sorted(map(str, item))}, none of them "labels"', "name the targets so")
    if isinstance(item, Sequence) and len(item) == 2:
        inputs = item[0]
        return (dict(inputs) if isinstance(inputs, Mapping) else inputs), item[1]
    if isinstance(item, Sequence) and len(item) > 2:
        return tuple(item[:-1]), item[-1]
    raise BadInput(f"a batch is a {type(item).__name__}", "give (inputs, target) pairs or dicts with labels")


def as_data(source: Any, name: str = "data") -> Data:
    """Make a split of what a user has: a `Data`, tensors `(inputs, target)`, a `DataLoader` or a `Dataset`.

    Of a loader, `loaders.settings` says what is kept; order and batch size are the loop's, so that runs can be resumed.

    Raises:
        BadInput: empty, without a length, of another type, or a loader whose examples are not a fixed set.
    """
    if isinstance(source, Data):
        data = source
    elif isinstance(source, DataLoader | Dataset):
        dataset = source.dataset if isinstance(source, DataLoader) else source
        if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
            raise BadInput(f"{name} is an iterable data set without a length", "give a map-style data set or tensors")
        data = DatasetData(**loaders.settings(source, name)) if isinstance(source, DataLoader) else DatasetData(dataset)
    elif isinstance(source, tuple | list) and len(source) == 2:
        data = TensorData(source[0], source[1])
    elif isinstance(source, Mapping):
        data = TensorData(*split_item(source))
    else:
        raise BadInput(f"{name} is a {type(source).__name__}", "give (inputs, target) tensors, a DataLoader or a Dataset")
    if len(data) == 0:
        raise BadInput(f"{name} has 0 examples", "every split needs examples")
    return data
