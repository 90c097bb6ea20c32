"""Quality at half the latency: `to_latency` against Torch-Pruning's own pipeline, at equal recovery cost.

    QUADRIGA_DATA=shipped python benchmarks/recovery.py --seeds 3    # go on where the last call stopped; hours on two cores
    python benchmarks/recovery.py --quick --ours prune_channels --only resnet20_fashion   # tries the benchmark itself

All arms start from one trained baseline and are recovered alike: same steps, epochs, batches, order and seed. `to_latency` has
its defaults. Latency is that of batch 1 in ONNX Runtime on one thread, timed in turn, each arm in its own process; quality is
that of the whole test split, in pairs. Torch-Pruning is run as its README says (`BasePruner`, group Taylor importance, widths
in multiples of 8, the classifier left out, importance estimated anew in each of five steps) at three ratios. Its best one is
the ratio with the highest test quality among those whose latency is at most 1.1 × the target, else the one nearest to the
target: it is chosen on the test split, in its own favour. Beside them stand the original network under the same recovery, and
the small networks of both trained from scratch for as many epochs as baseline and recovery took together. Prints tables and
writes one JSON file.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from opponents import Reinitialize, TorchPruning, register

from quadriga.core.files import atomic_write, read_json, write_json
from quadriga.core.recipe import Recipe, Step, step
from quadriga.core.workload import Workload
from quadriga.engine.tasks import Desk
from quadriga.measure.latency import paired
from quadriga.measure.machine import facts
from quadriga.measure.quality import Scores
from quadriga.measure.stats import paired_bootstrap_lower
from quadriga.measure.timings import Timings
from quadriga.verify.quality import compare
from quadriga.workloads import load

TABLE = Path(__file__).resolve().parents[1] / "docs/recovery.md"
TARGET, SLACK, LEVEL = 0.5, 1.1, 0.95  # of latency; of the opponent's eligibility; of two-sided intervals of quality
RATIOS = (0.3, 0.4, 0.5)
FINISH = (step("threads", count=1), step("onnxruntime"))


@dataclass(frozen=True)
class Task:
    """How a workload's networks are recovered, and trained from scratch: an optimizer step each, linear to zero."""

    recovery: Step
    epochs: float
    scratch: Step


TASKS = {
    "resnet20_fashion": Task(
        step("optimizer", kind="sgd", lr=0.05, momentum=0.9), 5, step("optimizer", kind="sgd", lr=0.1, momentum=0.9)
    ),
    "mobilenetv2_fashion": Task(step("optimizer", kind="adamw", lr=0.0005), 3, step("optimizer", kind="adamw", lr=0.001)),
}


def recipes(workload: Workload, task: Task, options: argparse.Namespace) -> dict[str, Recipe]:
    """Arm → recipe, without those from scratch. All share the steps up to the trained baseline."""
    assert workload.baseline is not None
    start = scaled((step("channels_last"), *workload.baseline.steps), options.scale)
    helped = (step("distill", temperature=2.0, alpha=0.5),) if options.distill else ()
    learned = (*helped, task.recovery, step("schedule", kind="linear"), step("train", epochs=task.epochs))
    after = (*scaled(learned, options.scale), *FINISH)
    found = {"baseline": Recipe((*start, *FINISH)), "original, recovered": Recipe((*start, *after))}
    found["ours"] = Recipe((*start, ours(options.ours), *after))
    for ratio in options.ratios:
        found[tp_name(ratio)] = Recipe((*start, step("torch_pruning", ratio=ratio, ranking=options.ranking), *after))
    return found


def ours(method: str) -> Step:
    """The step of ours; another method than `to_latency` tries the benchmark itself."""
    fields = {"to_latency": {"target": TARGET}, "prune_channels": {"scope": "layer", "round_to": 8}}
    return step(method, **fields[method])


def tp_name(ratio: float) -> str:
    """What the opponent's arm is called."""
    return f"Torch-Pruning {ratio:g}"


def scaled(steps: Sequence[Step], scale: float) -> tuple[Step, ...]:
    """Steps with the epochs of every `train` multiplied."""
    return tuple(Step(s.method, {**s.fields, "epochs": s.fields["epochs"] * scale}) if s.is_train else s for s in steps)


def from_scratch(recipe: Recipe, task: Task) -> Recipe:
    """The recipe's small network, drawn anew and trained once, for the epochs of all its train steps together."""
    places = [i for i, s in enumerate(recipe.steps) if s.is_train]
    epochs = sum(recipe.steps[i].fields["epochs"] for i in places)
    cut = recipe.steps[: places[-2] + 2]  # up to the step that makes the network small
    return Recipe(
        (*cut, step("reinitialize"), task.scratch, step("schedule", kind="linear"), step("train", epochs=epochs), *FINISH)
    )


class Bench:
    """One workload and seed: trains and scores arms, once each, and times them.

    Args:
        workload: loaded.
        folder: keeps checkpoints, built models, scores and `arms.json`.
        seed: of everything random.
    """

    def __init__(self, workload: Workload, folder: Path, seed: int) -> None:
        self.workload, self.folder, self.seed = workload, folder, seed
        folder.mkdir(parents=True, exist_ok=True)
        self._same_data(folder / "data.json")
        self.desk = Desk(workload, folder, seed)
        self.done: dict[str, Any] = read_json(folder / "arms.json") if (folder / "arms.json").exists() else {}

    def _same_data(self, path: Path) -> None:
        """What is kept was learnt from the data of the workload."""
        now = dict(self.workload.data_note)
        if path.exists() and (kept := read_json(path)) != now:
            told = f"{path.parent} holds arms of {kept.get('data')}, {kept.get('source')}; this is {now.get('source')}"
            sys.exit(f"{told}: set QUADRIGA_DATA, or give another --work")
        write_json(path, now)

    def arm(self, name: str, recipe: Recipe) -> None:
        """Train, realise and score an arm, unless that was done."""
        if self.done.get(name, {}).get("recipe") == recipe.plain():
            return
        said = f"{self.workload.name}, seed {self.seed}, {name}"
        print(f"[recovery] {said}: {recipe}", file=sys.stderr, flush=True)
        key = name.replace(" ", "-").replace(",", "")
        args = {"recipe": recipe.plain(), "hash": recipe.hash, "name": key, "batches": [1, self.workload.batch_size]}
        made = self.ask("realize", args, said)
        scored = self.ask("score", {**args, "split": "test", "folder": f"work/built/{key}"}, said)
        values = {**made["values"], "quality": scored["values"]["quality"]}
        self.done[name] = {"recipe": recipe.plain(), "key": key, "checkpoint": made["info"]["checkpoint"], **values}
        write_json(self.folder / "arms.json", self.done)
        print(f"[recovery] {said}: {values['quality']:.2f}, {values['seconds']:.0f} s", file=sys.stderr, flush=True)

    def ask(self, task: str, args: Mapping[str, Any], said: str) -> dict[str, Any]:
        """A task of the desk; stops everything when it fails."""
        result = self.desk.do(task, args)
        if result["status"] != "complete":
            sys.exit(f"{said}: {result['status']}: {result.get('reason')}")
        return result

    def latencies(self, names: Sequence[str], restarts: int) -> dict[str, dict[str, float]]:
        """Arm → latency as a part of the baseline's, with its 99 % interval; timed once for one set of networks."""
        key = [[name, self.done[name]["recipe"]] for name in names]
        path = self.folder / "timings.json"
        kept = read_json(path) if path.exists() else {}
        if kept.get("key") != key or kept.get("restarts") != restarts:
            arms = {
                name: {"kind": "folder", "path": str(self.folder / "work/built" / self.done[name]["key"])} for name in names
            }
            inputs = {1: self.workload.inputs(1)}
            made = paired(arms, inputs, restarts=restarts, blocks=8, block_seconds=0.05, folder=self.folder / "work/timing")
            kept = {"key": key, "restarts": restarts, "timings": made.plain()}
            write_json(path, kept)
        timings = Timings.from_plain(kept["timings"])
        faster = {name: timings.ratio("baseline", name, 1) for name in names}
        return {n: {"value": 1 / r.value, "low": 1 / r.high, "high": 1 / max(r.low, 1e-9)} for n, r in faster.items() if r}

    def scores(self, name: str) -> Scores:
        """An arm's predictions on the test split."""
        return Scores.load(self.folder / "scores" / f"test-{self.done[name]['key']}.npz")


def difference(benches: Sequence[Bench], a: str, b: str) -> dict[str, Any]:
    """Quality of arm a minus arm b in points, mean over seeds, with an interval over examples for these trainings.

    One seed: Tango's interval. Several: each example's values are averaged over seeds, then a paired bootstrap-t.
    """
    metric = benches[0].workload.metric
    each = [compare(bench.scores(b), bench.scores(a), metric, 0.0, (1 + LEVEL) / 2) for bench in benches]
    back = [compare(bench.scores(a), bench.scores(b), metric, 0.0, (1 + LEVEL) / 2) for bench in benches]
    found = {"seeds": [e["difference"] for e in each], "method": each[0]["method"]}
    if len(benches) == 1:
        return {**found, "value": each[0]["difference"], "low": each[0]["low"], "high": -back[0]["low"]}
    first, second = (metric.scale * np.mean([bench.scores(n).values for bench in benches], axis=0) for n in (a, b))
    low, high = (paired_bootstrap_lower(*pair, level=(1 + LEVEL) / 2) for pair in ((second, first), (first, second)))
    method = "paired bootstrap-t over examples, values averaged over seeds"
    return {**found, "method": method, "value": low.value, "low": low.low, "high": -high.low}


def best(latency: Mapping[str, float], quality: Mapping[str, float]) -> str:
    """The opponent's best arm, by the rule at the top of this file.

    Example:
        >>> best({"a": 0.52, "b": 0.4, "c": 0.9}, {"a": 91.0, "b": 92.0, "c": 93.0})
        'b'
        >>> best({"a": 0.6, "b": 0.9}, {"a": 91.0, "b": 92.0})
        'a'
    """
    able = [name for name, value in latency.items() if value <= SLACK * TARGET]
    return max(able, key=lambda n: quality[n]) if able else min(latency, key=lambda n: abs(latency[n] - TARGET))


def measure(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """All arms of one workload, for all seeds."""
    task, workload = TASKS[name], load(name)
    planned = recipes(workload, task, options)
    benches = [Bench(workload, options.work / name / f"seed-{seed}", seed) for seed in range(options.seeds)]
    timed = [n for n in planned if n != "original, recovered"]
    latency: list[dict[str, dict[str, float]]] = []
    for bench in benches:
        for arm, recipe in planned.items():
            bench.arm(arm, recipe)
        latency.append(bench.latencies(timed, options.restarts))
    mean = {
        n: {q: statistics.fmean(b.done[n][q] for b in benches) for q in ("quality", "parameters", "seconds")} for n in planned
    }
    ratio = {n: statistics.geometric_mean(found[n]["value"] for found in latency) for n in timed}
    rivals = [tp_name(r) for r in options.ratios]
    chosen = best({n: ratio[n] for n in rivals}, {n: mean[n]["quality"] for n in rivals})
    small = {f"{n}, from scratch": from_scratch(planned[n], task) for n in ("ours", chosen)}
    for bench in benches:
        for arm, recipe in small.items():
            bench.arm(arm, recipe)
    rows = [row(arm, benches, latency) for arm in (*planned, *small)]
    return {"workload": name, "data": dict(workload.data_note), "unit": workload.metric.unit, "best": chosen, "rows": rows}


def row(arm: str, benches: Sequence[Bench], latency: Sequence[Mapping[str, Mapping[str, float]]]) -> dict[str, Any]:
    """One arm as plain data; lists are over seeds."""
    keys = ("quality", "parameters", "bytes", "seconds", "train_flops")
    found = {key: [bench.done[arm][key] for bench in benches] for key in keys}
    times = [part[arm] for part in latency if arm in part]
    against = difference(benches, "ours", arm) if arm != "ours" else None
    return {"arm": arm, "recipe": benches[0].done[arm]["recipe"], **found, "latency": times, "ours_minus_this": against}


def table(result: Mapping[str, Any]) -> str:
    """A workload's rows in Markdown; a latency for each seed."""
    columns = ("network", "latency (99 %)", "parameters", f"test {result['unit']}", f"ours − this ({LEVEL:.0%})")
    lines = [f"### {result['workload']}", "", f"| {' | '.join(columns)} |", "|---|---|---|---|---|"]
    for r in result["rows"]:
        times = ", ".join(f"{t['value']:.2f} ({t['low']:.2f}–{t['high']:.2f})" for t in r["latency"]) or "of its shape"
        gap = "{value:+.2f} ({low:+.2f} to {high:+.2f})".format(**r["ours_minus_this"]) if r["ours_minus_this"] else ""
        marked = f"**{r['arm']}**" if r["arm"] in ("ours", result["best"]) else r["arm"]
        parameters, quality = (statistics.fmean(r[key]) for key in ("parameters", "quality"))
        lines.append(f"| {marked} | {times} | {parameters:,.0f} | {quality:.2f} | {gap} |")
    return "\n".join(lines) + "\n"


def page(results: Sequence[Mapping[str, Any]], seeds: int) -> str:
    """All tables, with what they are."""
    about = " ".join((__doc__ or "").split("\n\n")[2].split("\n"))
    made = f"Made by `QUADRIGA_DATA={results[0]['data']['source']} python benchmarks/recovery.py --seeds {seeds}`."
    return f"# Quality at half the latency\n\n{made} {about}\n\n" + "\n".join(table(r) for r in results)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=TASKS, action="append", help="a workload; repeatable")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--ratios", type=float, nargs="+", default=RATIOS, help="of Torch-Pruning")
    parser.add_argument("--ranking", choices=("local", "isomorphic"), default="local", help="of Torch-Pruning")
    parser.add_argument("--ours", choices=("to_latency", "prune_channels"), default="to_latency")
    parser.add_argument("--distill", action="store_true", help="recover every arm with the baseline as teacher")
    parser.add_argument("--threads", type=int, default=2, help="of training; timings are on one")
    parser.add_argument("--restarts", type=int, default=8, help="of the timings")
    parser.add_argument(
        "--work", type=Path, default=Path("out/recovery"), help="what every arm leaves, so that it is done once"
    )
    parser.add_argument("--out", type=Path, help="the JSON file; benchmarks/results/recovery.json unless --quick")
    parser.add_argument(
        "--quick", action="store_true", help="a fiftieth of the training and one seed: the numbers mean nothing"
    )
    options = parser.parse_args(arguments)
    options.scale = 0.02 if options.quick else 1
    if options.quick:
        options.seeds, options.restarts, options.work = 1, 2, options.work / "quick"
    options.out = options.out or (options.work if options.quick else Path(__file__).parent / "results") / "recovery.json"
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print the tables, write the file after each workload."""
    options = parse(arguments)
    register(TorchPruning, Reinitialize)
    torch.set_num_threads(options.threads)
    given = {k: getattr(options, k) for k in ("seeds", "ratios", "ranking", "ours", "distill", "threads", "restarts", "scale")}
    results = []
    for name in options.only or TASKS:
        results.append(measure(name, options))
        print(table(results[-1]), flush=True)
        facts_now = {"benchmark": "recovery", "target": TARGET, "level": LEVEL, "options": given, "machine": facts()}
        write_json(options.out, {**facts_now, "workloads": results})
    if not options.quick:
        atomic_write(TABLE, page(results, options.seeds))
    print(json.dumps({"benchmark": "recovery", "out": str(options.out)}))


if __name__ == "__main__":
    main()
