"""Ratios, verdicts and the table of `hardware.py`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from quadriga.measure.stats import Ratio, ratio, restart_logs
from quadriga.measure.timings import Timings

EAGER, PICK = "eager, float32", "quadriga run --only hardware"


def ratio_of(timings: Timings, rival: str, name: str, batch: int) -> Any:
    """How many times faster one is than a rival; None where either was not timed."""
    both = rival in timings.seconds[batch] and name in timings.seconds[batch]
    return timings.ratio(rival, name, batch) if both else None


def by_processor(timings: Timings) -> Timings:
    """The same blocks with processor time in the place of wall time."""
    seconds = {
        batch: {arm: [[(cpu, cpu) for _, cpu in blocks] for blocks in restarts] for arm, restarts in arms.items()}
        for batch, arms in timings.seconds.items()
    }
    return replace(timings, seconds=seconds)


def speeds(timings: Timings, rival: str, name: str, batches: Sequence[int]) -> list[float]:
    """How many times faster than the rival, one for each batch size; empty where it failed."""
    found = [ratio_of(timings, rival, name, b) for b in batches]
    return [r.value for r in found if r is not None] if all(r is not None for r in found) else []


def mean_speed(timings: Timings, rival: str, name: str, batches: Sequence[int]) -> float:
    """Their geometric mean, which is what a search for latency compares."""
    return math.prod(speeds(timings, rival, name, batches)) ** (1 / len(batches))


def mean_ratio(timings: Timings, rival: str, name: str, batches: Sequence[int]) -> Ratio:
    """The same with its interval: of each restart the mean over batch sizes, then Student's t over restarts."""
    both = [(timings.per_call(b, rival), timings.per_call(b, name)) for b in batches]
    count = min(len(times) for pair in both for times in pair)
    logs = sum(restart_logs(one[:count], other[:count]) for one, other in both) / len(batches)
    return ratio([[math.exp(log)] for log in logs], [[1.0]] * count)


def verdicts(rows: Sequence[Mapping[str, Any]], timings: Timings, batches: Sequence[int]) -> dict[str, Any]:
    """The pick against the best row and against the best peer, in the geometric mean over batch sizes and for each."""
    pick, found = PICK, {}
    ours = {r["name"] for r in rows if r["within"] and r["quoted"] and r["name"] != pick and not r["name"].startswith("peer")}
    theirs = {r["name"] for r in rows if r["within"] and r["quoted"] and r["name"].startswith("peer")}
    for said, names in (("best row", ours), ("best peer", theirs)):
        able = [n for n in names if speeds(timings, EAGER, n, batches)]
        if not able or not speeds(timings, EAGER, pick, batches):
            continue
        best = max(able, key=lambda n: mean_speed(timings, EAGER, n, batches))
        each = {str(b): {"name": (top := _best(timings, able, b)), **timings.ratio(top, pick, b).plain()} for b in batches}  # type: ignore[union-attr]
        found[said] = {"name": best, "pick is faster by": mean_ratio(timings, best, pick, batches).plain(), "each": each}
    return found


def _best(timings: Timings, names: Sequence[str], batch: int) -> str:
    return max(names, key=lambda n: timings.ratio(EAGER, n, batch).value)  # type: ignore[union-attr]


def table(results: Sequence[Mapping[str, Any]], told: str) -> str:
    """As Markdown, below the benchmark's own text."""
    lines = ["# Every runtime and precision", "", told.partition("\n\n    QUADRIGA")[0].strip(), "",
             told.partition("a part of it\n\n")[2].strip(), ""]  # fmt: skip
    for r in results:
        clock = "wall time" if r["clock"] == "wall" else "processor time of one thread, beside other work"
        said = f"Floor {r['floor']}; {clock}; {r['machine']['instructions']}; the search ended {r['status']}."
        unit = r["unit"] or r["metric"]
        head = f"| row | test {unit} | over eager, batch 1 | batch 64 | over tuned eager, batch 1 | batch 64 |"
        lines += [f"## {r['workload']}", "", said, "", f"{head} bytes | start-up s | peak |", "|---" * 9 + "|"]
        lines += [_line(row) for row in r["rows"]]
        lines += ["", *[_said(key, r[key]) for key in ("best row", "best peer") if key in r], ""]
    return "\n".join(lines)


def _line(row: Mapping[str, Any]) -> str:
    if row["refused"]:
        return f"| {row['name']} | refused: {row['refused'].splitlines()[0][:160]} | | | | | | | |"
    cells = [_cell(row[f"over {rival}"].get(b), row["quoted"]) for rival in (EAGER, "eager, tuned") for b in ("1", "64")]
    quality = (
        f"{row['quality']:.4g} ({row['difference']:+.3g}){'' if row['within'] else ', below the floor'}"
        if "quality" in row
        else "–"
    )
    name = f"**{row['name']}**: `{row['steps']}`" if row["name"].startswith("quadriga") else row["name"]
    more = f"{row['startup']:.1f} | {row['peak']:.2f}" if "peak" in row else "– | –"
    return f"| {name} | {quality} | {' | '.join(cells)} | {row['bytes']:,.0f} | {more} |"


def _cell(ratio: Mapping[str, Any] | None, quoted: bool) -> str:
    if ratio is None:
        return "–"
    span = f" ({ratio['low']:.2f} to {ratio['high']:.2f})" if quoted and ratio.get("low") else ""
    return f"{ratio['value']:.2f}{span}"


def _said(key: str, found: Mapping[str, Any]) -> str:
    each = "; ".join(f"batch {b}: {_cell(e, True)} times as fast as {e['name']}" for b, e in found["each"].items())
    mean = _cell(found["pick is faster by"], True)
    return f"- The pick against the {key}, {found['name']}: {mean} times as fast in the mean; {each}."
