"""Measured quantities with their uncertainty. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Interval:
    """A confidence interval: `low` ≤ true value ≤ `high` at the confidence `level`."""

    low: float
    high: float
    level: float


@dataclass(frozen=True)
class Measurement:
    """Samples of one quantity.

    Args:
        quantity: what was measured, such as "latency".
        unit: "s", "bytes", "pt", "bits/byte", …
        value: the estimate.
        interval: its uncertainty; None where the quantity is exact (bytes, parameters).
        samples: the raw values that the estimate comes from.
        machine: what it was measured on, as short facts.

    Example:
        >>> Measurement("bytes", "bytes", 10.0).value
        10.0
    """

    quantity: str
    unit: str
    value: float
    interval: Interval | None = None
    samples: tuple[float, ...] = ()
    machine: Mapping[str, Any] = field(default_factory=dict)

    def plain(self) -> dict[str, Any]:
        """As JSON data."""
        return asdict(self)

    @classmethod
    def from_plain(cls, data: Mapping[str, Any]) -> Measurement:
        """Read back what `plain` wrote."""
        interval = Interval(**data["interval"]) if data.get("interval") else None
        return cls(**{**data, "interval": interval, "samples": tuple(data.get("samples", ()))})
