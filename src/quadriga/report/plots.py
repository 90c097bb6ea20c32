"""The report's plots but the roofline, from plain data to inline SVG."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from quadriga.report import text
from quadriga.report.svg import Canvas, Scale, linear_scale, ratio_scale, times

WIDTH = 760.0
CLOCK = (1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14400, 43200, 86400)  # tick distances in seconds
Rows = Sequence[Mapping[str, Any]]


def pareto(points: Rows, margin: float | None, unit: str, style: str = "") -> str:
    """Speed (log scale, right is faster) against quality difference; area shows bytes; below the dashed floor nothing counts.

    Points far below the floor are drawn as triangles on the lower edge, so that they do not flatten the rest.
    """
    points = drawable(points)
    canvas = Canvas(WIDTH, 430, "Pareto front: latency against quality")
    x = ratio_scale([p["latency_ratio"] for p in points], 76, WIDTH - 24)
    qualities = [p["quality_difference"] for p in points if p.get("qualified")] + [0.0] + ([-margin] if margin else [])
    worst = min(qualities) - max(1.5 * (max(qualities) - min(qualities)), abs(margin or 0.0))
    y = linear_scale([max(p["quality_difference"], worst) for p in points] + qualities, 372, 22)
    _axes(canvas, x, y, "speed against eager PyTorch →", f"quality against the baseline{f', {unit}' * bool(unit)}")
    if margin is not None:
        bottom = y(-margin)
        canvas.add("rect", x=76, y=bottom, width=WIDTH - 100, height=max(372 - bottom, 0), kind="below")
        canvas.line(76, bottom, WIDTH - 24, bottom, "floor")
        canvas.text(WIDTH - 28, bottom + 15, f"floor {text.signed(-margin, unit)}", "tick", "end")
    front = sorted((p for p in points if p.get("on_front")), key=lambda p: p["latency_ratio"])
    _staircase(canvas, front, x, y)
    for point in sorted(points, key=lambda p: (bool(p.get("winner")), bool(p.get("on_front")))):
        _mark(canvas, point, x, y, unit)
    _baseline(canvas, x(1.0), y(0.0))
    for place, point in enumerate(front, 1):
        label = f"{place} winner" if point.get("winner") else str(place)
        canvas.text(x(point["latency_ratio"]), y(point["quality_difference"]) - _radius(point) - 4, label, "strong", "middle")
    return str(canvas.markup(style))


def drawable(points: Rows) -> list[Mapping[str, Any]]:
    """The points that have both numbers; a study may fail to measure one."""
    return [p for p in points if (p.get("latency_ratio") or 0) > 0 and p.get("quality_difference") is not None]


def _axes(canvas: Canvas, x: Scale, y: Scale, below: str, left: str) -> None:
    for tick in x.ticks():
        canvas.line(x(tick), y.end, x(tick), y.start, "unity" if tick == 1 else "grid")
        canvas.text(x(tick), y.start + 18, times(tick), "tick", "middle")
    for tick in y.ticks():
        canvas.line(x.start, y(tick), x.end, y(tick), "unity" if tick == 0 else "grid")
        canvas.text(x.start - 8, y(tick) + 4, text.signed(tick), "tick", "end")
    canvas.text(x.end, y.start + 40, below, "axis", "end")
    canvas.text(10, 12, left, "axis")


def _staircase(canvas: Canvas, front: Rows, x: Scale, y: Scale) -> None:
    if len(front) < 2:
        return
    spots = [(x(p["latency_ratio"]), y(p["quality_difference"])) for p in front]
    path = f"M{spots[0][0]:.1f} {spots[0][1]:.1f}" + "".join(f"V{b:.1f}H{a:.1f}V{b:.1f}" for a, b in spots[1:])
    canvas.add("path", d=path, kind="stairs")


def _radius(point: Mapping[str, Any]) -> float:
    return min(max(14.0 * math.sqrt(max(point.get("bytes_ratio") or 0.0, 0.0)), 3.5), 16.0)


def _mark(canvas: Canvas, point: Mapping[str, Any], x: Scale, y: Scale, unit: str) -> None:
    place, height, r = x(point["latency_ratio"]), y(point["quality_difference"]), _radius(point)
    hover = (
        f"{point['name']}: {text.ratio(point['latency_ratio'])} faster, {text.signed(point['quality_difference'], unit)}, "
        f"{text.ratio(point.get('bytes_ratio'))} bytes"
    )
    kinds = [k for k in ("winner", "on_front", "qualified") if point.get(k)]
    kind = f"dot {kinds[0] if kinds else 'missed'}"
    if point["quality_difference"] < y.low:
        canvas.add("path", hover, d=f"M{place - 5:.1f} {height - 9:.1f}h10l-5 8z", kind=kind)
    else:
        canvas.add("circle", hover, cx=place, cy=height, r=r, kind=kind)


def _baseline(canvas: Canvas, place: float, height: float) -> None:
    canvas.add("circle", "the baseline in eager PyTorch", cx=place, cy=height, r=14, kind="dot base")
    canvas.text(place + 14, height + 22, "baseline", "strong")


def forest(opponents: Rows) -> str:
    """The winner's speed against each opponent and batch: the estimate, its interval, and the 3 % band of equivalence."""
    rows = [(o, batch, r) for o in opponents for batch, r in o["latency"].items() if r.get("value")]
    drawn = [r for _, _, r in rows if r.get("verdict") != text.UNMEASURED]
    canvas = Canvas(WIDTH, 54 + 26.0 * len(rows) + 10 * len(opponents), "Winner against each opponent, with intervals")
    edges = [v for r in drawn for v in (r["value"], r.get("low"), r.get("high")) if v] or [1.0]
    x = ratio_scale(edges, 300, WIDTH - 150)
    bottom = canvas.height - 34
    canvas.add("rect", x=x(1 / 1.03), y=8, width=x(1.03) - x(1 / 1.03), height=bottom - 8, kind="band")
    for tick in x.ticks(5):
        canvas.line(x(tick), 8, x(tick), bottom, "unity" if tick == 1 else "grid")
        canvas.text(x(tick), bottom + 17, times(tick), "tick", "middle")
    y, last = 0.0, None
    for item, batch, value in rows:
        y += 26 + (10 if last is not item else 0)
        if last is not item:
            canvas.text(4, y, text.opponent(item["name"]), "strong", title=item.get("about") or "")
        last = item
        canvas.text(286, y, f"batch {batch}", "tick", "end")
        kind = value.get("verdict") or "undecided"
        if kind == text.UNMEASURED:
            canvas.text(WIDTH - 140, y, text.speed(value), "tick")
            continue
        if value.get("low") is not None and value.get("high") is not None:
            canvas.line(x(value["low"]), y - 4, x(value["high"]), y - 4, f"whisker {kind}")
        canvas.add("circle", kind, cx=x(value["value"]), cy=y - 4, r=5, kind=f"dot {kind}")
        canvas.text(WIDTH - 140, y, f"{text.ratio(value['value'])} {text.interval(value)}".replace(" –", ""), "tick")
    return str(canvas.markup())


Bar = tuple[str, str, float, float]  # step, family, (time without it) / (time with it), quality it gives


def waterfall(bars: Sequence[Bar], latency: float | None, quality: float | None, unit: str) -> str:
    """What each step gives: from the baseline to the winner, in speed (log scale) and in quality.

    A bar is the winner without that step against the winner. Methods act on each other, so their bars do not add up to the
    whole (`latency`, `quality`; the sum where it is None); the rest is drawn as a bar of its own, "acting together".
    """
    canvas = Canvas(WIDTH, 72 + 28.0 * (len(bars) + 2), "What each step of the winner gives")
    speeds, gains = [math.log(max(b[2], 1e-9)) for b in bars], [b[3] for b in bars]
    total = math.log(latency) if latency else sum(speeds)
    whole = quality if quality is not None else sum(gains)
    names = [b[:2] for b in bars] + [("acting together", "joint"), ("winner", "total")]
    fast = _spans([*speeds, total - sum(speeds)], total)
    good = _spans([*gains, whole - sum(gains)], whole)
    x = ratio_scale([math.exp(v) for pair in fast for v in pair], 250, 490)
    q = linear_scale([v for pair in good for v in pair], 540, WIDTH - 20)
    _panel(canvas, x, "speed", times)
    _panel(canvas, q, f"quality{f', {unit}' * bool(unit)}", text.signed)
    for place, ((name, family), (a, b), (c, d)) in enumerate(zip(names, fast, good, strict=True)):
        y = 40 + 28 * place
        canvas.text(4, y + 13, name if len(name) <= 34 else name[:33] + "…", "tick", title=name)
        canvas.bar(x(math.exp(a)), x(math.exp(b)), y, 17, f"bar {family}", f"{name}: {text.ratio(math.exp(b - a))}")
        canvas.bar(q(c), q(d), y, 17, f"bar {family}", f"{name}: {text.signed(d - c, unit)}")
    return str(canvas.markup())


def _spans(parts: Sequence[float], total: float) -> list[tuple[float, float]]:
    """Floating bars end to end, then the total from zero."""
    spans, at = [], 0.0
    for part in parts:
        spans.append((at, at + part))
        at += part
    return [*spans, (0.0, total)]


def _panel(canvas: Canvas, scale: Scale, title: str, write: Any) -> None:
    bottom = canvas.height - 26
    for tick in scale.ticks(3):
        canvas.line(scale(tick), 28, scale(tick), bottom, "unity" if tick == (1 if scale.log else 0) else "grid")
        canvas.text(scale(tick), bottom + 17, write(tick), "tick", "middle")
    canvas.text((scale.start + scale.end) / 2, 16, title, "axis", "middle")


def budget(phases: Rows, allowed: float | None) -> str:
    """Where the time went: one bar a phase, one after another, up to the budget."""
    canvas = Canvas(WIDTH, 34 + 24.0 * len(phases), "Use of the budget over time")
    spent = sum(p["seconds"] for p in phases)
    x = Scale(0.0, max(spent, allowed or 0.0, 1e-9) * 1.02, 190, WIDTH - 90)
    bottom, at = canvas.height - 24, 0.0
    size = next((s for s in CLOCK if s * 6 >= x.high), CLOCK[-1])
    for tick in range(0, math.floor(x.high) + 1, size):
        canvas.line(x(tick), 4, x(tick), bottom, "grid")
        canvas.text(x(tick), bottom + 17, text.seconds(tick), "tick", "middle")
    for place, phase in enumerate(phases):
        y, end = 6 + 24.0 * place, at + phase["seconds"]
        canvas.text(4, y + 13, phase["name"], "tick")
        canvas.bar(x(at), x(end), y, 16, "bar phase", f"{phase['name']}: {text.seconds(phase['seconds'])}")
        canvas.text(x(end) + 6, y + 13, text.seconds(phase["seconds"]), "tick")
        at = end
    if allowed:
        canvas.line(x(allowed), 4, x(allowed), bottom, "floor")
    return str(canvas.markup())
