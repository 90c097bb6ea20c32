"""What training costs at equal quality: recipes that `quadriga run --minimize train_cost` found, against tuned baselines.

    QUADRIGA_DATA=shipped python benchmarks/train_cost.py              # goes on where the last call stopped; hours on two cores
    python benchmarks/train_cost.py --only lenet_fashion --seeds 2     # a part of it

Three stages for each workload, each kept under --work. *Tune*: the AdamW one-cycle baseline at several rates, the best on val
(lenet_fashion keeps the mission's own SGD, whose rate was tuned before). *Find*: `quadriga run --minimize train_cost` on the
workload with that baseline. *Compare*: baseline and found recipe are trained from fresh weights with each seed, in turn, each
in a process of its own on one thread (two seeds at a time on two cores), and scored on test. Ratios are of processor time of
whole trainings, baseline over found, with Student's interval over the seeds' logs; quality is compared by a paired t test over
the seeds. A found recipe that ends no worse than the baseline ends has reached the baseline's final quality within that time.
"steps" counts updates of equal batches. Prints a table and writes it.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from scipy import stats

from quadriga.core.files import atomic_write, read_json, write_json
from quadriga.core.recipe import Recipe, step
from quadriga.measure.machine import facts
from quadriga.measure.stats import ratio

ROOT = Path(__file__).resolve().parents[1]
TABLE, KEPT = ROOT / "docs/train_cost.md", ROOT / "benchmarks/results/train_cost.json"
SINGLE = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
LEVEL = 0.99


@dataclass(frozen=True)
class Task:
    """A workload and how it is searched.

    Args:
        epochs: of the AdamW one-cycle baseline; 0 keeps the workload's own.
        rates: to be tried for it.
        floor, budget: of the search; the floor has to be proved on test, for which the found recipe has to end better there
            than the baseline, by the width of the interval less the floor.
        goal: the ratio that is asked for.
        tried: seeds with which the rates are tried, none of which the comparison uses; the mean counts.
    """

    epochs: float
    rates: tuple[float, ...]
    floor: str
    budget: str
    goal: float
    tried: tuple[int, ...] = (100,)


TASKS = {
    "lenet_fashion": Task(0, (), "-0.3pt", "4m", 4.0),
    "resnet20_fashion": Task(4, (1e-3, 3e-3, 1e-2, 3e-2), "-0.3pt", "22m", 2.0, (100, 101)),
    "gpt_shakespeare?size=2M": Task(0.15, (1e-3, 2e-3, 4e-3, 8e-3), "+0.2%rel", "24m", 1.6),
    "gpt_shakespeare?size=10M": Task(0.15, (1e-3, 2e-3, 4e-3), "+0.2%rel", "60m", 1.6),
}
SEEDS = {"gpt_shakespeare?size=10M": 1}


def one_cycle(rate: float, epochs: float) -> Recipe:
    """The baseline that is tuned."""
    return Recipe((step("optimizer", kind="adamw", lr=rate), step("schedule", kind="one_cycle"), step("train", epochs=epochs)))


class Bench:
    """All stages; what is done is kept in `rows.json` and `tuned.json`.

    Args:
        work: folder.
        seeds: to be compared, of workloads that name no number of their own.
        jobs: trainings at a time, of different seeds or rates.
    """

    def __init__(self, work: Path, seeds: int, jobs: int) -> None:
        self.work, self.seeds, self.jobs, self.lock = work, seeds, jobs, threading.Lock()
        work.mkdir(parents=True, exist_ok=True)
        self.rows = read_json(work / "rows.json") if (work / "rows.json").exists() else {}
        self.tuned = read_json(work / "tuned.json") if (work / "tuned.json").exists() else {}

    def trained(self, name: str, recipe: Recipe, seed: int, split: str) -> dict[str, float]:
        """One training in a process of its own, once."""
        key = f"{name} {recipe.hash} {seed} {split}"
        if key not in self.rows:
            asked = json.dumps({"name": name, "recipe": recipe.plain(), "seed": seed, "split": split})
            done = subprocess.run([sys.executable, __file__, "--child", asked], stdout=subprocess.PIPE, check=True, text=True,
                                  env={**os.environ, **SINGLE})  # fmt: skip
            with self.lock:
                self.rows[key] = json.loads(done.stdout.splitlines()[-1])
                write_json(self.work / "rows.json", self.rows)
            print(f"[train_cost] {name}, seed {seed}, {recipe}: {self.rows[key]}", file=sys.stderr, flush=True)
        return self.rows[key]

    def tune(self, name: str, task: Task) -> None:
        """The best rate on val."""
        if task.rates and name not in self.tuned:
            better = max if "gpt" not in name else min  # bits per byte
            asked = [(rate, seed) for rate in task.rates for seed in task.tried]
            with ThreadPoolExecutor(self.jobs) as pool:
                found = list(
                    pool.map(lambda a: self.trained(name, one_cycle(a[0], task.epochs), a[1], "val")["quality"], asked)
                )
            means = {rate: mean(q for q, (r, _) in zip(found, asked, strict=True) if r == rate) for rate in task.rates}
            self.tuned[name] = one_cycle(better(means, key=means.__getitem__), task.epochs).plain()
        write_json(self.work / "tuned.json", self.tuned)

    def baseline(self, name: str) -> Recipe:
        """The tuned recipe, or the workload's own."""
        from quadriga.workloads import load

        return Recipe.from_plain(self.tuned[name]) if name in self.tuned else load(name).baseline or Recipe()

    def find(self, name: str, task: Task) -> Recipe:
        """What `quadriga run` hands over.

        Raises:
            SystemExit: it found nothing.
        """
        from tuned import NAMES

        reference = f"{ROOT / 'benchmarks/tuned.py'}:{NAMES[name]}" if name in self.tuned else name
        out = self.work / re.sub(r"\W+", "-", name)
        if not (out / "result.json").exists():
            command = ["-m", "quadriga", "run", reference, "--floor", task.floor, "--minimize", "train_cost", "--budget",
                       task.budget, "--out", str(out)]  # fmt: skip
            subprocess.run([sys.executable, *command], check=False)
        winner = read_json(out / "result.json")["winner"]
        if winner is None:
            sys.exit(f"{name}: nothing was found; see {out / 'report.md'}")
        return Recipe.from_plain(winner["recipe"])

    def compare(self, name: str, found: Recipe, goal: float) -> dict[str, Any]:
        """Both arms with every seed, in turn."""
        base = self.baseline(name)

        def pair(seed: int) -> tuple[dict[str, float], dict[str, float]]:
            arms = {r.hash: self.trained(name, r, seed, "test") for r in ((base, found), (found, base))[seed % 2]}
            return arms[base.hash], arms[found.hash]

        with ThreadPoolExecutor(self.jobs) as pool:
            pairs = list(pool.map(pair, range(SEEDS.get(name, self.seeds))))
        times = ratio(*([[p[arm]["cpu_seconds"]] for p in pairs] for arm in (0, 1)), level=LEVEL).plain()
        steps = mean(a["steps"] for a, _ in pairs) / mean(b["steps"] for _, b in pairs)
        sign = -1 if "gpt" in name else 1
        gains = [sign * (b["quality"] - a["quality"]) for a, b in pairs]
        return {"name": name, "baseline": str(base), "found": str(found), "seeds": len(pairs), "time": times, "steps": steps,
                "goal": goal, "quality": [mean(p[i]["quality"] for p in pairs) for i in (0, 1)], **paired_t(gains)}  # fmt: skip


def paired_t(gains: list[float]) -> dict[str, Any]:
    """Mean gain, its 98 % interval (one-sided 99 %), and how many seeds gained."""
    if len(gains) < 2:
        return {"gain": gains[0], "low": None, "high": None, "better": sum(g > 0 for g in gains)}
    half = stats.t.ppf(0.99, len(gains) - 1) * stats.sem(gains)
    return {"gain": mean(gains), "low": mean(gains) - half, "high": mean(gains) + half, "better": sum(g > 0 for g in gains)}


def child(asked: dict[str, Any]) -> None:
    """Train once from fresh weights, score, and print the figures as JSON."""
    import tempfile

    import torch

    from quadriga.engine.walk import walk
    from quadriga.measure.quality import score
    from quadriga.workloads import load

    torch.set_num_threads(1)
    workload = load(asked["name"])
    with tempfile.TemporaryDirectory() as folder:
        walked = walk(workload, Recipe.from_plain(asked["recipe"]), seed=asked["seed"], store=Path(folder))
    quality = score(walked.setup.model.eval(), getattr(workload, asked["split"]), workload.metric).value
    steps = walked.samples / workload.batch_size
    print(json.dumps({"quality": quality, "cpu_seconds": walked.cpu_seconds, "samples": walked.samples, "steps": steps}))


def table(rows: list[dict[str, Any]]) -> str:
    """As Markdown."""
    lines = ["# What training costs at equal quality", "", (__doc__ or "").partition("\n\n    QUADRIGA")[0].strip(), "",
             "| workload | seeds | processor time, baseline ÷ found | asked | steps | quality, baseline → found | gain |",
             "|---|---|---|---|---|---|---|"]  # fmt: skip
    for r in rows:
        t, span = r["time"], ""
        if t["low"]:
            span = f" ({t['low']:.2f} to {t['high']:.2f})"
        gain = f"{r['gain']:+.3f}" + (f" ({r['low']:+.3f} to {r['high']:+.3f}), {r['better']} of {r['seeds']} better"
                                      if r["low"] is not None else "")  # fmt: skip
        lines.append(f"| {r['name']} | {r['seeds']} | **{t['value']:.2f}**{span} | {r['goal']:g} | {r['steps']:.2f} "
                     f"| {r['quality'][0]:.3f} → {r['quality'][1]:.3f} | {gain} |")  # fmt: skip
    lines += ["", "Intervals of time at 99 %; of the gain in quality (positive is better, in the metric's unit) at 98 %, "
              "so that each end is one-sided 99 %.", ""]  # fmt: skip
    for r in rows:
        lines += [f"- {r['name']}: `{r['baseline']}` against `{r['found']}` ({r['machine']['instructions']})"]
    return "\n".join(lines) + "\n"


def main() -> None:
    """The stages that are asked for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", action="append", choices=[n.partition("&")[0] for n in TASKS])
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="trainings at a time")
    parser.add_argument("--work", type=Path, default=Path("out/train_cost"))
    parser.add_argument("--child", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options.child)
        return
    sys.path.insert(0, str(ROOT / "benchmarks"))
    bench, rows = Bench(options.work, options.seeds, options.jobs), list[dict[str, Any]]()
    for name, task in TASKS.items():
        if options.only and name not in options.only:
            continue
        bench.tune(name, task)
        rows.append({**bench.compare(name, bench.find(name, task), task.goal), "machine": facts()})
        assert math.isfinite(rows[-1]["time"]["value"])
    print(table(rows))
    if options.seeds >= 8:
        keep(rows)


def keep(rows: list[dict[str, Any]]) -> None:
    """Put rows in the place of earlier ones of the same workloads, and write the table anew."""
    kept = {row["name"]: row for row in read_json(KEPT)["rows"]} if KEPT.exists() else {}
    kept.update({row["name"]: row for row in rows})
    ordered = [kept[name] for name in TASKS if name in kept]
    write_json(KEPT, {"rows": ordered})
    atomic_write(TABLE, table(ordered))


if __name__ == "__main__":
    main()
