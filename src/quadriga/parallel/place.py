"""Where the part of a tensor that one process holds lies in the whole."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import product

from torch import Tensor

Run = tuple[int, int, int]  # of consecutive entries: start in the whole, start in the part, length


@dataclass(frozen=True)
class Place:
    """A part of a tensor: of each dimension the entries that are there, in their order; all where nothing is said.

    The entries need not be consecutive: a projection that makes queries, keys and values at once is cut by heads, so a
    process holds three pieces of it.

    Args:
        shape: of the whole tensor.
        entries: dimension → int64 [entries there].
        owner: whether this process answers for the part, of all that hold it.

    Example:
        >>> import torch
        >>> place = Place((6, 2), {0: torch.tensor([0, 1, 4, 5])})
        >>> place.local_shape, [chunk for chunk, _ in place.chunks()]
        ((4, 2), [((0, 0), (2, 2)), ((4, 0), (2, 2))])
    """

    shape: tuple[int, ...]
    entries: Mapping[int, Tensor] = field(default_factory=dict)
    owner: bool = True

    @property
    def local_shape(self) -> tuple[int, ...]:
        """Of the part."""
        return tuple(len(self.entries[d]) if d in self.entries else size for d, size in enumerate(self.shape))

    def take(self, whole: Tensor) -> Tensor:
        """The part of a whole tensor."""
        for dim, at in self.entries.items():
            whole = whole.index_select(dim, at.to(whole.device))
        return whole

    def put(self, part: Tensor, whole: Tensor) -> None:
        """Write the part into a whole tensor."""
        for (offsets, sizes), piece in self.pieces(part):
            whole[tuple(slice(o, o + n) for o, n in zip(offsets, sizes, strict=True))] = piece

    def pieces(self, part: Tensor) -> Iterator[tuple[tuple[tuple[int, ...], tuple[int, ...]], Tensor]]:
        """((offsets, sizes) in the whole, view of the part) of each block of consecutive entries."""
        for (offsets, sizes), starts in self.chunks():
            yield (offsets, sizes), part[tuple(slice(s, s + n) for s, n in zip(starts, sizes, strict=True))]

    def chunks(self) -> Iterator[tuple[tuple[tuple[int, ...], tuple[int, ...]], tuple[int, ...]]]:
        """((offsets, sizes) in the whole, starts in the part) of each block of consecutive entries."""
        every = [runs(self.entries[d]) if d in self.entries else [(0, 0, size)] for d, size in enumerate(self.shape)]
        for some in product(*every):
            yield (tuple(r[0] for r in some), tuple(r[2] for r in some)), tuple(r[1] for r in some)


def runs(at: Tensor) -> list[Run]:
    """Consecutive entries joined.

    Example:
        >>> import torch
        >>> runs(torch.tensor([4, 5, 9]))
        [(4, 0, 2), (9, 2, 1)]
    """
    found: list[Run] = []
    for here, there in enumerate(at.tolist()):
        if found and there == found[-1][0] + found[-1][2]:
            found[-1] = (*found[-1][:2], found[-1][2] + 1)
        else:
            found.append((there, here, 1))
    return found


def shard(at: Tensor, rank: int, size: int) -> Tensor:
    """The entries that a rank of so many holds, as `torch.chunk` deals them: the last ranks may get fewer, or none.

    Example:
        >>> import torch
        >>> [shard(torch.arange(5), rank, 4).tolist() for rank in range(4)]
        [[0, 1], [2, 3], [4], []]
    """
    each = -(-len(at) // size)
    return at[rank * each : (rank + 1) * each]
