"""Pruning at once against pruning in the course of the same training, on LeNet: who answers better at equal size and epochs?

    python benchmarks/gradual.py --seeds 3        # a quarter of an hour on two cores; goes on where the last call stopped

All arms start from one trained baseline and get the same further training: steps, epochs, batches, order and seed. Quality is
that of the test split, in pairs. Prints a table and writes one JSON file.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from recovery import LEVEL, Bench, difference
from storage import END, further

from quadriga.core.files import atomic_write, write_json
from quadriga.core.recipe import Recipe, Step, step
from quadriga.measure.machine import facts
from quadriga.workloads import load

TABLE = Path(__file__).resolve().parents[1] / "docs/gradual.md"
PRUNINGS = {
    "half the channels, magnitude": step("prune_channels", ratio=0.5, scope="layer"),
    "70 % of the channels, magnitude": step("prune_channels", ratio=0.7, scope="layer"),
    "70 % of the channels, taylor": step("prune_channels", ratio=0.7, scope="layer", importance="taylor"),
    "95 % of the weights": step("prune_weights", ratio=0.95),
    "98 % of the weights": step("prune_weights", ratio=0.98),
}
PART = 0.7


def recipes(start: tuple[Step, ...], epochs: float) -> dict[str, Recipe]:
    """Arm → recipe, the baseline first; each pruning twice."""
    arms = {"baseline": (*start, *END), "original, trained as long": (*start, *further(epochs), *END)}
    for name, one in PRUNINGS.items():
        arms[f"{name}, at once"] = (*start, one, *further(epochs), *END)
        arms[f"{name}, gradual"] = (*start, step(one.method, **one.fields, gradual=PART), *further(epochs), *END)
    return {name: Recipe(steps) for name, steps in arms.items()}


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """One row a pruning."""
    workload = load("lenet_fashion")
    start = workload.baseline.steps if workload.baseline else ()
    arms = recipes(tuple(start), options.epochs)
    benches = [Bench(workload, options.work / f"seed-{seed}", seed) for seed in range(options.seeds)]
    for bench in benches:
        for name, recipe in arms.items():
            bench.arm(name, recipe)
    rows = []
    for name in PRUNINGS:
        pair = [f"{name}, {how}" for how in ("at once", "gradual")]
        quality = [sum(b.done[arm]["quality"] for b in benches) / len(benches) for arm in pair]
        sizes = [b.done[arm]["parameters"] for b in benches for arm in pair]
        rows.append({"name": name, "quality": quality, "parameters": sizes, "gain": difference(benches, pair[1], pair[0])})
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    lines = [f"| pruning | at once, test pt | gradual, test pt | gain ({LEVEL:.0%}) |", "|---|---|---|---|"]
    for row in rows:
        gain, (once, slow) = row["gain"], row["quality"]
        lines.append(
            f"| {row['name']} | {once:.2f} | {slow:.2f} | {gain['value']:+.2f} ({gain['low']:+.2f} to {gain['high']:+.2f}) |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure what is missing, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=float, default=4.0)
    parser.add_argument("--work", type=Path, default=Path("out/gradual"))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results/gradual.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = measure(options)
    print(table(rows))
    head = (
        "# Gradual pruning\n\n"
        + f"Made by `QUADRIGA_DATA={load('lenet_fashion').data_note['source']} python benchmarks/gradual.py`. "
        + " ".join((__doc__ or "").split("\n\n")[2].split("\n"))
        + "\n\n"
    )
    atomic_write(TABLE, head + table(rows))
    write_json(
        options.out,
        {"benchmark": "gradual", "machine": facts(), "seeds": options.seeds, "epochs": options.epochs, "rows": rows},
    )
    print(json.dumps({"benchmark": "gradual", "out": str(options.out)}))


if __name__ == "__main__":
    main()
