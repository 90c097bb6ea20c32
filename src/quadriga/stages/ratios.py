"""How a finalist stands against each opponent, and whether that is a result."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from quadriga.measure.stats import UNMEASURED
from quadriga.measure.timings import Timings
from quadriga.stages.state import TIMING_LEVEL


def _shown(timings: Timings, arm: str) -> list[Mapping[str, Any]]:
    return [ratio for batches in opponents_ratios(timings, arm).values() for ratio in batches.values()]


def widest(timings: Timings, arms: list[str]) -> float:
    """The upper over the lower end of the widest interval that would be shown; infinite where an arm has none."""
    able = [arm for arm in arms if arm not in timings.errors]
    ends = [(r["low"], r["high"]) for arm in able for r in _shown(timings, arm) or [{"low": None, "high": None}]]
    return max((high / low if low and high else math.inf for low, high in ends), default=1.0 if not arms else math.inf)


def unmeasured(ratios: Mapping[str, Mapping[str, Any]], timings: Timings) -> str:
    """Why there is no result: a batch size at which the interval is wider than a factor of two."""
    wide = {b: r for b, r in ratios.items() if r["verdict"] == UNMEASURED}
    told = " and ".join(f"{_end(r['low'])} to {_end(r['high'])} times at batch {b}" for b, r in wide.items())
    busy = f"other processes took {timings.disturbed:.0%} of its cores" if timings.others else "its load is not known"
    where = f"not measured well enough on this busy machine against eager PyTorch ({told}; {busy})"
    return f"{where}; run it again when the machine is quiet, or with a larger --budget" if wide else ""


def _end(value: float | None) -> str:
    return "?" if value is None else f"{value:.3g}"


def not_faster(ratios: Mapping[str, Mapping[str, Any]]) -> str:
    """Why a model does not count as faster than eager PyTorch: it has to be at one batch size, and at none slower."""
    if all(r["verdict"] != "faster" for r in ratios.values()):
        return "it is not shown to be faster than the unchanged model in eager PyTorch"
    slow = {b: r["value"] for b, r in ratios.items() if r["verdict"] == "slower"}
    told = ", ".join(f"{value:.2f} times as fast at batch {b}" for b, value in slow.items())
    return f"it is slower than the unchanged model in eager PyTorch: {told}" if slow else ""


def surely(found: Mapping[str, Any]) -> float:
    """A ratio; 1 where it may as well be equal."""
    return 1.0 if found.get("low") and found["low"] <= 1 <= found["high"] else float(found["value"])


def opponents_ratios(timings: Timings, arm: str) -> dict[str, dict[str, Any]]:
    """Opponent → batch → ratio; of an opponent's variants the fastest at each batch size counts."""
    found: dict[str, dict[str, Any]] = {}
    if not all(arm in timings[batch] for batch in timings.batches):
        return found
    names = {name for batch in timings.batches for name in timings[batch]}
    for opponent, prefix in (("eager", "eager"), ("tuned_eager", "tuned_eager-"), ("lossless_export", "lossless-")):
        variants = [n for n in sorted(names) if n == prefix or (prefix.endswith("-") and n.startswith(prefix))]
        if opponent == "tuned_eager":
            variants = ["eager", *variants] if variants else []
        for batch in timings.batches:
            ratios = [r for v in variants if (r := timings.ratio(v, arm, batch, level=TIMING_LEVEL)) is not None]
            cpu = [r for v in variants if (r := timings.ratio(v, arm, batch, level=TIMING_LEVEL, clock="cpu")) is not None]
            if ratios:
                least = min(range(len(ratios)), key=lambda i: ratios[i].value)
                found.setdefault(opponent, {})[str(batch)] = {**ratios[least].plain(), "processor_time": cpu[least].plain()}
    return found
