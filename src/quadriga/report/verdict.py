"""The verdict in one sentence, and the key figures above the fold."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from quadriga.report import text

Records = Mapping[str, Any]


def sentence(records: Records) -> str:
    """What came out, for a person who reads nothing else."""
    result = records["result"]
    if result["status"] == "verified" and result["winner"]:
        return _verified(result["winner"], str(records["floor"].get("text", ""))) + _handed_over(result)
    if result["status"] in ("infeasible", "unmeasured"):
        return _nothing(records)
    if result["status"] == "interrupted":
        return "The study was interrupted; the same command goes on where it stopped."
    error = result.get("error") or {}
    reason = error.get("message") or "no winner could be verified"
    return f"The study failed: {reason}" + (f"; {error['remedy']}." if error.get("remedy") else ".")


def _verified(best: Mapping[str, Any], floor: str) -> str:
    quality = best["quality"]
    unit = quality["unit"]
    speeds = [_faster(best, name) for name in ("lossless_export", "eager")]
    told = "is " + ("; ".join(s for s in speeds if s) or "of the same speed")
    if speed := best.get("train_speed"):  # what was asked for comes first, and alone
        told = f"trains in {text.speed(speed)} less processor time (interval {text.interval(speed)})"
    return (
        f"Verified: the optimized model {told}; it takes {text.ratio(best['bytes_ratio'])} the bytes, and its "
        f"{quality['metric']} on {text.number(quality['n'])} unseen examples is {text.quality(quality['value'], unit)} against "
        f"{text.quality(quality['baseline'], unit)} (difference {text.signed(quality['difference'], unit)}, "
        f"at least {text.signed(quality['low'], unit)}{f'; the floor is {floor}' * bool(floor)})."
    )


def _faster(best: Mapping[str, Any], name: str) -> str:
    """How fast it is against one opponent, at every batch size that was timed."""
    timings = best["latency_ratio"].get(name) or {}
    known = {batch: value for batch, value in timings.items() if value.get("verdict") != text.UNMEASURED}
    told = [f"{text.ratio(v['value'])} at batch {batch}{_bounds(v)}" for batch, v in known.items()]
    missing = [batch for batch in timings if batch not in known]
    parts = [f"{' and '.join(told)} as fast as {text.as_fast_as(name)}"] if told else []
    parts += [f"not measured well enough against {text.as_fast_as(name)} at batch {' and '.join(missing)}"] if missing else []
    return ", ".join(parts)


def _bounds(value: Mapping[str, Any]) -> str:
    return f" {text.interval(value)}" if value.get("low") is not None else ""


def _nothing(records: Records) -> str:
    """Why there is no winner: nothing can run, nothing was measured well enough, nothing was scored, or nothing was better."""
    result = records["result"]
    miss = result.get("nearest_miss") or {}
    tried = result.get("tried") or {}
    after = f" The nearest miss: {miss['why']}." if miss.get("why") else ""
    if result["status"] == "unmeasured":
        why = str(miss.get("why") or "the machine was too busy")
        return f"{why[:1].upper()}{why[1:]}. {_handed_back(result)}"
    if result.get("reason"):
        remedy = f"; {result['remedy']}" if result.get("remedy") else ""
        return f"Infeasible: {result['reason']}{remedy}. {_handed_back(result)}"
    if tried and not tried.get("scored"):
        told = f"{tried.get('costed', 0)} candidates were costed and the quality of none was measured"
        return f"Undecided: {told} within the budget; give a larger --budget. {_handed_back(result)}"
    floor = records["floor"].get("text")
    above = f" above the floor of {floor}" if floor else ""
    return f"Infeasible: nothing beat the baseline{above}. {_handed_back(result)}{after}"


def _handed_back(result: Mapping[str, Any]) -> str:
    return "The unchanged baseline is handed back." if result.get("artifact") else f"There is no artifact{_because(result)}."


def _handed_over(result: Mapping[str, Any]) -> str:
    return "" if result.get("artifact") else f" There is no artifact{_because(result)}."


def _because(result: Mapping[str, Any]) -> str:
    return f": {result['no_artifact']}" if result.get("no_artifact") else ""


def _training(cost: Mapping[str, Any]) -> str:
    words = {"samples": "samples", "flops": "FLOPs"}
    return ", ".join(f"{text.ratio(cost[k])} the {word}" for k, word in words.items() if cost.get(k) is not None)


def _training_figure(best: Mapping[str, Any]) -> tuple[str, str, str]:
    detail = _training(best.get("train_cost") or {})
    if speed := best.get("train_speed"):  # it was the objective: timed in turn, with an interval
        return text.speed(speed), "less processor time of training", f"{text.interval(speed)}; {detail}"
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
            figures.append((text.speed(value), f"as fast as {text.as_fast_as(name)}, batch {batch}", detail))
    quality = best["quality"]
    bound = f"at least {text.signed(quality['low'], quality['unit'])}, n = {text.number(quality['n'])}"
    figures.append((text.signed(quality["difference"], quality["unit"]), quality["metric"], bound))
    figures.append((text.ratio(best["bytes_ratio"]), "the bytes", f"{text.ratio(best['parameters_ratio'])} the parameters"))
    figures.append(_training_figure(best))
    return tuple(figures)
