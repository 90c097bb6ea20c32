"""Numbers and names as people read them. A missing number is an en dash."""

from __future__ import annotations

import math
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

NONE = "–"
UNMEASURED = "unmeasured"  # the verdict of an interval that is too wide for a result
OPPONENTS = {
    "eager": "eager PyTorch",
    "tuned_eager": "tuned eager",
    "lossless_export": "best lossless export",
    "same_training": "original network, winner's training",
    "from_scratch": "small network from scratch",
    "by_chance": "the winner, by chance",
}


def number(value: Any, digits: int = 3) -> str:
    """A number to `digits` significant digits, without an exponent where it is short enough.

    Example:
        >>> number(0.012345), number(61706), number(None), number(12.0), number(88.45, 4)
        ('0.0123', '61,706', '–', '12', '88.45')
    """
    if value is None or isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return NONE
    if isinstance(value, int) or abs(value) >= 10**digits:
        return f"{round(value):,}"
    if value and abs(value) < 1e-4:
        return f"{value:.{digits - 1}e}"
    return f"{value:.{digits}g}"


def ratio(value: Any) -> str:
    """A factor: `2.13×`."""
    return NONE if value is None else f"{value:.2f}×" if value < 100 else f"{value:,.0f}×"


def speed(value: Mapping[str, Any]) -> str:
    """A ratio of timings, or that there is none.

    Example:
        >>> speed({"value": 1314.0, "verdict": "unmeasured"}), speed({"value": 1.5, "verdict": "faster"})
        ('not measured well enough', '1.50×')
    """
    return "not measured well enough" if value.get("verdict") == UNMEASURED else ratio(value["value"])


def interval(value: Mapping[str, Any] | None) -> str:
    """The interval of a ratio.

    Example:
        >>> interval({"value": 2.1, "low": 1.9, "high": 2.345}), interval({"value": 2.1})
        ('[1.90, 2.35]', '–')
    """
    if not value or value.get("low") is None or value.get("high") is None:
        return NONE
    return f"[{value['low']:.2f}, {value['high']:.2f}]"


def signed(value: Any, unit: str = "") -> str:
    """A difference with its sign and a true minus.

    Example:
        >>> signed(-0.5, "pt"), signed(0.123), signed(0)
        ('−0.50 pt', '+0.123', '0')
    """
    if value is None:
        return NONE
    text = f"{value:+.2f}" if unit == "pt" else f"{value:+.3g}"
    text = "0" if float(text) == 0 else text.replace("-", "−")
    return f"{text} {unit}".strip()


def quality(value: Any, unit: str = "") -> str:
    """A value of the metric: points to two decimals, other units to four digits."""
    if value is None:
        return NONE
    return f"{value:.2f} {unit}" if unit == "pt" else f"{number(value, 4)} {unit}".strip()


def seconds(value: Any) -> str:
    """A duration in a unit that fits.

    Example:
        >>> seconds(0.000412), seconds(0.0123), seconds(75), seconds(5400)
        ('412 µs', '12.3 ms', '1 min 15 s', '1 h 30 min')
    """
    if value is None:
        return NONE
    if value < 60:
        for factor, unit in ((1, "s"), (1e3, "ms"), (1e6, "µs")):
            if value * factor >= 1 or unit == "µs":
                return f"{value * factor:.3g} {unit}" if value else "0 s"
    whole = round(value)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s" if whole % 60 else f"{whole // 60} min"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def size(value: Any) -> str:
    """Bytes in decimal units.

    Example:
        >>> size(246_824), size(512)
        ('247 kB', '512 B')
    """
    if value is None:
        return NONE
    for factor, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if value >= factor:
            return f"{value / factor:.3g} {unit}"
    return f"{value:.0f} B"


def operations(value: Any) -> str:
    """Floating-point operations.

    Example:
        >>> operations(6.25e11), operations(833_040), operations(None)
        ('625 GFLOP', '833 kFLOP', '–')
    """
    if value is None:
        return NONE
    for factor, unit in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= factor:
            return f"{value / factor:.3g} {unit}FLOP"
    return f"{value:.0f} FLOP"


def moment(value: Any) -> str:
    """A time of day from seconds since 1970, in UTC; any other text as it is.

    Example:
        >>> moment(0)
        '1970-01-01 00:00:00 UTC'
    """
    if isinstance(value, int | float):
        return f"{datetime.fromtimestamp(value, UTC):%Y-%m-%d %H:%M:%S} UTC"
    return str(value)


def percent(value: Any) -> str:
    """A share in per cent."""
    return NONE if value is None else f"{100 * value:.3g} %"


def opponent(name: str) -> str:
    """What people call an opponent."""
    return OPPONENTS.get(name, name)


def as_fast_as(name: str) -> str:
    """The opponent within a sentence: "eager PyTorch" is a name, the others take an article."""
    return opponent(name) if name == "eager" or name not in OPPONENTS else f"the {opponent(name)}"


def fields(data: Mapping[str, Any]) -> str:
    """A step's fields in one line."""
    return ", ".join(f"{k}={v}" for k, v in data.items() if k != "method")


def plain(value: Any) -> str:
    """Any plain value as a cell: numbers formatted, mappings and lists joined."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: NONE}[value]
    if isinstance(value, int | float):
        return number(value, 6)
    if isinstance(value, Mapping):
        return ", ".join(f"{k} {plain(v)}" for k, v in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(plain, value)) or NONE
    return str(value)


def fact(name: str, value: Any) -> str:
    """A value as its name asks for it: seconds, bytes, or plain.

    Example:
        >>> fact("train_seconds", 75), fact("memory", 2e9), fact("latency", {"1": 0.002}), fact("batch", 64)
        ('1 min 15 s', '2 GB', 'batch 1: 2 ms', '64')
    """
    writers = {"bytes": size, "memory": size, "seconds": seconds, "latency": seconds, "flops": operations}
    write = writers.get(name.rpartition("_")[2] or name)
    if write and isinstance(value, int | float) and not isinstance(value, bool):
        return write(value)
    if write and isinstance(value, Mapping):
        return ", ".join(f"batch {k}: {fact(name, v)}" for k, v in value.items())
    return plain(value)
