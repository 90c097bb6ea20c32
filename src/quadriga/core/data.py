"""Data splits: anything with a length that returns a batch for given indices."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, default_collate

from quadriga.core.batch import Batch, Tree, tensors, tree_map
from quadriga.core.errors import BadInput


class Data(ABC):
    """One split. `resident` says that slicing costs nothing, so no loader is needed."""

    resident: bool = True

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def batch(self, index: Tensor) -> Batch:
        """The examples at `index` [n] int64."""

    def batches(self, size: int) -> Iterator[Batch]:
        """All examples in order, `size` at a time; the last may be smaller."""
        for start in range(0, len(self), size):
            yield self.batch(torch.arange(start, min(start + size, len(self))))


class TensorData(Data):
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

    def batch(self, index: Tensor) -> Batch:
        return self._rows(index, index)

    def batches(self, size: int) -> Iterator[Batch]:
        """All examples in order, `size` at a time, as views; the last may be smaller."""
        for start in range(0, len(self), size):
            yield self._rows(slice(start, start + size), torch.arange(start, min(start + size, len(self))))

    def _rows(self, rows: Any, index: Tensor) -> Batch:
        if isinstance(self.inputs, Tensor) and isinstance(self.target, Tensor):  # the usual case, in each step
            return Batch(self.inputs[rows], self.target[rows], index)
        return Batch(tree_map(lambda t: t[rows], self.inputs), tree_map(lambda t: t[rows], self.target), index)

    def part(self, index: Tensor) -> TensorData:
        """The examples at `index` as a split of their own."""
        batch = self.batch(index)
        return TensorData(batch.inputs, batch.target)


class DatasetData(Data):
    """A map-style `Dataset`, read example by example and collated; `separate` splits a collated item.

    Args:
        dataset: with `__len__` and `__getitem__`.
        collate: joins a list of items.
        separate: collated item → (inputs, target); by default a pair, or a dict with "labels" or "label".
        workers: processes that read training examples ahead; 0: the loop reads them itself.
        timeout: seconds that a batch may take a worker.
    """

    resident = False

    def __init__(
        self,
        dataset: Dataset[Any],
        collate: Callable[[list[Any]], Any] = default_collate,
        separate: Callable[[Any], tuple[Tree, Tree]] | None = None,
        workers: int = 0,
        timeout: float = 300.0,
    ) -> None:
        self.dataset, self.collate, self.separate = dataset, collate, separate or split_item
        self.workers, self.timeout = workers, timeout

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def batch(self, index: Tensor) -> Batch:
        inputs, target = self.separate(self.collate([self._item(i) for i in index.tolist()]))
        return Batch(inputs, target, index)

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

    A loader keeps its collate function, its workers and their timeout; order, batch size and the seeds of workers are the
    loop's, so that runs can be resumed.

    Raises:
        BadInput: empty, without a length, or of another type.
    """
    if isinstance(source, Data):
        data = source
    elif isinstance(source, DataLoader | Dataset):
        dataset = source.dataset if isinstance(source, DataLoader) else source
        if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
            raise BadInput(f"{name} is an iterable data set without a length", "give a map-style data set or tensors")
        data = DatasetData(dataset)
        if isinstance(source, DataLoader):
            data = DatasetData(dataset, source.collate_fn, workers=source.num_workers, timeout=source.timeout or 300.0)
    elif isinstance(source, tuple | list) and len(source) == 2:
        data = TensorData(source[0], source[1])
    elif isinstance(source, Mapping):
        data = TensorData(*split_item(source))
    else:
        raise BadInput(f"{name} is a {type(source).__name__}", "give (inputs, target) tensors, a DataLoader or a Dataset")
    if len(data) == 0:
        raise BadInput(f"{name} has 0 examples", "every split needs examples")
    return data
