"""Curves that schedules follow: pure functions of t in [0, 1], without units."""

from __future__ import annotations

import math
from collections.abc import Sequence


def cosine(t: float, begin: float, end: float) -> float:
    """Half a cosine from `begin` at t = 0 to `end` at t = 1.

    Example:
        >>> cosine(0.5, 1.0, 0.0)
        0.5
    """
    return end + (begin - end) * (1 + math.cos(math.pi * t)) / 2


def stairs(t: float, gamma: float, milestones: Sequence[float]) -> float:
    """gamma ^ (number of milestones ≤ t)."""
    return gamma ** sum(m <= t for m in milestones)


def polynomial(t: float, power: float, end: float) -> float:
    """From 1 to `end` as (1 - t) ^ power.

    Example:
        >>> polynomial(0.5, 2.0, 0.0), polynomial(1.0, 2.0, 0.1)
        (0.25, 0.1)
    """
    return end + (1 - end) * (1 - t) ** power


def plateau_then_line(t: float, decay: float, end: float) -> float:
    """1 until t = 1 - decay, then a line down to `end`."""
    return 1 - (1 - end) * max(0.0, (t - (1 - decay)) / decay)


def there_and_back(t: float, turn: float, begin: float, middle: float, end: float) -> float:
    """Half a cosine from `begin` to `middle`, which is reached at t = turn, and another one to `end`.

    Example:
        >>> [round(there_and_back(t, 0.25, 0.04, 1.0, 0.0), 3) for t in (0.0, 0.25, 1.0)]
        [0.04, 1.0, 0.0]
    """
    if t < turn:
        return cosine(t / turn, begin, middle)
    return cosine((t - turn) / (1 - turn), middle, end)
