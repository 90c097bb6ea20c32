"""Units: single channels, features or rows. Coupled ones are united and then cut together, or not at all."""

from __future__ import annotations

import torch
from torch import Tensor


class Free:
    """The axis of a constant (zeros, ones) that takes whatever size its partner has."""


FREE = Free()
Dim = Tensor | Free | None  # int64 [size] of units; FREE; or None: an axis that no weight decides (batch, height, time)
Axes = list[Dim]


class Mismatch(Exception):
    """Two axes of different sizes meet; the operator is then treated as not understood."""


class Units:
    """Union-find over units, with notes: why some are fixed, where some are split into heads.

    Example:
        >>> units = Units()
        >>> a, b = units.fresh(3), units.fresh(3)
        >>> _ = units.join(a, b)
        >>> units.roots(a) == units.roots(b)
        True
    """

    def __init__(self) -> None:
        self.parent: list[int] = []
        self.fixed: dict[int, str] = {}
        self.split: dict[int, str] = {}

    def fresh(self, size: int) -> Tensor:
        """New units, each on its own: int64 [size]."""
        start = len(self.parent)
        self.parent.extend(range(start, start + size))
        return torch.arange(start, start + size)

    def find(self, unit: int) -> int:
        """The representative of a unit's class."""
        path = unit
        while self.parent[path] != path:
            path = self.parent[path]
        while self.parent[unit] != path:
            self.parent[unit], unit = path, self.parent[unit]
        return path

    def roots(self, dim: Tensor) -> list[int]:
        """The representatives along an axis."""
        return [self.find(u) for u in dim.tolist()]

    def free(self, dim: Dim) -> bool:
        """Whether the axis has units that may be cut."""
        return isinstance(dim, Tensor) and not all(root in self.fixed for root in self.roots(dim))

    def unite(self, a: Tensor, b: Tensor) -> None:
        """Couple two axes element by element."""
        for x, y in zip(self.roots(a), self.roots(b), strict=True):
            x, y = self.find(x), self.find(y)
            if x != y:
                keep, gone = min(x, y), max(x, y)
                self.parent[gone] = keep
                for notes in (self.fixed, self.split):
                    if gone in notes:
                        notes.setdefault(keep, notes.pop(gone))

    def pin(self, dim: Dim, reason: str) -> None:
        """These units may never be cut; the first reason is kept."""
        if isinstance(dim, Tensor):
            for root in set(self.roots(dim)):
                self.fixed.setdefault(root, reason)

    def join(self, a: Dim, b: Dim, reason: str = "its partner has a fixed size") -> Dim:
        """The axis of a combination of two: coupled where both have units, fixed where one side cannot change.

        Raises:
            Mismatch: the sizes differ.
        """
        if isinstance(a, Free) or isinstance(b, Free):
            return b if isinstance(a, Free) else a
        if a is None or b is None:
            known = b if a is None else a
            self.pin(known, reason)
            return known
        if len(a) != len(b):
            raise Mismatch
        self.unite(a, b)
        return a
