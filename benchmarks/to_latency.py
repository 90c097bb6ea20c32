"""Does `to_latency` keep its word? Targets 0.7, 0.5 and 0.35 on five workloads, measured again in processes of their own.

    python benchmarks/to_latency.py                       # go on where the last call stopped; about an hour on two quiet cores
    python benchmarks/to_latency.py --only lenet_fashion --runtime openvino --batch 64

The method chooses widths of the untrained network (latency does not depend on training), timing them in one process. Then the
network as it was and the network as it became are written to folders and timed by `quadriga.measure.latency.paired`: each in
fresh processes, loaded by its own load.py, in turn, restarts as the unit of the 99 % interval. A row is as promised if that
ratio is within 10 % of the target, or if the method refused and named the nearest ratio that it reached.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from quadriga.core.errors import BadInput, NotApplicable
from quadriga.core.files import atomic_write, read_json, write_json
from quadriga.core.recipe import Recipe, step
from quadriga.core.workload import Workload
from quadriga.measure.machine import facts

ROOT = Path(__file__).resolve().parents[1]
RESULTS, TABLE = ROOT / "benchmarks/results/to_latency.json", ROOT / "docs/to_latency.md"
WORKLOADS = ("lenet_fashion", "resnet20_fashion", "lstm_wordnet", "gpt_shakespeare", "mobilenetv2_fashion", "minilm_wordnet")
TARGETS = (0.7, 0.5, 0.35)
TOLERANCE = 0.1
Row = dict[str, Any]


def row(workload: Workload, target: float, runtime: str, batch: int, folder: Path, restarts: int) -> Row:
    """Apply the method, then measure what it made against what was there."""
    from quadriga.engine.tasks import Desk

    desk = Desk(workload, folder, 0)
    asked = step("to_latency", target=target, batch=batch)
    recipe = Recipe((asked, step(runtime), step("threads", count=1)))
    start = time.monotonic()
    refused = ""
    try:
        desk._probe(recipe)
    except NotApplicable as refusal:
        refused = refusal.reason
    seconds = time.monotonic() - start
    decided = [read_json(path)["value"] for path in (folder / "decisions").glob("*.json")]
    found = decided[0] if decided else {}
    first = (found.get("rounds") or [{}])[0]
    made: Row = {
        "target": target, "seconds": round(seconds, 1), "refused": refused, "nearest": found.get("ratio"),
        "table": first.get("table"), "first": first.get("measured"), "rounds": len(found.get("rounds", ())),
        "builds": found.get("builds"), "left": found.get("left"), "widths": found.get("widths"), "log": found.get("rounds"),
    }  # fmt: skip
    return made if refused else {**made, **achieved(desk, recipe, batch, restarts)}


def achieved(desk: Any, recipe: Recipe, batch: int, restarts: int) -> Row:
    """The latency ratio to the unchanged network, in fresh processes, in turn."""
    from quadriga.measure.latency import paired

    for name, steps in (("before", recipe.steps[1:]), ("after", recipe.steps)):
        made = desk.do("build", {"recipe": Recipe(steps).plain(), "name": name, "batches": (batch,)})
        assert made["status"] == "complete", made
    arms = {name: {"kind": "folder", "path": str(desk.folder / "work/built" / name)} for name in ("before", "after")}
    timings = paired(arms, {batch: desk.workload.inputs(batch)}, restarts=restarts, folder=desk.folder / "work/timing")
    ratio = timings.ratio("before", "after", batch)
    assert ratio is not None, timings.errors
    latency = timings.latency(batch, "before")
    assert latency is not None
    end = 1 / ratio.low if ratio.low else None
    return {
        "achieved": 1 / ratio.value,
        "low": 1 / ratio.high,
        "high": end,
        "restarts": ratio.restarts,
        "before": latency.value,
    }


def table(known: dict[str, Row]) -> str:
    """The results as Markdown."""
    return "\n".join(_lines(known)) + "\n"


def _lines(known: dict[str, Row]) -> Iterator[str]:
    yield "# to_latency: asked and achieved\n"
    yield "Made by `python benchmarks/to_latency.py`. *Table*: what the table of single layers predicted for the first widths;"
    yield "*first*: what the whole network then took; *achieved*: after the corrections, measured again in fresh processes in"
    yield "turn, with the 99 % interval. All are shares of the unchanged network's latency in the same runtime.\n"
    rows = [r for r in known.values() if "target" in r]
    for place in dict.fromkeys((r["runtime"], r["batch"]) for r in rows):
        mine = [r for r in rows if (r["runtime"], r["batch"]) == place]
        kept = sum(promised(r) for r in mine)
        yield f"## {place[0]}, one thread, batch {place[1]}: {kept} of {len(mine)} as promised\n"
        yield "| workload | target | table | first | achieved | within ± 10 % | rounds | seconds |"
        yield "|---|---|---|---|---|---|---|---|"
        for r in mine:
            cells = [r["workload"], r["target"], _number(r["table"]), _number(r["first"]), _outcome(r), r["rounds"]]
            yield f"| {' | '.join(map(str, cells))} | {r['seconds']:.0f} |"
        yield ""
    for name, r in known.items():
        if "skipped" in r:
            yield f"{name} was left out: {r['skipped']}\n"


def promised(found: Row) -> bool:
    """Within the tolerance, or refused with the nearest ratio."""
    if found["refused"]:
        return found["nearest"] is not None
    return abs(found["achieved"] / found["target"] - 1) <= TOLERANCE


def _outcome(found: Row) -> str:
    if found["refused"]:
        return f"refused: nearest {_number(found['nearest'])} | –"
    interval = f"{_number(found['low'])} to {_number(found['high'])}"
    return f"{_number(found['achieved'])} ({interval}) | {'yes' if promised(found) else '**no**'}"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(WORKLOADS), help="workloads, comma-separated")
    parser.add_argument("--targets", default=",".join(map(str, TARGETS)), help="comma-separated")
    parser.add_argument("--runtime", default="onnxruntime", help="onnxruntime, openvino, eager or inductor")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="four restarts instead of eight")
    parser.add_argument("--fresh", action="store_true", help="measure again what is known")
    parser.add_argument("--state", type=Path, default=Path("out/to_latency.json"), help="rows so far; a stopped call goes on")
    asked = parser.parse_args()
    known: dict[str, Row] = read_json(asked.state) if asked.state.exists() else {}
    for name in asked.only.split(","):
        workload = _load(name, known)
        for target in map(float, asked.targets.split(",")) if workload else ():
            key = f"{name} {asked.runtime} {asked.batch} {target:g}"
            if key in known and not asked.fresh:
                continue
            with tempfile.TemporaryDirectory(prefix="to-latency-") as folder:
                found = row(workload, target, asked.runtime, asked.batch, Path(folder), 4 if asked.quick else 8)
            known[key] = {"workload": name, "runtime": asked.runtime, "batch": asked.batch, **found}
            write_json(asked.state, known)
            told = {k: v for k, v in known[key].items() if k not in ("widths", "log", "left")}
            print(json.dumps(told), file=sys.stderr, flush=True)
    write_json(RESULTS, {"benchmark": "to_latency", "machine": facts(), "rows": known})
    atomic_write(TABLE, table(known))
    print(table(known))
    return sum(not promised(r) for r in known.values() if "target" in r)


def _load(name: str, known: dict[str, Row]) -> Workload | None:
    """The workload, or None with the reason noted."""
    import torch

    from quadriga import workloads

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    try:
        known.pop(name, None)
        return workloads.load(name)
    except BadInput as error:
        known[name] = {"skipped": str(error)}
        print(f"{name} is left out: {error}", file=sys.stderr, flush=True)
        return None


if __name__ == "__main__":
    sys.exit(main())
