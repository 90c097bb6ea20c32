"""The order of examples: an endless stream that depends on the seed and nothing else, so a position is all its state."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from quadriga.core.batch import Batch
from quadriga.core.data import Data
from quadriga.core.setup import Transform
from quadriga.train.rng import derive


class Sampler:
    """Epoch after epoch, each a permutation drawn from (seed, epoch), joined to one stream of indices.

    Batches are cut from the stream, so every batch is full (no batch of one for a batch norm, no second
    shape to compile) and each epoch of the stream holds every example exactly once. A batch may reach over the
    border of two epochs.

    Args:
        length: number of examples.
        batch_size: examples in a batch, at most `length`.
        seed: of the order.

    Example:
        >>> order = Sampler(5, 2, seed=0)
        >>> sorted(int(i) for p in (0, 2, 4, 6, 8) for i in order.indices(p)) == sorted([*range(5)] * 2)
        True
    """

    def __init__(self, length: int, batch_size: int, seed: int) -> None:
        self.length, self.batch_size, self.seed = length, min(batch_size, length), seed
        self._epochs: dict[int, Tensor] = {}

    def permutation(self, epoch: int) -> Tensor:
        """The order of one epoch [length]."""
        if epoch not in self._epochs:
            generator = torch.Generator().manual_seed(derive("order", self.seed, epoch))
            kept = {k: v for k, v in self._epochs.items() if k == epoch - 1}
            self._epochs = {**kept, epoch: torch.randperm(self.length, generator=generator)}
        return self._epochs[epoch]

    def indices(self, position: int) -> Tensor:
        """The batch [batch_size] that starts at a position of the stream."""
        epoch, offset = divmod(position, self.length)
        first = self.permutation(epoch)[offset : offset + self.batch_size]
        if len(first) == self.batch_size:
            return first
        return torch.cat((first, self.permutation(epoch + 1)[: self.batch_size - len(first)]))


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
    """

    def __init__(
        self,
        data: Data,
        sampler: Sampler,
        transforms: Sequence[Transform],
        place: Callable[[Batch], Batch],
        layout: Callable[[Batch], Batch],
    ) -> None:
        self.data, self.sampler, self.transforms = data, sampler, tuple(transforms)
        self.place, self.layout = place, layout
        self._generators: dict[torch.device, torch.Generator] = {}

    def batch(self, position: int, step: int) -> Batch:
        """The transformed batch that starts at `position` of the stream, for the global step `step`."""
        batch = self.place(self.data.batch(self.sampler.indices(position)))
        if self.transforms:
            generator = self._generator(batch.index.device)
            generator.manual_seed(derive("transforms", self.sampler.seed, step))
            for transform in self.transforms:
                batch = transform(batch, generator)
            batch = replace(batch, augmented=True)
        return self.layout(batch)

    def _generator(self, device: torch.device) -> torch.Generator:
        if device not in self._generators:
            self._generators[device] = torch.Generator(device)
        return self._generators[device]
