"""The Pareto front over plain rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence


def front(rows: Sequence[Mapping[str, float]], maximize: Sequence[str]) -> list[bool]:
    """For each row, whether no other row is at least as good in every key and better in one.

    Args:
        rows: values by key.
        maximize: the keys, all to be maximized (negate what is to be minimized).

    Example:
        >>> front([{"a": 1, "b": 2}, {"a": 2, "b": 1}, {"a": 1, "b": 1}], ("a", "b"))
        [True, True, False]
    """

    def beaten(row: Mapping[str, float], other: Mapping[str, float]) -> bool:
        pairs = [(other[k], row[k]) for k in maximize]
        return all(o >= r for o, r in pairs) and any(o > r for o, r in pairs)

    return [not any(beaten(row, other) for other in rows) for row in rows]
