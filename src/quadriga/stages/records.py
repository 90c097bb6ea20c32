"""From the study's state to result.json and records.json."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from statistics import geometric_mean
from typing import Any

from quadriga.core.trial import Status
from quadriga.report.schema import VERSION
from quadriga.search.allocate import SAFE
from quadriga.search.pareto import front
from quadriga.stages.ablate import Ablation
from quadriga.stages.conclude import OPPONENTS, Conclusion, Finalist
from quadriga.stages.explore import Explorer
from quadriga.stages.handover import Kept
from quadriga.stages.portfolio import left_out
from quadriga.stages.profile import profile_of
from quadriga.stages.state import LEVEL, NothingToFind, Study

QUALITY = ("metric", "unit", "value", "baseline", "difference", "low", "n", "disagreement", "certificate")
COSTS = {
    "samples": "samples",
    "seconds": "seconds",
    "cpu_seconds": "cpu_seconds",
    "flops": "train_flops",
}  # in the record, in a trial's values


def result(study: Study, conclusion: Conclusion, kept: Kept | None = None, end: NothingToFind | None = None) -> dict[str, Any]:
    """The one object that `run --json` prints last, also result.json.

    Args:
        kept: what was handed over; None while it is being written, as its evidence.
        end: why the study ended before it had begun.
    """
    winner = conclusion.winner
    told = {"reason": end.reason, "remedy": end.remedy} if end else {}
    missing = {"no_artifact": end.reason if end else kept.why_not} if kept is not None and kept.folder is None else {}
    return {
        "status": conclusion.status,
        "workload": study.workload.name,
        "seconds": round(study.budget.spent, 1),
        "baseline": _baseline(study, conclusion),
        "winner": _winner(study, winner, conclusion) if winner else None,
        "ablation": ablation_rows(study, winner.ablation) if winner and winner.ablation else [],
        "artifact": "artifact" if kept is None or kept.folder is not None else None,
        "report": "report.html",
        "nearest_miss": None if winner else _nearest_miss(conclusion),
        "tried": _tried(study),
        **told,
        **missing,
    }


def _tried(study: Study) -> dict[str, int]:
    """Candidates whose cost was measured, that were trained, and whose quality was measured."""
    searched = study.stage("search")
    scored = [t for t in searched if t.ok]
    trained = [t for t in searched if t.values.get("samples", 0.0) > 0]
    return {"costed": sum(t.ok for t in study.stage("cost")), "trained": len(trained), "scored": len(scored)}


def _baseline(study: Study, conclusion: Conclusion | None) -> dict[str, Any] | None:
    if not study.stage("baseline"):
        return None
    base, latency = study.baseline.values, {}
    if conclusion and conclusion.timings:
        for batch in conclusion.timings.batches:
            measured = conclusion.timings.latency(batch, "eager") if "eager" in conclusion.timings[batch] else None
            if measured is not None:
                latency[str(batch)] = measured.value
    on_test = conclusion.baseline_quality if conclusion else None
    quality = base["quality"] if on_test is None else on_test
    return {
        "quality": quality,
        "quality_split": "val" if on_test is None else "test",
        "guess": study.baseline.info.get("guess"),
        "latency": latency,
        "peak_memory": _memory(conclusion, "eager"),
        "bytes": int(base["bytes"]),
        "parameters": int(base["parameters"]),
        "train_seconds": base["seconds"],
        "train_samples": int(base["samples"]),
        "train_flops": base.get("train_flops"),
    }


def _memory(conclusion: Conclusion | None, arm: str) -> int | None:
    """Peak resident bytes that an arm adds to a process that has imported torch; None where it was not measured."""
    return (conclusion.timings.growth.get(arm) or None) if conclusion and conclusion.timings else None


def _winner(study: Study, winner: Finalist, conclusion: Conclusion) -> dict[str, Any]:
    assert winner.trial is not None and winner.quality is not None and winner.ratios is not None
    base, mine, quality = study.baseline.values, winner.trial.values, winner.quality
    arm = next(f"final-{i}" for i, f in enumerate(conclusion.finalists) if f is winner)
    cost = {k: _over(mine.get(name), base.get(name)) for k, name in COSTS.items()}
    return {
        "recipe": winner.recipe.plain(),
        "families": families(study, winner),
        "quality": {k: quality.get(k) for k in QUALITY},
        "quality_level": quality["level"],
        "latency_ratio": winner.ratios,
        "bytes_ratio": mine["bytes"] / base["bytes"],
        "parameters_ratio": mine["parameters"] / base["parameters"],
        "memory_ratio": _over(_memory(conclusion, arm), _memory(conclusion, "eager")),
        "train_cost_ratio": 1 / winner.training["value"] if winner.training else cost["seconds"],
        "train_speed": winner.training,
        "train_cost": cost,
    }


def _over(mine: float | None, base: float | None) -> float | None:
    """winner ÷ baseline; 0 where neither costs anything, None where only the baseline costs nothing or one is unknown."""
    if mine is None or base is None:
        return None
    return mine / base if base else (None if mine else 0.0)


def families(study: Study, winner: Finalist) -> list[str]:
    """Families whose methods are in the winner, in the order of the design; the baseline's own training does not count."""
    own = winner.recipe.steps[study.space.fixed(winner.recipe) :]
    used = {study.space.cards[s.method]["family"] for s in own if not s.is_train}
    return [f for f in ("structure", "training", "optimizer", "hardware") if f in used]


def _nearest_miss(conclusion: Conclusion | None) -> dict[str, Any] | None:
    if conclusion is None or not conclusion.finalists:
        return None
    scored = [f for f in conclusion.finalists if f.quality] or conclusion.finalists
    nearest = max(scored, key=lambda f: f.quality["low"] if f.quality else -math.inf)
    return {"recipe": nearest.recipe.plain(), "why": nearest.why_not, "quality": nearest.quality}


def ablation_rows(study: Study, ablation: Ablation) -> list[dict[str, Any]]:
    """As the report shows them."""
    rows = []
    for row in ablation.rows:
        latency = row.latency_ratio or {"value": 1.0, "low": None, "high": None, "verdict": "unchanged"}
        rows.append(
            {
                "step": row.step, "method": row.method, "family": row.family, "quality_gain": row.quality_gain,
                "latency_ratio": latency["value"], "latency_interval": latency, "bytes_ratio": row.bytes_ratio,
                "train_cost_ratio": row.train_cost_ratio, "pays": row.pays, "why": row.why,
            }
        )  # fmt: skip
    return rows


def records(
    study: Study,
    outcome: Mapping[str, Any],
    explorer: Explorer | None,
    conclusion: Conclusion | None,
    smallest_floor: float | None,
) -> dict[str, Any]:
    """Everything that the report shows."""
    workload, options = study.workload, study.options
    base = study.baseline.values if study.stage("baseline") else {}
    return {
        "version": VERSION,
        "command": options.command,
        "result": dict(outcome),
        "workload": {
            "name": workload.name, "data": dict(workload.data_note), "metric": workload.metric.name,
            "unit": workload.metric.unit, "batch": workload.batch_size,
            "splits": {n: len(s) for n in ("train", "val", "test") if (s := getattr(workload, n)) is not None},
        },
        "baseline": outcome.get("baseline") or {},
        "floor": {
            "text": str(options.floor), "smallest_provable": smallest_floor,
            "margin": options.floor.margin(base["quality"]) if base else None, "level": LEVEL,
        },
        "budget": {
            "seconds": options.budget, "spent": study.budget.spent,
            "phases": [{"name": n, "seconds": s} for n, s in study.budget.phases.items()],
        },
        "profile": profile_of(study) or {},
        "trials": [t.plain() for t in study.trials],
        "pareto": pareto(study, explorer, conclusion),
        "ablation": outcome.get("ablation", []),
        "opponents": opponents(conclusion),
        "refused": refused(study),
        "not_allowed": not_allowed(study, explorer, conclusion),
        "notes": list(dict.fromkeys([*study.notes, *left_out(study)])),
        "environment": dict(study.machine),
        "seeds": [options.seed],
        "timing": _timing(conclusion),
        "splits_opened": [{**row, "by": ", ".join(row["by"])} for row in study.store.get("opened", [])],
    }  # fmt: skip


def _timing(conclusion: Conclusion | None) -> dict[str, Any]:
    """How the verification was timed, and the share of the cores that others took in each restart."""
    found = conclusion.timings if conclusion else None
    if not found:
        return {}
    return {"restarts": found.restarts, "planned": found.planned, "others": found.others, "left_out": found.left_out}


def pareto(study: Study, explorer: Explorer | None, conclusion: Conclusion | None) -> list[dict[str, Any]]:
    """Every candidate that was trained, at its longest; on val, against eager."""
    if explorer is None:
        return []
    rows = []
    base = study.baseline.values
    for candidate in explorer.candidates.values():
        cost = explorer.costs.get(study.space.cost_part(candidate.recipe).hash)
        if not candidate.scores or cost is None:
            continue
        rung = max(candidate.scores)
        score = candidate.scores[rung]
        rows.append(
            {
                "name": candidate.recipe.name or candidate.recipe.hash, "hash": candidate.recipe.hash,
                "quality_difference": score.difference, "latency_ratio": geometric_mean(study.speed_ups(cost.values)),
                "bytes_ratio": cost.values["bytes"] / base["bytes"], "rung": rung,
                "qualified": explorer.allocator.chance(candidate) >= SAFE,
            }
        )  # fmt: skip
    won = _winning_candidate(study, conclusion)
    for row, best in zip(rows, front(rows, ("quality_difference", "latency_ratio")), strict=True):
        row["on_front"] = best
        row["winner"] = row["hash"] == won
    return rows


def _winning_candidate(study: Study, conclusion: Conclusion | None) -> str | None:
    """Hash of the candidate that the winner came from, before its ablation."""
    if conclusion is None or conclusion.winner is None:
        return None
    place = next(i for i, f in enumerate(conclusion.finalists) if f is conclusion.winner)
    return str(study.store.get("finalists")[place]["candidate"])


def opponents(conclusion: Conclusion | None) -> list[dict[str, Any]]:
    """Each opponent with the winner's (else the first finalist's) ratios against it."""
    if conclusion is None or not conclusion.finalists:
        return []
    shown = conclusion.winner or conclusion.finalists[0]
    rows = []
    for name, about in OPPONENTS.items():
        latency = (shown.ratios or {}).get(name, {})
        control = conclusion.controls.get(name)
        if latency or control:
            quality = control["value"] if control else conclusion.baseline_quality
            rows.append(
                {"name": name, "about": about, "latency": latency, "quality": quality, "bytes": None, "control": control}
            )
    return rows


def refused(study: Study) -> list[dict[str, Any]]:
    """Refusals and failures, counted by reason."""
    bad = [t for t in study.trials if not t.ok and t.stage != "pace"]
    counts = Counter((t.reason or str(t.status), str(t.status)) for t in bad)
    rows = []
    for (reason, status), count in counts.most_common():
        trial = next(t for t in bad if (t.reason or str(t.status)) == reason)
        rows.append(
            {"method": trial.recipe.name or str(trial.recipe), "reason": reason, "remedy": trial.info.get("remedy", ""),
             "status": status, "count": count}
        )  # fmt: skip
    return rows


def not_allowed(study: Study, explorer: Explorer | None, conclusion: Conclusion | None) -> list[str]:
    """What the budget left undone."""
    rows = []
    if explorer is not None:
        open_ones = [c for c in explorer.candidates.values() if not c.dead and c.gain > 0 and not c.scores]
        if open_ones:
            rows.append(f"{len(open_ones)} costed candidates were not trained")
        if explorer.queue:
            rows.append(f"{len(explorer.queue)} recipes were not costed")
    if not study.stage("profile"):
        rows.append("the profile of the unchanged model, layer by layer")
    timed_out = sum(t.status is Status.TIMED_OUT for t in study.trials)
    if timed_out:
        rows.append(f"{timed_out} trials were cut when the time for their stage was over")
    for finalist in conclusion.finalists if conclusion else []:
        for row in finalist.ablation.rows if finalist.ablation else []:
            if row.pays is None and "budget" in row.why:
                rows.append(f"the ablation of {row.method}")
    if conclusion and conclusion.finalists and "same_training" not in conclusion.controls:
        rows.append("the original network under the winner's training")
    return rows
