"""What the article's own combination gives: `make bench`.

Trains the baseline and the two variants of recipes/mission*.toml on lenet_fashion, scores them in pairs on the test
images, and times them in turn against the baseline in eager PyTorch, each in its own process. Then the well-trained
original is shown beside them, since a recipe has to beat that too. Prints a table, and one line of JSON last.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from quadriga.core.recipe import Recipe, step
from quadriga.core.workload import Workload
from quadriga.engine.base import Order
from quadriga.engine.local import Local, cores
from quadriga.measure.latency import paired
from quadriga.measure.quality import Scores
from quadriga.verify.quality import compare
from quadriga.workloads import load

RECIPES = Path(__file__).resolve().parents[1] / "recipes"


def variants(workload: Workload) -> dict[str, Recipe]:
    """Baseline first; the last is the original network under the mission's own training."""
    mission = Recipe.load(RECIPES / "mission.toml")
    training = tuple(s for s in mission.steps if s.method != "shrink")
    assert workload.baseline is not None
    found = {"baseline": workload.baseline, "mission": mission, "mission, Adam": Recipe.load(RECIPES / "mission-adam.toml")}
    found["original, mission's training"] = Recipe(training)
    found["mission in ONNX Runtime"] = Recipe((*mission.steps, step("threads", count=1), step("onnxruntime")))
    return found


def measure(workload: Workload, folder: Path) -> list[dict[str, Any]]:
    """Train, score and time all variants."""
    recipes = variants(workload)
    engine = Local(str(workload.reference), folder, 0, cores())
    try:
        for task, more in (("realize", {}), ("score", {"split": "test"})):
            for number, recipe in enumerate(recipes.values()):
                args = {
                    "recipe": recipe.plain(),
                    "name": f"m{number}",
                    "hash": recipe.hash,
                    "batches": [1, workload.batch_size],
                }
                engine.submit(Order(number, task, {**args, **more, **({"folder": f"work/built/m{number}"} if more else {})}))
            results = collect(engine, len(recipes), list(recipes))
            values = results if task == "realize" else values  # noqa: F821 (set in the first round)
    finally:
        engine.stop()
    arms = {f"m{n}": {"kind": "folder", "path": str(folder / "work/built" / f"m{n}")} for n in range(len(recipes))}
    inputs = {b: workload.inputs(b) for b in (1, workload.batch_size)}
    timings = paired(arms, inputs, restarts=8, blocks=8, block_seconds=0.05, folder=folder / "work/timing")
    scores = [Scores.load(folder / "scores" / f"test-m{n}.npz") for n in range(len(recipes))]
    rows = []
    for number, name in enumerate(recipes):
        quality = compare(scores[0], scores[number], workload.metric, 0.5, 0.975)
        latency = {b: r.plain() for b in inputs if (r := timings.ratio("m0", f"m{number}", b)) is not None}
        rows.append({"name": name, **values[number], "quality": quality, "latency_ratio": latency})
    return rows


def collect(engine: Local, count: int, names: list[str]) -> dict[int, dict[str, float]]:
    """The values of all orders; stops at the first failure."""
    found: dict[int, dict[str, float]] = {}
    while len(found) < count:
        done = engine.wait(5.0)
        if done is None:
            continue
        number, result = done
        if result["status"] != "complete":
            sys.exit(f"{names[number]}: {result['status']}: {result.get('reason')}")
        found[number] = result["values"]
        print(f"{names[number]}: done", file=sys.stderr, flush=True)
    return found


def main() -> None:
    """Print the table and the JSON line."""
    workload = load("lenet_fashion")
    with tempfile.TemporaryDirectory(prefix="quadriga-mission-") as folder:
        rows = measure(workload, Path(folder))
    print(f"{'':32}{'parameters':>11}{'bytes':>9}{'test pt':>9}{'difference':>12}{'at least':>10}{'faster b1':>22}{'b64':>22}")
    for row in rows:
        q, ratios = row["quality"], [row["latency_ratio"].get(b) for b in (1, workload.batch_size)]
        speeds = "".join(
            f"{r['value']:>8.2f} ({r['low']:.2f}–{r['high']:.2f})" if r and r["low"] else f"{'–':>22}" for r in ratios
        )
        print(
            f"{row['name']:32}{row['parameters']:11.0f}{row['bytes']:9.0f}{q['value']:9.2f}{q['difference']:+12.2f}{q['low']:+10.2f}{speeds}"
        )
    print(json.dumps({"benchmark": "mission", "data": dict(workload.data_note), "rows": rows}))


if __name__ == "__main__":
    main()
