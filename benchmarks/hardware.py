"""Every runtime × precision, other tools' own int8, and what `quadriga run --only hardware` picks: one table a workload.

    QUADRIGA_DATA=shipped python benchmarks/hardware.py                   # goes on where the last call stopped; an hour
    python benchmarks/hardware.py --only lenet_fashion --restarts 4       # a part of it

For each workload every row is realised from the same trained baseline and scored on the whole test split, in the runtime
itself; so are the peers, made as their own documentation says (`hardware_peers.py`), each in its own environment. `quadriga run
--only hardware --minimize latency` searches with half a point, or half a percent, as floor. All are timed in turn, each arm in
its own process, in two rounds: in the first all of them on one thread; in the second, which is what is quoted, eager PyTorch
as it is and at its best setting, the pick, all peers, and the five fastest rows within the floor, on one thread and on two.
Ratios are of wall time with Student's 99 % interval over restarts, or, where a table says so, of processor time of one
thread. "peak" is the part of the measured ceiling of that type's products which batch size 64 reaches. Rows that were refused
say why. Writes a table and one JSON file.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import hardware_peers as peers
from hardware_table import EAGER, PICK, by_processor, mean_speed, ratio_of, speeds, table, verdicts

from quadriga.core.files import atomic_write, read_json, write_json
from quadriga.core.recipe import Recipe, Step, step
from quadriga.core.workload import Workload
from quadriga.engine.base import Order
from quadriga.engine.local import Local, cores
from quadriga.measure.flops import flops as forward_flops
from quadriga.measure.latency import paired
from quadriga.measure.machine import facts
from quadriga.measure.quality import Scores
from quadriga.measure.timings import Timings
from quadriga.verify.quality import compare
from quadriga.workloads import load

ROOT = Path(__file__).resolve().parents[1]
TABLE, KEPT = ROOT / "docs/hardware.md", ROOT / "benchmarks/results/hardware.json"
FLOORS = {"pt": ("-0.5pt", 0.5)}  # unit → floor as it is typed, and its margin; all others half a percent
BEST = 5  # rows that are timed twice
MODELS = ROOT / "benchmarks/finished.py"
TASKS = {  # workload → budget of the search
    "lenet_fashion": "4m",
    f"{MODELS}:resnet20_fashion": "6m",
    f"{MODELS}:lstm_wordnet": "6m",
    f"{MODELS}:prefill_128": "10m",
    f"{MODELS}:decode": "8m",
    "mobilenetv2_fashion": "8m",
    "minilm_wordnet": "8m",
}
FETCHED = ("mobilenetv2_fashion", "minilm_wordnet")  # by `quadriga fetch`

FLOAT, BF16 = (), (step("half_weights", kind="bf16"),)
STATIC, DYNAMIC, WEIGHTS = (
    (step("quantize_int8", activations=kind, **more),)
    for kind, more in (("static", {"calibration": "mse"}), ("dynamic", {}), ("weights", {}))
)
LEFT, INT4 = (step("quantize_int8", calibration="mse", sensitive="float"),), (step("quantize_int4"),)
ROWS = {
    "eager": {"float32": FLOAT, "bf16": BF16, "int8 weights": WEIGHTS},
    "inductor": {"float32": FLOAT, "bf16": BF16, "int8": STATIC},
    "onnxruntime": {
        "float32": FLOAT, "int8": STATIC, "int8, harmful layers float": LEFT, "int8 dynamic": DYNAMIC, "int8 weights": WEIGHTS,
        "int4 weights": INT4,
    },
    "openvino": {
        "float32": FLOAT, "bf16": BF16, "int8": STATIC, "int8, harmful layers float": LEFT, "int8 weights": WEIGHTS,
        "int4 weights": INT4,
    },
    "executorch": {"float32": FLOAT, "int8": STATIC, "int8 dynamic": DYNAMIC},
}  # fmt: skip
TUNED = {
    "1 thread": {"threads": 1},
    "1 thread, channels-last": {"threads": 1, "channels_last": True},
    "channels-last": {"channels_last": True},
    "oneDNN products": {"matmul": "medium"},
    "1 thread, oneDNN products": {"threads": 1, "matmul": "medium"},
}


@dataclass
class Row:
    """An arm: how it is started, and what is known of it.

    Args:
        arm: for `paired`; None where it was refused.
        bytes: of its files.
        precision: of its products, a key of the measured ceilings.
        scores: of the test split.
        refused: why there is no arm.
        steps: of the recipe, without the baseline's.
    """

    arm: Mapping[str, Any] | None
    bytes: float = 0.0
    precision: str = "fp32"
    scores: Scores | None = None
    refused: str = ""
    steps: str = ""
    facts: dict[str, Any] = field(default_factory=dict)


class Bench:
    """One workload: its search, its rows, its timings; all kept in a folder.

    Args:
        name: of the workload.
        work: parent of the folder.
        restarts: of the second round.
        clock: "wall"; or "cpu", for a machine with other work: processor time, all arms on one thread.
    """

    def __init__(self, name: str, work: Path, restarts: int, clock: str) -> None:
        self.clock = clock
        self.name, self.short = name, name.rpartition(":")[2].partition("?")[0]
        self.folder, self.restarts = work / self.short, restarts
        self.realized = self.folder / "rows"
        self.workload: Workload = load(name)
        unit = self.workload.metric.unit
        self.floor, self.margin = FLOORS.get(unit, ("-0.5%rel", None))
        self.batches = (1, 64)

    def search(self, budget: str) -> dict[str, Any]:
        """What `quadriga run` hands over, once."""
        out = self.folder / "study"
        if not (out / "result.json").exists():
            command = ["-m", "quadriga", "run", self.name, "--only", "hardware", "--floor", self.floor, "--minimize", "latency",
                       "--budget", budget, "--out", str(out)]  # fmt: skip
            subprocess.run([sys.executable, *command], check=False)
        found: dict[str, Any] = read_json(out / "result.json")
        return found

    def rows(self) -> dict[str, Row]:
        """Every runtime × precision, realised and scored once, two at a time."""
        wanted = {
            f"{runtime}, {precision}": (runtime, steps) for runtime, kinds in ROWS.items() for precision, steps in kinds.items()
        }
        args = {name: self._args(name, *what) for name, what in wanted.items()}
        made = self._done("realize", args)
        for name, one in made.items():
            if one["status"] == "complete" and not self._live(name, one):
                args[name]["folder"] = f"work/built/{args[name]['name']}"
        scored = self._done(
            "score", {n: {**args[n], "split": "test"} for n, one in made.items() if one["status"] == "complete"}
        )
        return {n: self._row(n, args[n], made[n], scored.get(n)) for n in wanted}

    def _args(self, name: str, runtime: str, steps: Sequence[Step]) -> dict[str, Any]:
        end = () if name == EAGER else (step("threads", count=1), step(runtime))
        recipe = Recipe((*(self.workload.baseline or Recipe()).steps, *steps, *end))
        short = name.replace(" ", "-").replace(",", "")
        return {"recipe": recipe.plain(), "hash": recipe.hash, "name": short, "batches": self.batches}

    def _live(self, name: str, made: Mapping[str, Any]) -> bool:
        return name == EAGER or bool(made["info"]["live"])

    def _done(self, task: str, args: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
        """Results of a task by name; those that are kept are not asked for again."""
        path = self.folder / f"{task}.json"
        kept: dict[str, Any] = read_json(path) if path.exists() else {}
        names = [n for n, a in args.items() if kept.get(n, {}).get("hash") != a["hash"]]
        engine = Local(self.name, self.realized, 0, cores())
        try:
            for number, name in enumerate(names):
                engine.submit(Order(number, task, args[name]))
            for _ in names:
                number, result = wait(engine)
                name = names[number]
                kept[name] = {**result, "hash": args[name]["hash"]}
                told = result.get("reason") or {k: v for k, v in result["values"].items() if k in ("bytes", "quality")}
                print(f"[hardware] {self.short}, {name}: {result['status']}: {told}", file=sys.stderr, flush=True)
                write_json(path, kept)
        finally:
            engine.stop()
        return {name: kept[name] for name in args}

    def _row(self, name: str, args: Mapping[str, Any], made: Mapping[str, Any], scored: Mapping[str, Any] | None) -> Row:
        if scored is None or scored["status"] != "complete":
            return Row(None, refused=str((scored or made).get("reason")))
        recipe, folder = Recipe.from_plain(args["recipe"]), self.realized
        arm = {"kind": "folder", "path": str((folder / "work/built" / args["name"]).resolve())}
        if self._live(name, made):
            arm = self._eager(recipe, made)
        precision = name.partition(", ")[2]
        integers = precision.startswith("int8") and "weights" not in precision
        scores = Scores.load(folder / scored["info"]["scores"])
        steps = Recipe(recipe.steps[len((self.workload.baseline or Recipe()).steps) :])
        return Row(
            arm,
            made["values"]["bytes"],
            "bf16" if "bf16" in precision else "int8" if integers else "fp32",
            scores,
            steps=str(steps),
        )

    def _eager(self, recipe: Recipe, result: Mapping[str, Any]) -> dict[str, Any]:
        kept = result["info"]["checkpoint"]
        path = str((self.realized / "checkpoints" / kept).resolve()) if kept else None
        spec = {} if self.clock == "wall" else {"threads": 1}
        return {"kind": "eager", "workload": self.name, "seed": 0, "recipe": recipe.plain(), "checkpoint": path, "spec": spec}

    def pick(self, found: Mapping[str, Any]) -> Row:
        """The artifact of the search."""
        if found["winner"] is None:
            why = (found.get("nearest_miss") or {}).get("why", "there was no candidate")
            return Row(None, refused=f"nothing, so the unchanged model stays ({found['status']}): {why}")
        folder = self.folder / "study" / "artifact"
        run = peers.scored(self.workload, folder)
        steps = Recipe.from_plain(found["winner"]["recipe"]).steps[len((self.workload.baseline or Recipe()).steps) :]
        size = float(found["winner"]["bytes"]) if "bytes" in found["winner"] else peers.size(folder)
        return Row({"kind": "folder", "path": str(folder.resolve())}, size, scores=run, steps=str(Recipe(tuple(steps))))

    def time(self, rows: Mapping[str, Row], label: str, restarts: int) -> Timings:
        """Time arms in turn; kept under their names."""
        path = self.folder / f"{label}.json"
        key = {name: dict(row.arm) for name, row in sorted(rows.items()) if row.arm}
        kept = read_json(path) if path.exists() else {}
        if kept.get("key") != key or kept.get("restarts") != restarts:
            inputs = {b: self.workload.inputs(b) for b in self.batches}
            made = paired(key, inputs, restarts=restarts, blocks=6, block_seconds=0.05, folder=self.folder / label,
                          timeout=600)  # fmt: skip
            kept = {"key": key, "restarts": restarts, "timings": made.plain()}
            write_json(path, kept)
        timings = Timings.from_plain(kept["timings"])
        return timings if self.clock == "wall" else by_processor(timings)

    def within(self, row: Row, base: Scores) -> bool:
        """Whether the test score is within the floor (as measured, not as proved)."""
        if row.scores is None:
            return False
        margin = 0.005 * abs(base.value) if self.margin is None else self.margin
        return bool(self.workload.metric.gain(row.scores.value, base.value) >= -margin)

    def tuned(self, rows: Mapping[str, Row]) -> Row:
        """Eager PyTorch at the best of its settings, by a first timing of them all."""
        base = rows[EAGER]
        arms = {name: Row({**base.arm, "spec": spec}) for name, spec in TUNED.items()} if base.arm else {}
        timings = self.time({"as it is": base, **arms}, "tuned", 2)
        done = [n for n in arms if speeds(timings, "as it is", n, self.batches)]
        best = max(done, key=lambda n: mean_speed(timings, "as it is", n, self.batches))
        return Row(arms[best].arm, base.bytes, scores=base.scores, steps=best)

    def run(self, budget: str) -> dict[str, Any]:
        """All of it, as plain data."""
        rows, others, first = self.prepare()
        base = rows[EAGER].scores
        assert base is not None
        found = self.search(budget)
        able = [n for n, r in rows.items() if r.arm and not n.startswith("eager") and self.within(r, base)]
        able = [n for n in able if speeds(first, EAGER, n, self.batches)]
        best = sorted(able, key=lambda n: -mean_speed(first, EAGER, n, self.batches))[:BEST]
        quoted = {n: rows[n] for n in (EAGER, "eager, tuned", *best)}
        quoted |= {f"{n}, 2 threads": on_two_threads(rows[n]) for n in best if self.clock == "wall"}
        quoted |= {n: r for n, r in others.items() if r.arm} | {PICK: self.pick(found)}
        second = self.time(quoted, "second", self.restarts)
        return self.plain({**rows, **others, **quoted}, first, second, base, found)

    def prepare(self) -> tuple[dict[str, Row], dict[str, Row], Timings]:
        """Rows, peers, and the first round of their timings: all that does not depend on the search."""
        rows = self.rows()
        rows["eager, tuned"] = self.tuned(rows)
        others = {name: Row(**made) for name, made in peers.make(self.workload, self.folder, rows[EAGER].arm).items()}
        return rows, others, self.time({**rows, **others}, "first", 2)

    def plain(
        self, rows: Mapping[str, Row], first: Timings, second: Timings, base: Scores, found: Mapping[str, Any]
    ) -> dict[str, Any]:
        """The table's data."""
        flops = 64 * forward_flops(self.workload.build(0).eval(), self.workload.inputs(1))
        limits = peers.ceilings_on_one_thread()
        made = [self._plain(n, r, first, second, base, flops, limits) for n, r in rows.items()]
        return {"workload": self.short, "metric": self.workload.metric.name, "unit": self.workload.metric.unit,
                "clock": self.clock,
                "floor": self.floor, "data": dict(self.workload.data_note), "status": found["status"], "rows": made,
                **verdicts(made, second, self.batches), "machine": facts()}  # fmt: skip

    def _plain(
        self, name: str, row: Row, first: Timings, second: Timings, base: Scores, flops: float, limits: Mapping[str, float]
    ) -> dict[str, Any]:
        where = second if second.seconds[1].get(name) else first
        told = {"name": name, "refused": row.refused or where.errors.get(name, ""), "steps": row.steps, "bytes": row.bytes,
                "quoted": where is second, "within": self.within(row, base)}  # fmt: skip
        if row.scores is not None:
            quality = compare(base, row.scores, self.workload.metric, 0.0, 0.975)
            told |= {"quality": quality["value"], "difference": quality["difference"]}
        for rival in (EAGER, "eager, tuned"):
            told[f"over {rival}"] = {str(b): r.plain() for b in self.batches if (r := ratio_of(where, rival, name, b))}
        one = where.latency(64, name) if name in where.seconds[64] else None
        if one is not None and limits.get(row.precision):
            told |= {"startup": min(where.startup[name]), "peak": flops / one.value / limits[row.precision]}
        return told


def on_two_threads(row: Row) -> Row:
    """The same files, told to use two threads."""
    assert row.arm is not None
    here = Path(row.arm["path"])
    there = here.with_name(f"{here.name}-2-threads")
    shutil.rmtree(there, ignore_errors=True)
    shutil.copytree(here, there)
    write_json(there / "runtime.json", {**read_json(there / "runtime.json"), "threads": 2})
    return Row({"kind": "folder", "path": str(there)}, row.bytes, row.precision, row.scores, steps=row.steps)


def wait(engine: Local) -> tuple[int, dict[str, Any]]:
    """The next result of an engine."""
    while True:
        if (done := engine.wait(5.0)) is not None:
            return done


def keep(results: Sequence[Mapping[str, Any]]) -> None:
    """Put results in the place of earlier ones of the same workloads, and write the table anew."""
    kept = {r["workload"]: r for r in read_json(KEPT)["workloads"]} if KEPT.exists() else {}
    kept.update({r["workload"]: r for r in results})
    write_json(KEPT, {"workloads": list(kept.values())})
    atomic_write(TABLE, table(list(kept.values()), __doc__ or ""))


def main() -> None:
    """The workloads that are asked for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", action="append", help="a workload of the list, by the beginning of its name")
    parser.add_argument("--restarts", type=int, default=6)
    parser.add_argument(
        "--clock", choices=("wall", "cpu"), default="wall", help="cpu: processor time of one thread, beside other work"
    )
    parser.add_argument("--budget", help="of each search, such as 4m")
    parser.add_argument("--work", type=Path, default=Path("out/hardware"))
    options = parser.parse_args()
    for name, budget in TASKS.items():
        short = name.rpartition(":")[2]
        if options.only and not any(short.startswith(o) for o in options.only):
            continue
        if name in FETCHED and not peers.fetched(name):
            print(f"[hardware] {name} is left out: quadriga fetch {name}", file=sys.stderr)
            continue
        result = Bench(name, options.work, options.restarts, options.clock).run(options.budget or budget)
        keep([result])
        print(table([result], __doc__ or ""))


if __name__ == "__main__":
    main()
