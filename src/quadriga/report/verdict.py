"""The verdict in one sentence, and the key figures above the fold."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from quadriga.report import text

Records = Mapping[str, Any]
NOISY = 2.0  # an interval whose ends are further apart, as a ratio, has no middle worth quoting


def sentence(records: Records) -> str:
    """What came out, for a person who reads nothing else."""
    result = records["result"]
    if result["status"] == "verified" and result["winner"]:
        return _verified(result["winner"], str(records["floor"].get("text", "")))
    if result["status"] == "infeasible":
        return _infeasible(records)
    if result["status"] == "interrupted":
        return "The study was interrupted; the same command goes on where it stopped."
    error = result.get("error") or {}
    reason = error.get("message") or "no winner could be verified"
    return f"The study failed: {reason}" + (f"; {error['remedy']}." if error.get("remedy") else ".")


def _verified(best: Mapping[str, Any], floor: str) -> str:
    quality = best["quality"]
    unit = quality["unit"]
    speeds = [_faster(best, name) for name in ("lossless_export", "eager")]
    told = "is " + (" and ".join(s for s in speeds if s) or "of the same speed")
    if speed := best.get("train_speed"):  # what was asked for comes first, and alone
        told = f"trains in {_speed(speed)} less processor time (interval {text.interval(speed)})"
    return (
        f"Verified: the optimized model {told}, takes {text.ratio(best['bytes_ratio'])} the bytes, and its "
        f"{quality['metric']} on {text.number(quality['n'])} unseen examples is {text.quality(quality['value'], unit)} against "
        f"{text.quality(quality['baseline'], unit)} (difference {text.signed(quality['difference'], unit)}, "
        f"at least {text.signed(quality['low'], unit)}{f'; the floor is {floor}' * bool(floor)})."
    )


def _faster(best: Mapping[str, Any], name: str) -> str:
    timings = best["latency_ratio"].get(name) or {}
    for batch, value in timings.items():
        bounds = f", interval {text.interval(value)}" if value.get("low") is not None else ""
        return f"{_speed(value)} as fast as {text.as_fast_as(name)} (batch {batch}{bounds})"
    return ""


def _speed(value: Mapping[str, Any]) -> str:
    """The ratio; where the machine was too noisy for one, its bounds.

    Example:
        >>> _speed({"value": 1314.0, "low": 231.0, "high": 7487.0}), _speed({"value": 1.5, "low": 1.4, "high": 1.6})
        ('at least 231×', '1.50×')
    """
    low, high = value.get("low"), value.get("high")
    if low is None or high is None or high <= NOISY * low:
        return text.ratio(value["value"])
    return f"at least {text.ratio(low)}" if low > 1 else f"between {text.ratio(low)} and {text.ratio(high)}"


def _infeasible(records: Records) -> str:
    floor = records["floor"].get("text")
    above = f" above the floor of {floor}" if floor else ""
    miss = records["result"].get("nearest_miss") or {}
    why = f" The nearest miss: {miss['why']}." if miss.get("why") else ""
    return f"Infeasible: nothing beat the baseline{above}, so the unchanged baseline is handed back.{why}"


def _training(cost: Mapping[str, Any]) -> str:
    words = {"samples": "samples", "flops": "FLOPs"}
    return ", ".join(f"{text.ratio(cost[k])} the {word}" for k, word in words.items() if cost.get(k) is not None)


def _training_figure(best: Mapping[str, Any]) -> tuple[str, str, str]:
    detail = _training(best.get("train_cost") or {})
    if speed := best.get("train_speed"):  # it was the objective: timed in turn, with an interval
        return text.ratio(speed["value"]), "less processor time of training", f"{text.interval(speed)}; {detail}"
    return text.ratio(best["train_cost_ratio"]), "the training time", detail


def key_figures(records: Records) -> tuple[tuple[str, str, str], ...]:
    """(value, what, detail) of the five numbers that matter; none without a winner."""
    best = records["result"]["winner"]
    if not best:
        return ()
    figures = []
    for name in ("lossless_export", "eager"):
        for batch, value in (best["latency_ratio"].get(name) or {}).items():
            detail = text.interval(value) if value.get("low") is not None else ""
            figures.append((_speed(value), f"as fast as {text.as_fast_as(name)}, batch {batch}", detail))
    quality = best["quality"]
    bound = f"at least {text.signed(quality['low'], quality['unit'])}, n = {text.number(quality['n'])}"
    figures.append((text.signed(quality["difference"], quality["unit"]), quality["metric"], bound))
    figures.append((text.ratio(best["bytes_ratio"]), "the bytes", f"{text.ratio(best['parameters_ratio'])} the parameters"))
    figures.append(_training_figure(best))
    return tuple(figures)
