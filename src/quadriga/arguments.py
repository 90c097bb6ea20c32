"""What people type, as values: budgets, limits, lists of families. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Iterable

from quadriga.core.errors import BadInput, did_you_mean

UNITS = {"h": 3600, "m": 60, "s": 1}
LIMITS = ("bytes", "latency", "parameters", "train_cost")
FAMILIES = ("structure", "training", "optimizer", "hardware")


def parse_budget(value: str | float) -> float:
    """Seconds of a budget: a number of seconds, or hours, minutes and seconds with their units, in this order.

    Raises:
        BadInput: another form, or not positive.

    Example:
        >>> parse_budget("90s"), parse_budget("10m"), parse_budget("1h30m"), parse_budget(5)
        (90.0, 600.0, 5400.0, 5.0)
    """
    text = str(value).strip().lower()
    match = re.fullmatch(r"(?=\d)(?:(\d+(?:\.\d+)?)h)?(?:(\d+(?:\.\d+)?)m)?(?:(\d+(?:\.\d+)?)s?)?", text)
    total = sum(float(part) * UNITS[unit] for part, unit in zip(match.groups(), UNITS, strict=True) if part) if match else 0.0
    if not 0 < total < float("inf"):
        raise BadInput(f"the budget is {str(value)!r}", "give a time such as 90s, 10m or 1h30m")
    return total


def parse_limits(texts: Iterable[str]) -> dict[str, float]:
    """Upper bounds of ratios winner/baseline, from `bytes=0.2` and the like.

    Raises:
        BadInput: another form, an unknown name, or a bound that is not positive.

    Example:
        >>> parse_limits(["bytes=0.2", "train_cost=1"])
        {'bytes': 0.2, 'train_cost': 1.0}
    """
    limits: dict[str, float] = {}
    for text in texts:
        name, _, bound = (part.strip() for part in text.partition("="))
        if name not in LIMITS:
            raise BadInput(f"the limit {text!r} is on nothing that is measured", did_you_mean(name, LIMITS))
        if not re.fullmatch(r"\d*\.?\d+", bound) or not float(bound) > 0:
            raise BadInput(f"the limit {text!r} has no positive ratio", f"give winner/baseline, such as {name}=0.2")
        limits[name] = float(bound)
    return limits


def parse_families(text: str | None) -> tuple[str, ...] | None:
    """Families from `structure,hardware`; None leaves all.

    Raises:
        BadInput: an unknown family, or none.
    """
    if text is None:
        return None
    names = tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    if not names:
        raise BadInput("no family is named", f"name some of {', '.join(FAMILIES)}")
    for name in names:
        if name not in FAMILIES:
            raise BadInput(f'there is no family "{name}"', did_you_mean(name, FAMILIES))
    return names
