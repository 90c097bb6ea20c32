"""The report's three plots of evidence, each with its table: opponents, Pareto front, ablation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from quadriga.report import plots, text
from quadriga.report.document import Block, Bullets, Figure, Section, Table, Text

Records = Mapping[str, Any]


def against(records: Records) -> Section:
    """The winner against every strong opponent, with intervals."""
    opponents = [o for o in records["opponents"] if o.get("latency") or o.get("quality") is not None]
    timed = [o for o in opponents if o.get("latency")]
    unit = records["workload"].get("unit", "")
    rows = []
    for item in opponents:
        for batch, value in (item.get("latency") or {"": None}).items():
            rows.append(
                (
                    text.opponent(item["name"]),
                    str(batch) or text.NONE,
                    text.speed(value) if value else text.NONE,
                    text.interval(value),
                    (value or {}).get("verdict") or text.NONE,
                    text.quality(item.get("quality"), unit),
                    text.size(item.get("bytes")),
                )
            )
    columns = ("opponent", "batch", "speed-up", "interval", "the winner is", "its quality", "its bytes")
    table = Table(columns, tuple(rows), numeric=("batch", "speed-up", "interval", "its quality", "its bytes"))
    about = tuple(f"{text.opponent(o['name'])}: {o['about']}{_control(o, unit)}" for o in opponents if o.get("about"))
    levels = [v["level"] for o in timed for v in o["latency"].values() if v.get("level")]
    sure = f" Intervals hold at {text.percent(min(levels))}." if levels else ""
    caption = f"How many times faster the winner is.{sure} The band is ±3 %, within which two are called equivalent."
    blocks: list[Block] = [Figure("forest", plots.forest(timed), caption)] if timed else []
    blocks += [table] if rows else []
    return Section("opponents", "Against each opponent", (*blocks, Bullets(about)) if about else tuple(blocks))


def _control(opponent: Mapping[str, Any], unit: str) -> str:
    """How a trained control compares with the baseline on test."""
    found = opponent.get("control") or {}
    if found.get("difference") is None:
        return ""
    return f"; {text.signed(found['difference'], unit)} against the baseline, at least {text.signed(found.get('low'), unit)}"


def front(records: Records) -> Section:
    """The Pareto front of the search."""
    unit = records["workload"].get("unit", "")
    points = plots.drawable(records["pareto"])
    if not points:
        return Section("pareto", "Pareto front", ())
    chosen = sorted((p for p in points if p.get("on_front")), key=lambda p: p["latency_ratio"])
    rows = tuple(
        (
            str(i),
            f"{p['name']} ({p['hash']})",
            text.ratio(p["latency_ratio"]),
            text.signed(p["quality_difference"], unit),
            text.ratio(p["bytes_ratio"]),
            "yes" if p.get("qualified") else "no",
        )
        for i, p in enumerate(chosen, 1)
    )
    columns = ("", "recipe", "speed-up", "quality", "bytes", "qualifies")
    marked = tuple(i for i, p in enumerate(chosen) if p.get("winner"))
    caption = (
        "Every trained candidate as the search saw it, on val; speed is the geometric mean over batch sizes. Areas show bytes."
    )
    figure = Figure("pareto", plots.pareto(points, records["floor"].get("margin"), unit), caption)
    return Section(
        "pareto", "Pareto front", (figure, Table(columns, rows, ("", "speed-up", "quality", "bytes"), marked=marked))
    )


def steps(records: Records) -> Section:
    """The ablation: what each step gives, and what was taken out because it does not pay."""
    rows, best, unit = records["ablation"], records["result"]["winner"], records["workload"].get("unit", "")
    if not rows:
        return Section("ablation", "What each method gives", ())
    kept = [r for r in rows if r.get("pays")]
    speed = (best or {}).get("latency_ratio", {}).get("eager", {})
    batch = str(records.get("ablation_batch") or next(iter(speed), ""))
    latency, quality = (speed.get(batch) or {}).get("value"), (best or {}).get("quality", {}).get("difference")
    bars = [(step_name(r), r["family"], factor(r.get("latency_ratio")) or 1.0, r.get("quality_gain") or 0.0) for r in kept]
    caption = "From the baseline in eager PyTorch to the winner. Methods act on each other: bars do not add up to the whole."
    figure = (Figure("waterfall", plots.waterfall(bars, latency, quality, unit), caption),) if bars else ()
    columns = ("step", "family", "quality", "time", "bytes", "training cost", "pays", "why")
    cells = tuple(
        (
            step_name(r),
            r["family"],
            text.signed(r.get("quality_gain"), unit),
            f"{text.ratio(factor(r.get('latency_ratio')))} {text.interval(r.get('latency_interval'))}".removesuffix(
                f" {text.NONE}"
            ),
            *(text.ratio(factor(r.get(k))) for k in ("bytes_ratio", "train_cost_ratio")),
            {True: "yes", False: "no, taken out", None: "not measured"}[r.get("pays")],
            r.get("why") or text.NONE,
        )
        for r in rows
    )
    note = Text("On val: quality gained by the step; time, bytes and training cost without it over those with it.", "note")
    return Section("ablation", "What each method gives", (*figure, Table(columns, cells, numeric=columns[2:6]), note))


def step_name(row: Mapping[str, Any]) -> str:
    """A row's step with its fields, or the method's name."""
    return str(row.get("step") or row["method"])


def factor(value: Mapping[str, Any] | float | None) -> float | None:
    """A ratio's estimate, given with or without an interval."""
    return value.get("value") if isinstance(value, Mapping) else value
