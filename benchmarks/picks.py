"""What the whole search hands out, beside other tools' own int8 of the same trained network: one table.

    QUADRIGA_DATA=shipped python benchmarks/picks.py                      # goes on where the last call stopped; an hour
    python benchmarks/picks.py --only mobilenetv2_fashion --budget 20m    # a part of it

For each workload `quadriga run` searches over all four families. The peers are made as their documentation says
(`hardware_peers.py`, NNCF in an environment of its own) from the baseline that this very study trained, scored on the whole
test split, and timed in turn with the study's artifact and eager PyTorch, each arm in its own process, on one thread and on
every core; the last column is the pick against that peer in the mean of the batch sizes. Ratios are of wall time with
Student's 99 % interval over restarts; other processes' share of the cores while timing stands beside them.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import hardware_peers as peers
from hardware_table import mean_ratio, mean_speed, speeds

from quadriga.core.files import atomic_write, read_json, write_json
from quadriga.core.recipe import Recipe
from quadriga.core.workload import Workload
from quadriga.engine.local import cores
from quadriga.measure.latency import paired
from quadriga.measure.machine import facts
from quadriga.measure.stats import UNMEASURED
from quadriga.measure.timings import Timings
from quadriga.verify.quality import compare
from quadriga.workloads import load

ROOT = Path(__file__).resolve().parents[1]
TABLE, KEPT = ROOT / "docs/picks.md", ROOT / "benchmarks/results/picks.json"
TASKS = {"mobilenetv2_fashion": ("-0.5pt", "20m"), "minilm_wordnet": ("-0.5pt", "20m")}  # workload → floor and budget
RIVALS = (
    "ONNX Runtime float32", "ONNX Runtime int8 static", "ONNX Runtime int8 dynamic", "OpenVINO as it comes",
    "NNCF int8 in OpenVINO",
)  # fmt: skip
Plain = dict[str, Any]
PICK, EAGER = "quadriga run", "eager PyTorch"


def study(name: str, floor: str, budget: str, out: Path) -> dict[str, Any]:
    """What `quadriga run` handed over, once."""
    if not (out / "result.json").exists():
        words = ["run", name, "--floor", floor, "--minimize", "latency", "--budget", budget, "--out", str(out)]
        subprocess.run([sys.executable, "-m", "quadriga", *words], check=False)
    found: dict[str, Any] = read_json(out / "result.json")
    return found


def compared(name: str, floor: str, budget: str, work: Path, restarts: int) -> dict[str, Any]:
    """One workload's search, peers and timings, as plain data."""
    out, workload = work / name.partition("?")[0] / "study", load(name)
    found = study(name, floor, budget, out)
    trials = read_json(out / "records.json")["trials"]
    kept = next(t["info"]["checkpoint"] for t in trials if t["stage"] == "baseline" and t["status"] == "complete")
    checkpoint = str((out / "checkpoints" / kept).resolve()) if kept else None
    rows = peers.make(workload, out.parent, {"checkpoint": checkpoint}, RIVALS)
    rows |= {f"{n}, {cores()} threads": on_all_cores(r) for n, r in rows.items() if r["arm"]}
    arms = {
        EAGER: {"kind": "eager", "workload": name, "seed": 0, "checkpoint": checkpoint},
        PICK: {"kind": "folder", "path": str((out / found["artifact"]).resolve())},
        **{n: r["arm"] for n, r in rows.items() if r["arm"]},
    }
    batches = tuple(sorted({1, workload.batch_size}))
    inputs = {b: workload.inputs(b) for b in batches}
    timings = paired(arms, inputs, restarts=restarts, blocks=6, block_seconds=0.05, folder=out.parent / "timing", timeout=600)
    return {
        "workload": name, "floor": floor, "budget": budget, "status": found["status"], "seconds": found["seconds"],
        "others": timings.disturbed, "machine": facts(), "data": dict(workload.data_note), "unit": workload.metric.unit,
        "families": (found["winner"] or {}).get("families", []), "recipe": _recipe(found, workload),
        "rows": _rows(workload, out, rows, timings, batches), "batches": list(batches),
    } | _against(workload, out, rows, timings, batches, floor)  # fmt: skip


def on_all_cores(row: Mapping[str, Any]) -> dict[str, Any]:
    """The same peer, told to use every core; its outputs are those of one thread."""
    here = Path(row["arm"]["path"])
    there = here.with_name(f"{here.name}-{cores()}-threads")
    there.mkdir(exist_ok=True)
    (there / "load.py").write_bytes((here / "load.py").read_bytes())
    write_json(there / "peer.json", {**read_json(here / "peer.json"), "threads": cores()})
    return {**row, "arm": {"kind": "folder", "path": str(there)}}


def _recipe(found: Mapping[str, Any], workload: Workload) -> str:
    steps = (found["winner"] or {}).get("recipe", [])
    own = Recipe.from_plain(steps).steps[len((workload.baseline or Recipe()).steps) :] if steps else ()
    return str(Recipe(tuple(own)))


def _rows(
    workload: Workload, out: Path, rows: Mapping[str, Any], timings: Timings, batches: Sequence[int]
) -> list[dict[str, Any]]:
    """Quality, bytes and speed over eager PyTorch of each arm."""
    quality = {n: r["scores"].value for n, r in rows.items() if r["arm"]}
    quality[PICK] = peers.scored(workload, out / "artifact").value
    size = {n: r["bytes"] for n, r in rows.items() if r["arm"]} | {PICK: peers.size(out / "artifact")}
    made = []
    for name in (PICK, *rows):
        told: dict[str, Any] = {"name": name, "quality": quality.get(name), "bytes": size.get(name)}
        if rows.get(name, {}).get("refused"):
            told["refused"] = rows[name]["refused"]
        elif speeds(timings, EAGER, name, batches):
            told["over eager"] = {str(b): timings.ratio(EAGER, name, b).plain() for b in batches}  # type: ignore[union-attr]
        made.append(told)
    return made


def _against(
    workload: Workload, out: Path, rows: Mapping[str, Any], timings: Timings, batches: Sequence[int], floor: str
) -> dict[str, Any]:
    """The pick against every peer, and which of those within the floor is the fastest."""
    from quadriga.core.metric import Floor

    base = rows["peer: ONNX Runtime float32"]["scores"]  # the unchanged network
    margin = Floor.parse(floor).margin(base.value)
    able = [n for n, r in rows.items() if r["arm"] and speeds(timings, EAGER, n, batches)]
    within = [n for n in able if compare(base, rows[n]["scores"], workload.metric, 0.0, 0.975)["difference"] >= -margin]
    best = max(within, key=lambda n: mean_speed(timings, EAGER, n, batches)) if within else None
    each = {n: {str(b): timings.ratio(n, PICK, b).plain() for b in batches} for n in able}  # type: ignore[union-attr]
    mean = {n: mean_ratio(timings, n, PICK, batches).plain() for n in able}
    return {"pick over": each, "pick over, in the mean": mean, "within": within, "best peer": best}


def table(results: Sequence[Mapping[str, Any]]) -> str:
    """As Markdown, below this file's own text."""
    told = __doc__ or ""
    lines = ["# What the search picks, beside other tools", "", told.partition("\n\n    QUADRIGA")[0].strip(), ""]
    lines += [told.partition("a part of it\n\n")[2].strip(), "", "Made by `python benchmarks/picks.py`.", ""]
    for r in results:
        lines += _section(r)
    return "\n".join(lines)


def _section(r: Mapping[str, Any]) -> list[str]:
    heads = [f"over eager, batch {b}" for b in r["batches"]] + [f"the pick over it, batch {b}" for b in r["batches"]]
    lines = [f"## {r['workload']}", "", f"Floor {r['floor']}, budget {r['budget']}, {r['seconds']:.0f} s used: {r['status']}."]
    lines += ["", f"- families: {', '.join(r['families']) or 'none'}", f"- recipe behind the baseline: {r['recipe'] or 'none'}"]
    lines += [f"- other processes took {r['others']:.0%} of the cores while this was timed", ""]
    lines += [f"| arm | test {r['unit']} | bytes | {' | '.join(heads)} | in the mean |", "|---" * (4 + len(heads)) + "|"]
    for row in r["rows"]:
        name = row["name"].removeprefix("peer: ") + (", within the floor" if row["name"] in r["within"] else "")
        if "refused" in row:
            lines.append(f"| {name} | refused: {row['refused']} |" + " |" * (2 + len(heads)))
            continue
        over = [interval(row.get("over eager", {}).get(str(b))) for b in r["batches"]]
        mine = [interval(r["pick over"].get(row["name"], {}).get(str(b))) for b in r["batches"]]
        cells = [*over, *mine, interval(r["pick over, in the mean"].get(row["name"]))]
        lines.append(f"| {name} | {row['quality']:.2f} | {row['bytes']:,.0f} | {' | '.join(cells)} |")
    return [*lines, ""]


def interval(found: Mapping[str, Any] | None) -> str:
    """A ratio with its interval, as a cell."""
    if found is None:
        return "–"
    if found["verdict"] == UNMEASURED:
        return "not measured well enough"
    return f"{found['value']:.2f} ({found['low']:.2f} to {found['high']:.2f})"


def asked(about: str, work: str) -> argparse.Namespace:
    """The command line's options."""
    parser = argparse.ArgumentParser(description=about.splitlines()[0])
    parser.add_argument("--only", action="append", help="a workload of the list, by the beginning of its name")
    parser.add_argument("--budget", help="of each search, such as 20m")
    parser.add_argument("--restarts", type=int, default=8)
    parser.add_argument("--work", type=Path, default=Path(work))
    return parser.parse_args()


def keep(name: str, result: Plain, kept: Path, page: Path, table: Callable[[Sequence[Plain]], str]) -> None:
    """Put a workload's result among those that are known, and write their page."""
    known = {r["workload"]: r for r in read_json(kept)["workloads"]} if kept.exists() else {}
    known[name] = result
    write_json(kept, {"workloads": list(known.values())})
    atomic_write(page, table(list(known.values())))


def main() -> None:
    """The workloads that are asked for."""
    options = asked(__doc__ or "", "out/picks")
    for name, (floor, budget) in TASKS.items():
        if options.only and not any(name.startswith(o) for o in options.only):
            continue
        result = compared(name, floor, options.budget or budget, options.work, options.restarts)
        keep(name, result, KEPT, TABLE, table)
        print("\n".join(_section(result)))


if __name__ == "__main__":
    main()
