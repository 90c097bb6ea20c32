"""What of a `DataLoader` is kept when its examples become a split, and what cannot be."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Generator, Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    RandomSampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from quadriga.core import rng
from quadriga.core.errors import BadInput

TIMEOUT = 300.0  # seconds that a batch may take where the loader sets none
ORDERED = (SequentialSampler, RandomSampler, SubsetRandomSampler)  # of other samplers it is said that their order is not kept
Loader = DataLoader[Any]


def settings(loader: Loader, name: str) -> dict[str, Any]:
    """The arguments of `DatasetData` for a loader.

    ========================  =============================================================================================
    collate_fn, num_workers,  kept
    timeout,
    multiprocessing_context
    worker_init_fn            kept: called in each process that reads training examples ahead; `get_worker_info()` works there
    sampler, batch_sampler    the set of their examples is kept; their order is the loop's. A sampler that repeats examples, or
                              gives others each time, is refused; so are weighted and distributed ones
    RandomSampler             with replacement or of another number: all examples, each once an epoch, with a note
    drop_last                 training has full batches always; scoring reads all examples, with a note
    batch_size                the workload's, with a note where they differ
    generator                 not needed: order and seeds follow from the study's seed
    pin_memory                done wherever batches go to a GPU
    prefetch_factor,          the loop's own; they change no value
    persistent_workers
    ========================  =============================================================================================

    Raises:
        BadInput: the loader's examples are not a fixed set, each once; or its data set gives whole batches.
    """
    if loader.batch_sampler is None:
        problem = f"{name} is a DataLoader with batch_size=None, whose data set gives whole batches"
        raise BadInput(problem, "give a data set of single examples and a batch_size")
    dataset, notes = chosen(loader, name)
    context = loader.multiprocessing_context
    return {
        "dataset": dataset,
        "collate": loader.collate_fn,
        "workers": loader.num_workers,
        "timeout": loader.timeout or TIMEOUT,
        "begin": loader.worker_init_fn,
        "method": None if context is None else context.get_start_method(),
        "batch_size": loader.batch_size,
        "notes": [f"{name}: {text}" for text in [*notes, *_left(loader, name)]],
    }


def chosen(loader: Loader, name: str) -> tuple[Dataset[Any], list[str]]:
    """The loader's data set, or the part of it that its sampler gives; and notes.

    Raises:
        BadInput: no fixed set of examples, each once.
    """
    dataset, batches = loader.dataset, loader.batch_sampler
    sampler: Any = batches.sampler if type(batches) is BatchSampler else batches
    count, kind = len(dataset), type(sampler).__name__  # type: ignore[arg-type]
    _refuse_known(sampler, kind, name)
    if type(sampler) is RandomSampler and len(sampler.data_source) == count:
        return dataset, _draws(sampler, count)
    if type(sampler) is SequentialSampler and len(sampler.data_source) == count:
        return dataset, []
    rows = _fixed(sampler, count, f"the {kind} of {name}")
    notes = [] if isinstance(sampler, ORDERED) else [f"the order of {kind} is not kept, each epoch has one of its own"]
    return (dataset if len(rows) == count else Subset(dataset, rows)), notes


def _refuse_known(sampler: Any, kind: str, name: str) -> None:
    if isinstance(sampler, WeightedRandomSampler):
        remedy = f"draw once instead: Subset(data, torch.multinomial(weights, n, replacement={sampler.replacement}).tolist())"
        raise BadInput(f"{name} is drawn by a {kind}, and an epoch here takes each example once", remedy)
    if isinstance(sampler, DistributedSampler) and sampler.num_replicas > 1:
        problem = f"{name} has a {kind}: the share of one of {sampler.num_replicas} processes"
        raise BadInput(problem, "leave the sampler out; processes that train together share batches out by themselves")


def _draws(sampler: RandomSampler, count: int) -> list[str]:
    if not sampler.replacement and sampler.num_samples == count:
        return []
    how = " with replacement" if sampler.replacement else ""
    return [f"its sampler draws {sampler.num_samples} of {count} examples an epoch{how}; here an epoch is all, each once"]


def _fixed(sampler: Any, count: int, what: str) -> list[int]:
    """The examples that a sampler gives, which have to be the same ones each time, each once."""
    once, again = _drawn(sampler, count, what, 1), _drawn(sampler, count, what, 2)
    if not once:
        raise BadInput(f"{what} gives no example", "every split needs examples")
    if set(once) != set(again):
        raise BadInput(f"{what} gives other examples each time", "give those that are meant: Subset(data, indices)")
    return once if once == again else sorted(once)


def _drawn(sampler: Any, count: int, what: str, seed: int) -> list[int]:
    """One epoch of a sampler. The caller's generators, and its own, stay as they are."""
    own = getattr(sampler, "generator", None)
    own = own if isinstance(own, Generator) else None
    state = None if own is None else own.get_state()
    try:
        with rng.isolated():
            rng.seed_all(seed)
            if own is not None:
                own.manual_seed(seed)
            return _once(_flat(sampler), count, what)
    finally:
        if own is not None and state is not None:
            own.set_state(state)


def _once(indices: Iterable[Any], count: int, what: str) -> list[int]:
    rows: dict[int, None] = {}
    for given in indices:
        try:
            row = int(given)
        except (TypeError, ValueError) as error:
            raise BadInput(f"{what} gives {given!r:.40}, which is no number", "number the examples from 0") from error
        if not -count <= row < count:
            raise BadInput(f"{what} gives {row}, and the data set has {count} examples", "give numbers below that")
        row %= count
        if row in rows:
            raise BadInput(
                f"{what} gives example {row} more than once an epoch", "give Subset(data, indices), which may repeat"
            )
        rows[row] = None
    return list(rows)


def _flat(sampler: Iterable[Any]) -> Iterable[Any]:
    for item in sampler:
        if isinstance(item, list | tuple) or (isinstance(item, Tensor) and item.dim()):
            yield from item
        else:
            yield item


def _left(loader: Loader, name: str) -> list[str]:
    notes = []
    if loader.drop_last and name != "train":
        notes.append("drop_last is not kept, all examples are scored")
    if loader.worker_init_fn is not None and loader.num_workers and name != "train":
        notes.append("worker_init_fn is not called, since scoring reads in its own process")
    return notes
