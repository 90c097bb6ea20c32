"""What the search finds on networks larger than LeNet, beside what a runtime and a precision give alone: one table.

    QUADRIGA_DATA=shipped python benchmarks/structure.py                    # goes on where the last call stopped; two hours
    python benchmarks/structure.py --only resnet20_fashion --budget 25m     # a part of it

For each workload `quadriga run` searches over all four families. Its artifact is then timed in turn with what the same study
costed of the unchanged network: its fastest int8 (of those that hold the floor on val, where one was scored) and its fastest
export that loses nothing, built again from the very weights that this study trained. Each arm has its own process; ratios are
of wall time with Student's 99 % interval over restarts. Quality is that of the artifacts on the whole test split.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import geometric_mean
from typing import Any

import hardware_peers as peers
from picks import PICK, Plain, asked, interval, keep, study

from quadriga.core.files import read_json
from quadriga.core.recipe import Recipe
from quadriga.core.workload import Workload
from quadriga.engine.tasks import Desk
from quadriga.measure.latency import paired
from quadriga.measure.machine import facts
from quadriga.workloads import load

ROOT = Path(__file__).resolve().parents[1]
TABLE, KEPT = ROOT / "docs/structure.md", ROOT / "benchmarks/results/structure.json"
TIMM = "benchmarks/networks/mobilenetv3_fashion.py:workload"
TASKS = {  # name → workload, floor, budget
    "resnet20_fashion": ("resnet20_fashion", "-0.5pt", "25m"),
    "mobilenetv3_fashion": (TIMM, "-0.5pt", "12m"),
    "mobilenetv2_fashion": ("mobilenetv2_fashion", "-0.5pt", "20m"),
    "minilm_wordnet": ("minilm_wordnet?examples=3000", "-1pt", "20m"),
}
INT8, LOSSLESS = "its int8 alone", "its best lossless export"


def alone(out: Path, floor: float) -> dict[str, Recipe]:
    """The study's own candidates that leave the network as it is: the fastest int8 within the floor, the fastest lossless."""
    trials = [t for t in read_json(out / "records.json")["trials"] if t["status"] == "complete"]
    base = next(t for t in trials if t["stage"] == "baseline")
    rest = len(base["recipe"])
    cost = {_key(t["recipe"]): t["values"] for t in trials if t["stage"] == "cost"}
    scored = [
        t
        for t in trials
        if t["stage"] in ("search", "ablation") and t["values"]["quality"] >= base["values"]["quality"] - floor
    ]
    own = [Recipe.from_plain(t["recipe"][rest:]) for t in scored if t["recipe"][:rest] == base["recipe"]]
    costed = [Recipe.from_plain(t["recipe"]) for t in trials if t["stage"] == "cost"]
    bare = [Recipe(r.steps[1:]) for r in costed if r.steps and r.steps[0].is_train]  # costed as if the network were trained
    int8 = [r for r in own if _int8(r)] or [r for r in bare if _int8(r)]
    plain = [r for r in costed if _lossless(r)]
    found = {INT8: int8, LOSSLESS: plain}
    return {name: max(rs, key=lambda r: _speed(cost, r)) for name, rs in found.items() if rs}


def _int8(recipe: Recipe) -> bool:
    """Whether it leaves the network as it is, in int8."""
    names = [s.method for s in recipe.steps]
    return "quantize_int8" in names and set(names) <= {"quantize_int8", "threads", "onnxruntime", "openvino"}


def _lossless(recipe: Recipe) -> bool:
    return bool(recipe.steps) and all(s.method in ("threads", "onnxruntime", "openvino") for s in recipe.steps)


def _speed(cost: Mapping[str, Any], recipe: Recipe) -> float:
    values = cost.get(_key(recipe.plain())) or next((v for k, v in cost.items() if k.endswith(_key(recipe.plain()))), {})
    return geometric_mean([v for k, v in values.items() if k.startswith("speed/")] or [1e-9])


def _key(steps: Sequence[Mapping[str, Any]]) -> str:
    """Steps without train steps, as text: costs are known of the untrained recipe."""
    return str(Recipe.from_plain([s for s in steps if s["method"] != "train"]))


def built(workload: Workload, out: Path, baseline: Recipe, recipes: Mapping[str, Recipe]) -> dict[str, Path]:
    """Each recipe behind the baseline's training, whose weights the study kept."""
    desk, folders = Desk(workload, out, 0), {}
    for number, (name, recipe) in enumerate(recipes.items()):
        whole = Recipe((*baseline.steps, *recipe.steps))
        args = {"recipe": whole.plain(), "hash": whole.hash, "name": f"alone-{number}", "batches": (1, workload.batch_size)}
        told = desk.do("realize", args)
        if told["status"] != "complete":
            raise SystemExit(f"{name}: {told['reason']}")
        folders[name] = out / "work/built" / f"alone-{number}"
    return folders


def compared(name: str, reference: str, floor: str, budget: str, work: Path, restarts: int) -> Plain:
    """One workload's search and timings, as plain data."""
    out, workload = (work / name).resolve(), load(reference)
    found = study(reference, floor, budget, out)
    margin = abs(float(floor.removesuffix("pt")))
    folders = built(workload, out, workload.baseline or Recipe(), alone(out, margin)) | {PICK: out / "artifact"}
    arms = {n: {"kind": "folder", "path": str(f)} for n, f in folders.items()}
    batches = tuple(sorted({1, workload.batch_size}))
    inputs = {b: workload.inputs(b) for b in batches}
    timings = paired(arms, inputs, restarts=restarts, blocks=8, block_seconds=0.05, folder=out / "work/timing", timeout=600)
    over = {n: {str(b): timings.ratio(n, PICK, b).plain() for b in batches} for n in folders if n != PICK}
    winner = found["winner"] or {}
    steps = Recipe.from_plain(winner.get("recipe", []))
    return {
        "name": name, "workload": reference, "floor": floor, "budget": budget, "status": found["status"],
        "seconds": found["seconds"], "others": timings.disturbed, "machine": facts(), "unit": workload.metric.unit,
        "families": winner.get("families", []), "recipe": str(steps), "batches": list(batches), "pick over": over,
        "quality": {n: peers.scored(workload, f).value for n, f in folders.items()},
        "bytes": {n: peers.size(f) for n, f in folders.items()},
        "bytes of the baseline": read_json(out / "records.json")["baseline"]["bytes"],
    }  # fmt: skip


def table(results: Sequence[Mapping[str, Any]]) -> str:
    """As Markdown, below this file's own text."""
    about = (__doc__ or "").partition("\n\n    QUADRIGA")[0].strip()
    lines = ["# What the search finds on larger networks", "", about, ""]
    lines += [(__doc__ or "").partition("a part of it\n\n")[2].strip(), "", "Made by `python benchmarks/structure.py`.", ""]
    for r in results:
        lines += _section(r)
    return "\n".join(lines)


def _section(r: Mapping[str, Any]) -> list[str]:
    heads = [f"the pick over it, batch {b}" for b in r["batches"]]
    lines = [f"## {r['name']}", "", f"Floor {r['floor']}, budget {r['budget']}, {r['seconds']:.0f} s used: {r['status']}.", ""]
    lines += [f"- families: {', '.join(r['families']) or 'none'}", f"- recipe: {r['recipe']}"]
    lines += [f"- other processes took {r['others']:.0%} of the cores while this was timed", ""]
    lines += [f"| arm | test {r['unit']} | bytes, of the baseline's | {' | '.join(heads)} |", "|---" * (3 + len(heads)) + "|"]
    for name in (PICK, INT8, LOSSLESS):
        if name in r["quality"]:
            over = [interval(r["pick over"].get(name, {}).get(str(b))) for b in r["batches"]]
            share = r["bytes"][name] / r["bytes of the baseline"]
            lines.append(f"| {name} | {r['quality'][name]:.2f} | {share:.3f} | {' | '.join(over)} |")
    return [*lines, ""]


def main() -> None:
    """The workloads that are asked for."""
    options = asked(__doc__ or "", "out/structure")
    for name, (reference, floor, budget) in TASKS.items():
        if options.only and not any(name.startswith(o) for o in options.only):
            continue
        result = compared(name, reference, floor, options.budget or budget, options.work, options.restarts)
        keep(reference, result, KEPT, TABLE, table)
        print("\n".join(_section(result)))


if __name__ == "__main__":
    main()
