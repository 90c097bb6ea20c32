"""What `quadriga compare` found, as tables: speed, bytes and quality of two sides."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from quadriga.report import text
from quadriga.report.document import Block, Section, Table, Text

Found = Mapping[str, Any]  # what `quadriga compare --json` prints


def section(found: Found) -> Section:
    """One section: which side is faster at each batch size, and what each needs and reaches."""
    blocks: list[Block] = [Text(f"On {found['workload']}: a is {found['a']}, b is {found['b']}."), _speed(found), _rest(found)]
    blocks += [Text(f"Note: {note}.", "note") for note in (*found.get("fakes", ()), *found.get("notes", ()))]
    return Section("compared", "Compared", tuple(blocks))


def _speed(found: Found) -> Table:
    columns = ("batch", "a", "b", "b is as fast as a, times", "interval", "verdict")
    rows = []
    for batch, ratio in found["latency_ratio"].items():
        times = found["latency"].get(batch, {})
        each = (text.seconds(times.get("a")), text.seconds(times.get("b")))
        rows.append((batch, *each, text.ratio(ratio["value"]), text.interval(ratio), str(ratio.get("verdict", text.NONE))))
    level = next((r["level"] for r in found["latency_ratio"].values() if r.get("level")), None)
    title = "Latency of a call" + (f"; intervals at {text.percent(level)}" if level else "")
    return Table(columns, tuple(rows), columns[:5], title)


def _rest(found: Found) -> Table:
    quality, sizes = found["quality"], found["bytes"]
    unit = quality.get("unit", "")
    bound = f"{text.signed(quality.get('difference'), unit)}, at least {text.signed(quality.get('low'), unit)}"
    reached = (text.quality(quality.get("baseline"), unit), text.quality(quality.get("value"), unit), bound)
    rows = [
        ("bytes", text.size(sizes["a"]), text.size(sizes["b"]), text.ratio(found["bytes_ratio"])),
        (f"{quality['metric']} on {quality['n']:,} examples of {found['split']}", *reached),
    ]
    if quality.get("disagreement") is not None:
        rows.append(("predictions that differ", "", "", text.percent(quality["disagreement"])))
    return Table(("", "a", "b", "b against a"), tuple(rows), ("a", "b"), "Size and quality")
