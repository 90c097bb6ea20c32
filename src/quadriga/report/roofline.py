"""The roofline plot: where every layer stands below what the machine can do, by its operations per byte."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from quadriga.core.roofline import WIDTHS, product_rate
from quadriga.report import text
from quadriga.report.svg import Canvas, Scale

WIDTH, HEIGHT = 760.0, 420.0
LEFT, RIGHT, TOP, BOTTOM = 64.0, WIDTH - 118, 24.0, HEIGHT - 52
LABELS = 8  # at most; the others are told on hover
LETTER = 6.4  # units that a letter is wide, on average, at 12 units of height
Rows = Sequence[Mapping[str, Any]]
Box = tuple[float, float, float, float]  # left, top, right, bottom
Spot = tuple[float, float]
Disc = tuple[float, float, float]  # its middle and its radius


def roofline(rows: Rows, ceilings: Mapping[str, Any], style: str = "") -> str:
    """Operations a second against operations per byte, both logarithmic; a disc's area is its layer's share of the time.

    Args:
        rows: of one batch, as `measure.roofline.profile` gives them; those without operations or bytes are left out.
        ceilings: {"flops", "bytes"} a second, perhaps with products and copies; each known product is a roof.
        style: for a file of its own.
    """
    kept = drawable(rows)
    canvas = Canvas(WIDTH, HEIGHT, "Roofline: operations a second against operations per byte, one disc a layer")
    roofs = {kind: rate for kind in WIDTHS if (rate := product_rate(ceilings, kind))}
    x, y = _scales(kept, roofs, ceilings)
    _grid(canvas, x, y)
    taken = _roofs(canvas, roofs, ceilings, x, y)
    for row in sorted(kept, key=lambda r: -r["share"]):  # small discs lie on large ones
        hover = (
            f"{row['layer']}: {text.percent(row['share'])} of the time, {text.operations(_speed(row))} a second, "
            f"{text.number(_intensity(row))} FLOP a byte, {text.percent(row.get('fraction'))} of the roofline"
        )
        middle, height, r = _disc(row, x, y)
        canvas.add("circle", hover, cx=middle, cy=height, r=r, kind="dot")
    _labels(canvas, kept, x, y, taken)
    return str(canvas.markup(style))


def drawable(rows: Rows) -> list[Mapping[str, Any]]:
    """The layers that have a place on logarithmic axes: with operations, bytes and time.

    Example:
        >>> drawable([{"layer": "relu", "flops": 0, "bytes": 8, "seconds": 1.0}])
        []
    """
    return [row for row in rows if row["flops"] and row["bytes"] and row["seconds"] > 0]


def _intensity(row: Mapping[str, Any]) -> float:
    return float(row["flops"] / row["bytes"])


def _speed(row: Mapping[str, Any]) -> float:
    return float(row["flops"] / row["seconds"])


def _radius(row: Mapping[str, Any]) -> float:
    return 3 + 17 * math.sqrt(min(max(row["share"], 0.0), 1.0))


def _scales(rows: Rows, roofs: Mapping[str, float], ceilings: Mapping[str, Any]) -> tuple[Scale, Scale]:
    """Axes that hold every layer, every roof and the edge where each roof begins."""
    edges = [rate / ceilings["bytes"] for rate in roofs.values()]
    across = [*map(_intensity, rows), *edges]
    up = [*map(_speed, rows), *roofs.values()]
    x = Scale(min(across) / 3, max(across) * 2.5, LEFT, RIGHT, log=True)
    return x, Scale(min(up) / 2.5, max(up) * 1.6, BOTTOM, TOP, log=True)


def _grid(canvas: Canvas, x: Scale, y: Scale) -> None:
    for tick in x.decades():
        canvas.line(x(tick), TOP, x(tick), BOTTOM, "grid")
        canvas.text(x(tick), BOTTOM + 18, f"{tick:g}", "tick", "middle")
    for tick in y.decades():
        canvas.line(LEFT, y(tick), RIGHT, y(tick), "grid")
        canvas.text(LEFT - 8, y(tick) + 4, text.operations(tick).removesuffix("FLOP").strip(), "tick", "end")
    canvas.text(RIGHT, BOTTOM + 40, "float32 operations per byte moved →", "axis", "end")
    canvas.text(10, 12, "operations a second", "axis")


def _roofs(canvas: Canvas, roofs: Mapping[str, float], ceilings: Mapping[str, Any], x: Scale, y: Scale) -> list[Box]:
    """Two slopes, of memory and of the fastest cache, and a level line for every product; the boxes that they fill."""
    slopes = {"memory": ceilings["bytes"]}
    fastest = max((rate for _, rate in ceilings.get("copies") or ()), default=0.0)
    if fastest > 1.2 * ceilings["bytes"]:
        slopes["cache"] = fastest
    taken: list[Box] = []
    top, last = max(roofs.values()), math.inf
    for name, rate in slopes.items():
        low, high = max(x.low, y.low / rate), min(x.high, top / rate)
        ends = (x(low), y(low * rate)), (x(high), y(high * rate))
        taken += _slope(canvas, f"{name} {text.size(rate)} a second", name, ends, [y(r) for r in roofs.values()])
    for kind, rate in sorted(roofs.items(), key=lambda pair: pair[1]):
        start = max(rate / max(slopes.values()), x.low)
        canvas.line(x(start), y(rate), RIGHT, y(rate), f"roof {kind}")
        taken.append((x(start), y(rate) - 2, RIGHT, y(rate) + 2))
        last = min(y(rate) + 4, last - 14)  # names of equal roofs stand above each other
        canvas.text(RIGHT + 6, last, f"{kind} {text.operations(rate).replace('FLOP', '')}".strip(), "strong")
    return taken


def _slope(canvas: Canvas, told: str, kind: str, ends: tuple[Spot, Spot], levels: Sequence[float]) -> list[Box]:
    """A line with its name along it, where the name crosses no level if there is such a place; the boxes that both fill."""
    a, b = ends
    canvas.line(*a, *b, f"roof {kind}")
    turn, reach = math.atan2(b[1] - a[1], b[0] - a[0]), LETTER * len(told) / 2
    dx, dy = reach * math.cos(turn), reach * math.sin(turn)
    middles = [_between(a, b, share) for share in (0.72, 0.6, 0.5, 0.4, 0.3, 0.2, 0.8)]
    clear = (m for m in middles if not any(m[1] - abs(dy) - 18 < level < m[1] + abs(dy) for level in levels))
    x, y = next(clear, middles[0])
    place = f"rotate({math.degrees(turn):.1f} {x:.1f} {y:.1f})"
    canvas.add("text", "", told, x=x, y=y - 5, text_anchor="middle", kind="tick", transform=place)
    name = [_between((x - dx, y - dy - 9), (x + dx, y + dy - 9), k / 20) for k in range(21)]
    return [_square((*spot, 4.0)) for spot in [_between(a, b, k / 40) for k in range(41)]] + [_square((*s, 7.0)) for s in name]


def _between(a: Spot, b: Spot, share: float) -> Spot:
    return a[0] + share * (b[0] - a[0]), a[1] + share * (b[1] - a[1])


def _labels(canvas: Canvas, rows: Rows, x: Scale, y: Scale, taken: list[Box]) -> None:
    """Name the heaps that take longest, each where no other name or disc stands; one without room is told on hover alone."""
    discs = [_disc(row, x, y) for row in rows]
    for heap in heaps(rows, discs)[:LABELS]:
        row, first = rows[heap[0]], discs[heap[0]]
        name = _short(str(row["layer"])) + (f" and {len(heap) - 1} more" if len(heap) > 1 else "")
        others = [_square(d) for place, d in enumerate(discs) if place not in heap]
        edge = _around([_square(discs[place]) for place in heap])
        spot = next((s for s in _spots(first, edge, LETTER * len(name)) if _free(s[2], [*taken, *others])), None)
        if spot:
            canvas.text(spot[0], spot[1], name, "tick", title=", ".join(str(rows[place]["layer"]) for place in heap))
            taken.append(spot[2])


def heaps(rows: Rows, discs: Sequence[Disc]) -> list[list[int]]:
    """Places of the layers whose discs overlap the disc of a longer one, with it; the heaps that take longest come first.

    Example:
        >>> rows = [{"share": 0.2}, {"share": 0.5}, {"share": 0.1}]
        >>> heaps(rows, [(0.0, 0.0, 5.0), (8.0, 0.0, 5.0), (40.0, 0.0, 5.0)])
        [[1, 0], [2]]
    """
    found: list[list[int]] = []
    for place in sorted(range(len(rows)), key=lambda p: -rows[p]["share"]):
        near = (h for h in found if math.dist(discs[h[0]][:2], discs[place][:2]) < discs[h[0]][2] + discs[place][2])
        if heap := next(near, None):
            heap.append(place)
        else:
            found.append([place])
    return sorted(found, key=lambda heap: -sum(rows[place]["share"] for place in heap))


def _disc(row: Mapping[str, Any], x: Scale, y: Scale) -> Disc:
    return x(_intensity(row)), y(_speed(row)), _radius(row)


def _square(disc: Disc) -> Box:
    x, y, r = disc
    return x - r, y - r, x + r, y + r


def _around(boxes: Sequence[Box]) -> Box:
    left, top, right, bottom = zip(*boxes, strict=True)
    return min(left), min(top), max(right), max(bottom)


def _short(name: str) -> str:
    return name if len(name) <= 28 else "…" + name[-27:]


def _spots(disc: Disc, edge: Box, wide: float) -> list[tuple[float, float, Box]]:
    """Where a name may stand: right, left, below, above its heap; each with the box that it fills."""
    x, y, _ = disc
    left, top, right, bottom = edge
    starts = [(right + 4, y + 4), (left - 5 - wide, y + 4), (x - wide / 2, bottom + 13), (x - wide / 2, top - 4)]
    return [(a, b, (a, b - 10, a + wide, b + 3)) for a, b in starts]


def _free(box: Box, taken: Sequence[Box]) -> bool:
    inside = box[0] >= LEFT and box[2] <= RIGHT and box[1] >= TOP and box[3] <= BOTTOM
    return inside and not any(box[0] < t[2] and t[0] < box[2] and box[1] < t[3] and t[1] < box[3] for t in taken)
