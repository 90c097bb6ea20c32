"""The order of examples: an endless stream that depends on the seed and nothing else, so a position is all its state."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from quadriga.core.batch import Batch
from quadriga.core.data import Data
from quadriga.core.rng import derive
from quadriga.core.slots import Moment, Transform
from quadriga.parallel.share import Share
from quadriga.train.feed import Feed

Select = Callable[[Tensor, Moment], Tensor | None]  # as Hook.select
CPU = torch.device("cpu")
NOTHING = torch.empty(0, dtype=torch.int64)


class Sampler:
    """Epoch after epoch, each a permutation drawn from (seed, epoch), joined to one stream of indices.

    Batches are cut from the stream, so every batch is full (no batch of one for a batch norm, no second
    shape to compile) and each epoch of the stream holds every example exactly once. A batch may reach over the
    border of two epochs.

    Args:
        length: number of examples.
        batch_size: examples in a batch, at most `length`.
        seed: of the order.
        device: where permutations are kept, for data that live there.

    Example:
        >>> order = Sampler(5, 2, seed=0)
        >>> sorted(int(i) for p in (0, 2, 4, 6, 8) for i in order.indices(p)) == sorted([*range(5)] * 2)
        True
    """

    def __init__(self, length: int, batch_size: int, seed: int, device: torch.device = CPU) -> None:
        self.length, self.batch_size, self.seed, self.device = length, min(batch_size, length), seed, device
        self._epochs: dict[int, Tensor] = {}

    def permutation(self, epoch: int) -> Tensor:
        """The order of one epoch [length]."""
        if epoch not in self._epochs:
            generator = torch.Generator().manual_seed(derive("order", self.seed, epoch))
            kept = {k: v for k, v in self._epochs.items() if k == epoch - 1}
            self._epochs = {**kept, epoch: torch.randperm(self.length, generator=generator).to(self.device)}
        return self._epochs[epoch]

    def indices(self, position: int, size: int | None = None) -> Tensor:
        """The batch [size] that starts at a position of the stream; of `batch_size` examples, or of at most `length`."""
        size = self.batch_size if size is None else size
        epoch, offset = divmod(position, self.length)
        first = self.permutation(epoch)[offset : offset + size]
        if len(first) == size:
            return first
        return torch.cat((first, self.permutation(epoch + 1)[: size - len(first)]))

    def epochs(self, position: int, size: int) -> Tensor:
        """Of each entry [size] of the stream from a position, the epoch it belongs to."""
        return torch.arange(position, position + size).div_(self.length, rounding_mode="floor")


def count_steps(length: int, batch_size: int, epochs: float, done: float = 0.0, position: int = 0) -> int:
    """Steps until `done + epochs` epochs of the stream are covered from `position`; at least one.

    Counting from the start of the stream makes one epoch and three more as many steps as four.

    Example:
        >>> count_steps(10, 4, 1), count_steps(10, 4, 3, done=1, position=12), count_steps(10, 4, 4)
        (3, 7, 10)
        >>> count_steps(100, 10, 0.5)
        5
    """
    return max(1, math.ceil(((done + epochs) * length - position) / min(batch_size, length) - 1e-9))


class Loader:
    """Training batches by number, each a function of (seed, position, step): nothing else is remembered.

    Args:
        data: the split.
        sampler: the order.
        transforms: act in turn on the batch, where the batch lives, with a generator seeded from (seed, step).
        place: moves a batch to the device.
        layout: gives it the memory format of the runtime, after the transforms.
        selects: (indices, moment) → weights, by which examples of the stream are passed over.
        feed: reads the examples of a split that is not resident.
        share: the part of each batch that is wanted here, where several processes share it. It is cut before examples are
            read, or behind the transforms where there are any, since these act on the batch as a whole.
    """

    def __init__(
        self,
        data: Data,
        sampler: Sampler,
        transforms: Sequence[Transform],
        place: Callable[[Batch], Batch],
        layout: Callable[[Batch], Batch],
        selects: Sequence[Select] = (),
        feed: Feed | None = None,
        share: Share | None = None,
    ) -> None:
        self.share = Share() if share is None else share
        self.data, self.sampler, self.transforms, self.feed = data, sampler, tuple(transforms), feed
        self.place, self.layout, self.selects = place, layout, tuple(selects)
        self._generators: dict[tuple[str, torch.device], torch.Generator] = {}

    def draw(self, position: int, step: int, size: int, progress: float) -> tuple[Batch, int]:
        """The transformed batch of `size` examples from `position` of the stream, for the global step `step`; and the position
        behind it."""
        start = position
        index, epochs, weights, position = self._choose(position, step, size, progress)
        early = Share() if self.transforms else self.share
        batch = self.place(self.data.batch(early.mine(index)) if self.feed is None else self.feed.batch(index, start))
        if weights is not None:
            weights = early.mine(weights).to(batch.index.device)
            batch = replace(batch, weight=weights if batch.weight is None else weights * batch.weight)
        if self.transforms:
            device = batch.index.device
            moment = Moment(self._generator("transforms", step, device), progress, epochs.to(device))
            for transform in self.transforms:
                batch = transform(batch, moment)
            batch = replace(batch, augmented=True)
        if self.share.size > 1:
            batch = self.share.cut(batch) if self.transforms else replace(batch, of=len(index))
        return self.layout(batch), position

    def close(self) -> None:
        """No more batches are wanted now; processes that read ahead end."""
        if self.feed is not None:
            self.feed.close()

    def _choose(self, position: int, step: int, size: int, progress: float) -> tuple[Tensor, Tensor, Tensor | None, int]:
        """Indices, epochs and weights of the next `size` examples that are not passed over, and the position behind them."""
        size = min(size, self.sampler.length)
        if not self.selects:
            epochs = self.sampler.epochs(position, size) if self.transforms else NOTHING
            return self.sampler.indices(position, size), epochs, None, position + size
        found: list[tuple[Tensor, Tensor, Tensor]] = []
        missing, last = size, position + self.sampler.length  # nobody passes over everything
        generator = self._generator("select", step, CPU)
        while missing:
            index, epochs = self.sampler.indices(position, missing), self.sampler.epochs(position, missing)
            weights = self._weights(index, Moment(generator, progress, epochs)) if position < last else torch.ones(missing)
            kept = weights > 0
            found.append((index[kept], epochs[kept], weights[kept]))
            position, missing = position + missing, missing - int(kept.sum())
        index, epochs, weights = (torch.cat(parts) for parts in zip(*found, strict=True))
        return index, epochs, weights, position

    def _weights(self, index: Tensor, moment: Moment) -> Tensor:
        weights = torch.ones(len(index))
        for select in self.selects:
            chosen = select(index, moment)
            weights = weights if chosen is None else weights * chosen
        return weights

    def _generator(self, use: str, step: int, device: torch.device) -> torch.Generator:
        made = self._generators.get((use, device))
        if made is None:
            made = self._generators[use, device] = torch.Generator(device)
        return made.manual_seed(derive(use, self.sampler.seed, step))
