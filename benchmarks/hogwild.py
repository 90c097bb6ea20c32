"""Workers that update shared weights without locks, on LeNet: do they answer as well as serial SGD, and how stale are they?

    python benchmarks/hogwild.py --seeds 6 --others 2    # 20 minutes on two cores; goes on where the last call stopped

Every arm trains the same network for the same epochs, on the same batches in the same order, by SGD at 0.1, which it
reaches after a twentieth of the training and which falls linearly to zero, with one thread a worker. By workers, gradients are
clipped at a norm of 3 unless the arm says otherwise: unclipped, some trainings diverge. Quality is that of the whole
test split; an arm's difference from serial SGD is taken seed by seed, with a 95 % t-interval over seeds: all seeds
for the claim about 4 workers, the first few for other arms. Staleness counts the updates by others between a worker's read
of the weights and its own update. "again" repeats an arm with the same seeds: how far two runs are apart that only chance
distinguishes. "Went back" counts trainings whose loss became NaN and that went on from their start at a tenth of the rate.
Prints tables and writes one JSON file.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import stats

from quadriga.core.files import atomic_write, read_json, write_json
from quadriga.core.metric import Metric
from quadriga.core.recipe import Recipe, Step, step
from quadriga.core.workload import Workload
from quadriga.engine.walk import walk
from quadriga.measure.machine import facts
from quadriga.measure.quality import score
from quadriga.workloads import load

TABLE = Path(__file__).resolve().parents[1] / "docs/hogwild.md"
LEVEL, MARGIN, SHOWN = 0.95, 0.5, 6  # of intervals; points that may be lost; columns of the histogram, the last open-ended
TOLD = 4  # workers of the claim
TOLD_BY = ("serial", "serial, clipped", f"{TOLD} workers")  # arms that get all seeds
CLIP = step("clip_gradients", kind="norm", limit=3.0)  # which few norms exceed: serial SGD answers as well with it as without
ARMS: dict[str, tuple[Step, ...]] = {
    "serial": (),
    "serial, clipped": (CLIP,),
    "1 worker": (CLIP, step("hogwild", workers=1)),
    "2 workers": (CLIP, step("hogwild", workers=2)),
    "4 workers": (CLIP, step("hogwild", workers=4)),
    "4 workers, again": (CLIP, step("hogwild", workers=4)),
    "4 workers from the first step": (CLIP, step("hogwild", workers=4, alone=0.0)),
    "4 workers, not clipped": (step("hogwild", workers=4),),
    "4 workers, rate / (1 + staleness)": (CLIP, step("hogwild", workers=4, scale=True)),
}
WARMUP = 0.05  # of the training


def recipe(arm: str, epochs: float) -> Recipe:
    """An arm's training."""
    plain = (step("optimizer", kind="sgd", lr=0.1), step("schedule", kind="linear", warmup=WARMUP))
    return Recipe((*plain, *ARMS[arm], step("train", epochs=epochs)))


def trained(workload: Workload, arm: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """One training and its scores on the test split, unless that was done."""
    folder = options.work / f"seed-{seed}" / arm.replace(" ", "-").replace("/", "by")
    one, kept = recipe(arm, options.epochs), folder / "arm.json"
    if kept.exists() and (found := read_json(kept))["recipe"] == one.plain() and found["data"] == dict(workload.data_note):
        return found
    walked = walk(workload, one, seed=seed, store=folder / "checkpoints")
    assert isinstance(workload.metric, Metric)
    scores = score(walked.setup.model.eval(), workload.test, workload.metric)
    found = {
        "recipe": one.plain(), "data": dict(workload.data_note), "quality": scores.value, "seconds": walked.seconds,
        "cpu_seconds": walked.cpu_seconds, "right": np.asarray(scores.values).astype(int).tolist(),
        "staleness": walked.staleness[0] if walked.staleness else None,
        "back": any("went back" in note for note in walked.notes),
    }  # fmt: skip
    write_json(kept, found)
    said = f"{found['quality']:.2f} pt, {found['seconds']:.0f} s"
    print(f"[hogwild] seed {seed}, {arm}: {said}", file=sys.stderr, flush=True)
    return found


def interval(values: Sequence[float]) -> dict[str, Any]:
    """Mean of differences with its t-interval.

    Example:
        >>> found = interval([0.1, 0.3])
        >>> round(found["value"], 2), round(found["low"], 2), round(found["high"], 2)
        (0.2, -1.07, 1.47)
    """
    mean, count = float(np.mean(values)), len(values)
    half = float(stats.t.ppf((1 + LEVEL) / 2, count - 1) * np.std(values, ddof=1) / math.sqrt(count))
    return {"value": mean, "low": mean - half, "high": mean + half, "seeds": list(values)}


def pooled(rows: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """Staleness over all seeds."""
    each = [row["staleness"] for row in rows if row["staleness"]]
    if not each:
        return None
    updates, counts = sum(s["updates"] for s in each), {}
    for found in each:
        for name, count in found["histogram"].items():
            counts[name] = counts.get(name, 0) + count
    mean = sum(s["mean"] * s["updates"] for s in each) / updates
    return {"mean": mean, "max": max(s["max"] for s in each), "updates": updates, "histogram": counts}


def summary(arms: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """One row an arm, the claim, and the spread of repetitions."""
    serial, rows = arms["serial"], []
    for name, each in arms.items():
        row = {
            "name": name,
            "count": len(each),
            "quality": float(np.mean([e["quality"] for e in each])),
            "staleness": pooled(each),
            "back": sum(bool(e["back"]) for e in each),
        }
        row |= {k: float(np.mean([e[k] for e in each])) for k in ("seconds", "cpu_seconds")}
        if name != "serial":
            row["difference"] = interval([a["quality"] - b["quality"] for a, b in zip(each, serial, strict=False)])
        rows.append(row)
    claimed = [
        (a, b) for name in (f"{TOLD} workers", f"{TOLD} workers, again") for a, b in zip(arms[name], serial, strict=False)
    ]
    told = interval([a["quality"] - b["quality"] for a, b in claimed])
    return {
        "rows": rows,
        "within": bool(told["low"] > -MARGIN),
        "told": told,
        "spread": spread(arms[f"{TOLD} workers"], arms[f"{TOLD} workers, again"]),
    }


def spread(first: Sequence[dict[str, Any]], again: Sequence[dict[str, Any]]) -> dict[str, float]:
    """How far apart two trainings with one seed are: in points, and in examples of which only one is answered rightly."""
    apart = [abs(a["quality"] - b["quality"]) for a, b in zip(first, again, strict=False)]
    other = [np.mean(np.asarray(a["right"]) != np.asarray(b["right"])) for a, b in zip(first, again, strict=False)]
    return {"points": float(np.mean(apart)), "largest": float(np.max(apart)), "disagree": float(np.mean(other))}


def table(found: dict[str, Any]) -> str:
    """Markdown: quality, then staleness."""
    lines = [
        f"| arm | seeds | test pt | minus serial ({LEVEL:.0%}) | went back | seconds | processor seconds |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in found["rows"]:
        less = row.get("difference")
        told = f"{less['value']:+.2f} ({less['low']:+.2f} to {less['high']:+.2f})" if less else ""
        spent = (f"{row['seconds']:.0f}", f"{row['cpu_seconds']:.0f}")
        cells = (row["name"], row["count"], f"{row['quality']:.2f}", told, row["back"], *spent)
        lines.append(f"| {' | '.join(map(str, cells))} |")
    bins = [*map(str, range(SHOWN - 1)), f"{SHOWN - 1} or more"]
    lines += ["", f"| staleness | mean | max | {' | '.join(bins)} |", "|---" * (3 + SHOWN) + "|"]
    for row in found["rows"]:
        if stale := row["staleness"]:
            counts = [stale["histogram"].get(str(k), 0) for k in range(SHOWN - 1)]
            parts = [f"{c / stale['updates']:.1%}" for c in (*counts, stale["updates"] - sum(counts))]
            lines.append(f"| {row['name']} | {stale['mean']:.2f} | {stale['max']} | {' | '.join(parts)} |")
    apart, verdict = found["spread"], "" if found["within"] else "not shown to be "
    whole = f"{found['told']['value']:+.2f} ({found['told']['low']:+.2f} to {found['told']['high']:+.2f})"
    lines += [
        "",
        f"{TOLD} workers, all trainings together, are {verdict}within {MARGIN:g} points of serial SGD: {whole}. Two trainings "
        f"with one seed and {TOLD} workers are "
        f"{apart['points']:.2f} points apart on average, {apart['largest']:.2f} at most; of "
        f"{apart['disagree']:.1%} of the examples only one of them is right. Seconds count the start of the workers.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Train what is missing, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=6, help="of serial SGD and of the claim")
    parser.add_argument("--others", type=int, default=2, help="seeds of all other arms")
    parser.add_argument("--epochs", type=float, default=25.0, help="as many as the workload's own baseline has")
    parser.add_argument("--work", type=Path, default=Path("out/hogwild"))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results/hogwild.json")
    options = parser.parse_args()
    if not 2 <= options.others <= options.seeds:
        parser.error("an interval over seeds takes at least 2 of them, and other arms have no more than the claim")
    torch.set_num_threads(1)
    workload = load("lenet_fashion")
    seeds = {arm: options.seeds if arm in TOLD_BY else options.others for arm in ARMS}
    arms = {arm: [trained(workload, arm, seed, options) for seed in range(count)] for arm, count in seeds.items()}
    found = summary(arms)
    print(table(found))
    head = (
        "# Asynchronous SGD in shared memory\n\n"
        + f"Made by `QUADRIGA_DATA={workload.data_note['source']} python benchmarks/hogwild.py`: "
        + f"{options.epochs:g} epochs. "
        + " ".join((__doc__ or "").split("\n\n")[2].split("\n")).strip()
        + "\n\n"
    )
    atomic_write(TABLE, head + table(found))
    told = {"seeds": options.seeds, "others": options.others, "epochs": options.epochs, "level": LEVEL, "margin": MARGIN}
    write_json(options.out, {"benchmark": "hogwild", "machine": facts(), **told, **found})
    print(json.dumps({"benchmark": "hogwild", "out": str(options.out), "within": found["within"]}))


if __name__ == "__main__":
    main()
