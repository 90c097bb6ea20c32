"""A rank's share of a batch: the ranks together see the batch that one process would."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
import torch.distributed as dist
from torch import Tensor

from quadriga.core.batch import Batch, rows
from quadriga.core.errors import BadInput


@dataclass(frozen=True)
class Share:
    """Consecutive examples of every batch, as even as can be.

    Args:
        rank: among those that see different examples.
        size: their number.

    Example:
        >>> [Share(rank, 3).of(8) for rank in range(3)]
        [slice(0, 3, None), slice(3, 6, None), slice(6, 8, None)]
    """

    rank: int = 0
    size: int = 1

    def of(self, count: int) -> slice:
        """The rank's examples of a batch of so many.

        Raises:
            BadInput: there are fewer than ranks.
        """
        if count < self.size:
            raise BadInput(f"a batch of {count} examples for {self.size} data-parallel ranks", "raise the batch size")
        each, more = divmod(count, self.size)
        start = self.rank * each + min(self.rank, more)
        return slice(start, start + each + (self.rank < more))

    def mine(self, entries: Tensor) -> Tensor:
        """The rank's entries of a batch's [n, ...]."""
        return entries if self.size == 1 else entries[self.of(len(entries))]

    def cut(self, batch: Batch) -> Batch:
        """The rank's part of a batch."""
        return replace(rows(batch, self.of(len(batch))), of=len(batch))

    def largest(self, count: int) -> int:
        """The most examples that a rank has of a batch of so many."""
        return -(-count // self.size)


def evenly(batch: Batch, count: int) -> Iterator[Batch]:
    """The batch in so many parts of nearly equal size, so that ranks whose shares differ by one have equally many."""
    bounds = [len(batch) * k // count for k in range(count + 1)]
    if min(b - a for a, b in pairwise(bounds)) < 1:
        raise BadInput(f"{len(batch)} examples of a rank cannot be cut into {count} parts", "raise the batch size")
    for start, end in pairwise(bounds):
        yield rows(batch, slice(start, end))


def padded(t: Tensor, length: int) -> Tensor:
    """The tensor [n, ...] with zeros up to a length."""
    return torch.cat((t, t.new_zeros(length - len(t), *t.shape[1:]))) if len(t) < length else t


def joined(t: Tensor, share: Share, count: int, group: dist.ProcessGroup) -> Tensor:
    """The rows [count, ...] of a whole batch, in all ranks of a group, from each one's rows [its share, ...]."""
    longest = share.largest(count)
    found = [torch.empty(longest, *t.shape[1:], dtype=t.dtype, device=t.device) for _ in range(share.size)]
    dist.all_gather(found, padded(t.contiguous(), longest), group=group)
    shares = [Share(rank, share.size).of(count) for rank in range(share.size)]
    return torch.cat([part[: s.stop - s.start] for part, s in zip(found, shares, strict=True)])
