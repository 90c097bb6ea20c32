"""Models as people bring them: every form through `check`, `train` in four runtimes and a short `run`, held against PyTorch.

    python benchmarks/user_models.py                        # go on where the last call stopped: hours, with --again
    python benchmarks/user_models.py --cells check,eager    # some cells; the rest later
    python benchmarks/user_models.py --only packed,stft     # some forms; prints, and writes no page

Each form is a function of `networks/user_forms_*.py`, in a fresh process with a time limit. An artifact is loaded by its own
load.py in a process without Quadriga, and its outputs at batch 1, 3 and 64 are compared with those of the user's own module
with the checkpoint's weights; the quality that was stated is compared with what ten lines of PyTorch score. A cell is ✓ where
all of this holds, – where it was refused in a sentence, ✗ where an output or a quality is wrong, ! where a trace is ours.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from user_models_forms import forms

ROOT = Path(__file__).parents[1]
PLACE = Path("out/user_models")
RESULTS, PAGE = ROOT / "benchmarks/results/user_models.json", ROOT / "docs/user_models.md"
RUNTIMES = ("eager", "onnxruntime", "openvino", "inductor")
CELLS = ("check", *RUNTIMES, "run")
MARKS = {"works": "✓", "refused": "–", "wrong": "✗", "crashed": "!", "": ""}
LIMIT, BUDGET, FLOOR = 400, "60s", "-30%rel"  # seconds of a process; of a study, and a floor that 64 examples can prove
Cell = dict[str, Any]


def attempted(action: Any) -> Cell:
    """What an action of Quadriga's came to: done, refused in a sentence, or a trace of ours."""
    from quadriga.core.errors import BadInput, Diverged, NotApplicable

    try:
        return {"verdict": "works", **(action() or {})}
    except (BadInput, NotApplicable) as error:
        text = str(error)
        return {"verdict": "crashed" if ": failed" in text else "refused", "says": text}
    except Diverged as error:
        return {"verdict": "refused", "says": str(error)}
    except Exception as error:
        import traceback

        traceback.print_exc()
        return {"verdict": "crashed", "says": f"{type(error).__name__}: {error}"[:400]}


def child(name: str, file: str, folder: Path, wanted: list[str]) -> dict[str, Cell]:
    """`check`, and `train` in each runtime that is wanted, in this process."""
    import torch

    from quadriga import study, workloads
    from quadriga.core.recipe import Recipe, step
    from quadriga.workloads.check import check

    torch.set_num_threads(1)
    reference = f"{file}:{name}"

    def train(runtime: str) -> Cell:
        torch.compiler.reset()
        recipe = Recipe((step("train", baseline=True), *([] if runtime == "eager" else [step(runtime)])), runtime)
        result = study.train(workloads.load(reference), recipe=recipe, out=folder / runtime)
        if result.get("artifact"):
            return {"quality": result["quality"]}
        error = result.get("error") or {"message": result.get("note") or "no artifact"}
        return {"verdict": "refused", "says": "; ".join(filter(None, [error["message"], error.get("remedy")]))}

    actions = {"check": lambda: {"notes": check(workloads.load(reference))}}
    actions |= {runtime: lambda r=runtime: train(r) for runtime in RUNTIMES}
    return {cell: attempted(actions[cell]) for cell in wanted if cell in actions}


def process(words: list[str], limit: float, threads: int = 1) -> subprocess.CompletedProcess[str]:
    """A fresh process with so many threads; one that passes its limit is ended with the processes that it started."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    started = subprocess.Popen(
        [sys.executable, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
        start_new_session=True,
    )  # fmt: skip
    try:
        out, err = started.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        os.killpg(started.pid, 9)
        out, err = started.communicate()
        err += f"\nno end after {limit:g} s"
    return subprocess.CompletedProcess(words, started.returncode, out, err)


def last_json(text: str) -> Any:
    """The last line that is a JSON object; None without one."""
    lines = [line for line in text.splitlines() if line.startswith("{")]
    return json.loads(lines[-1]) if lines else None


def studied(name: str, file: Path, folder: Path) -> Cell:
    """A short `run`, by the command line."""
    reference = f"{file}:{name}"
    words = ["-m", "quadriga", "run", reference, "--budget", BUDGET, f"--floor={FLOOR}", "--out", str(folder / "run"), "--json"]
    done = process(words, LIMIT, threads=2)
    result = last_json(done.stdout)
    if result is None or "an error inside" in done.stderr:
        return {"verdict": "crashed", "says": "\n".join(done.stderr.strip().splitlines()[-3:])[:400]}
    if error := result.get("error"):
        return {"verdict": "refused", "says": "; ".join(filter(None, [error["message"], error.get("remedy", "")]))}
    told = {"status": result["status"], "seconds": round(result["seconds"])}
    if result["artifact"] is None:
        why = (result.get("nearest_miss") or {}).get("why") or "; ".join(result.get("notes", [])) or result["status"]
        return {"verdict": "refused", "says": why, **told}
    return {"verdict": "works", **told}


def held(cell: Cell, found: Cell) -> Cell:
    """A cell that seemed to work, after the comparison."""
    if "raised" in found:
        return {**cell, "verdict": "wrong", "says": f"the artifact or its reference raised {found['raised']}"}
    apart, allowed = found.get("difference", 0.0), found.get("allowed", 0.0)
    if not apart <= allowed:
        return {**cell, **found, "verdict": "wrong", "says": f"{apart:.2g} apart, allowed {allowed:g}; {found['where']}"}
    said, scored = found.get("quality"), found.get("scored")
    if said is not None and abs(said - scored) > max(0.02 * abs(said), 1e-3):
        return {**cell, **found, "verdict": "wrong", "says": f"quality {said:.4g} is stated, and {scored:.4g} is scored"}
    return {**cell, **found}


def tried(name: str, one: Any, wanted: list[str]) -> dict[str, Cell]:
    """The cells of a form that are wanted."""
    folder = PLACE / name
    shutil.rmtree(folder, ignore_errors=True)
    cells: dict[str, Cell] = {}
    if inside := [cell for cell in wanted if cell != "run"]:
        words = ["--child", name, "--file", str(one.file), "--place", str(folder), "--cells", ",".join(inside)]
        done = process([__file__, *words], LIMIT)
        said = "\n".join(done.stderr.strip().splitlines()[-3:])[:400]
        cells = last_json(done.stdout) or {cell: {"verdict": "crashed", "says": said} for cell in inside}
    if "run" in wanted:
        cells["run"] = studied(name, one.file, folder)
    ready = [cell for cell, found in cells.items() if cell != "check" and found["verdict"] == "works"]
    if ready:
        compare = str(Path(__file__).with_name("user_models_compare.py"))
        found = process([compare, name, *(str(folder / cell) for cell in ready)], LIMIT)
        told = last_json(found.stdout) or {cell: {"raised": found.stderr.strip()[-400:]} for cell in ready}
        cells |= {cell: held(cells[cell], told[cell]) for cell in ready}
    shutil.rmtree(folder, ignore_errors=True)
    return cells


def without_paths(cell: Cell) -> Cell:
    """A cell whose sentence names files by their place in the checkout."""
    return {**cell, "says": cell["says"].replace(f"{ROOT}{os.sep}", "")} if "says" in cell else cell


def page(known: dict[str, Any]) -> Iterator[str]:
    """Markdown."""
    cells = [c for row in known.values() for c in row["cells"].values()]
    counts = Counter(c["verdict"] for c in cells)
    yield "# Models as people bring them\n"
    yield "Made by `make bench-user-models` (`python benchmarks/user_models.py`). " + " ".join(
        (__doc__ or "").split("\n\n")[2].split("\n")
    )
    told = ", ".join(f"{counts[v]} {v}" for v in ("works", "refused", "wrong", "crashed"))
    yield f"\n**{len(known)} forms, {len(cells)} cells: {told}.** Forms by their worst cell: {worst(known)}.\n"
    if absent := len(known) * len(CELLS) - len(cells):
        yield f"{absent} cells are empty: they have not been run yet, and the same command runs them.\n"
    yield "| form | | " + " | ".join(CELLS) + " |"
    yield "|---" * (len(CELLS) + 2) + "|"
    for name, row in known.items():
        marks = [MARKS[row["cells"].get(c, {}).get("verdict", "")] for c in CELLS]
        yield f"| `{name}` | {row['about']} | " + " | ".join(marks) + " |"
    yield "\n## What was said where a form does not work\n"
    for name, row in known.items():
        yield from sentences(name, row, known.get(row["out"]))


def worst(known: dict[str, Any]) -> str:
    """How many forms work everywhere, are refused somewhere, and so on."""
    order = ("crashed", "wrong", "refused", "works")
    found = Counter(next(v for v in order if any(c["verdict"] == v for c in row["cells"].values())) for row in known.values())
    names = {"works": "work everywhere", "refused": "are refused somewhere", "wrong": "are wrong", "crashed": "crash"}
    return ", ".join(f"{found[v]} {names[v]}" for v in reversed(order))


def sentences(name: str, row: dict[str, Any], way: dict[str, Any] | None) -> Iterator[str]:
    """Each sentence once, with the cells that said it; then how the form fares that goes the way out."""
    said: dict[tuple[str, str], list[str]] = {}
    for cell, found in row["cells"].items():
        if found["verdict"] != "works":
            said.setdefault((found["verdict"], " ".join(found.get("says", "").split())), []).append(cell)
    for (verdict, text), where in said.items():
        yield f"- `{name}`, {', '.join(where)}: **{verdict}**. {text}"
    if way and said:
        good = [c for c, found in way["cells"].items() if found["verdict"] == "works"]
        yield f"  - The way out, tried: `{row['out']}` ({way['about']}) works in {', '.join(good)}."


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="forms, comma-separated; prints, and writes no page")
    parser.add_argument(
        "--cells", help=f"of {', '.join(CELLS)}; comma-separated; none: the page of what is known", default=",".join(CELLS)
    )
    parser.add_argument("--again", action="store_true", help="also what is known already")
    for hidden in ("--child", "--file", "--place"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    given = parser.parse_args()
    wanted = [cell for cell in CELLS if cell in given.cells.split(",")]
    if given.child:
        print(json.dumps(child(given.child, given.file, Path(given.place), wanted)))
        return 0
    every = forms()
    known = gone_through(given.only.split(",") if given.only else list(every), wanted, every, given.again)
    if given.only:
        print("\n".join(page(known)))
    else:
        RESULTS.write_text(json.dumps(known, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        PAGE.write_text("\n".join(page(known)) + "\n", encoding="utf-8")
    counts = Counter(c["verdict"] for row in known.values() for c in row["cells"].values())
    print(json.dumps({"forms": len(known), **counts}))
    return 1 if counts["wrong"] or counts["crashed"] else 0


def gone_through(names: list[str], wanted: list[str], every: dict[str, Any], again: bool) -> dict[str, Any]:
    """The rows of these forms, from the state or anew."""
    state = PLACE / "state.json"
    last = state if state.exists() else RESULTS
    known = json.loads(last.read_text()) if last.exists() else {}
    for number, name in enumerate(names, 1):
        cells = known.get(name, {}).get("cells", {})
        if missing := [cell for cell in wanted if again or cell not in cells]:
            began = time.monotonic()
            cells |= {cell: without_paths(found) for cell, found in tried(name, every[name], missing).items()}
            known[name] = {"about": every[name].about, "out": every[name].out, "cells": cells}
            PLACE.mkdir(parents=True, exist_ok=True)
            state.write_text(json.dumps(known, indent=1))
            marks = " ".join(f"{cell}:{cells[cell]['verdict']}" for cell in missing)
            print(f"[{number}/{len(names)}] {name} ({time.monotonic() - began:.0f} s) {marks}", file=sys.stderr, flush=True)
    return {name: known[name] for name in names if name in known}


if __name__ == "__main__":
    sys.exit(main())
