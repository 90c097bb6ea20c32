"""What it costs to hand out trials: the local engine, Ray's, and Ray Tune, in turn, in one run.

    python benchmarks/engines.py

All three have two warm workers with PyTorch loaded on this machine, the latter two on the same Ray cluster, and propose by
Optuna's TPE with one number to choose. *Overhead* is wall time for each of many trials that do nothing: a proposal, handing
out, coming back, being told. *At work* is the part of the workers' time that lies inside trials which take one second.
Rounds are run in turn; intervals are Student's of 99 % over rounds. Writes benchmarks/results/engines.json and
docs/engines.md.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import optuna

from quadriga.core.files import atomic_write, write_json
from quadriga.engine.base import Engine, Order
from quadriga.engine.cluster import Cluster
from quadriga.engine.local import Local
from quadriga.engine.ray import Ray
from quadriga.measure.machine import facts
from quadriga.measure.stats import ratio, student

ROOT = Path(__file__).resolve().parents[1]
KEPT, PAGE = ROOT / "benchmarks/results/engines.json", ROOT / "docs/engines.md"
WORKLOAD = str(ROOT / "examples/mlp_fashion.py")
WORKERS, ROUNDS = 2, 6
EMPTY = {"local": 200, "ray": 200, "ray tune": 20}  # trials of a round that do nothing
SECOND = {"local": 20, "ray": 20, "ray tune": 20}  # that take a second
Timed = Callable[[int, float], float]  # trials, seconds that each takes → seconds for all of them


def through(engine: Engine) -> Timed:
    """Trials that one of our engines runs, with proposals by Optuna."""

    def timed(trials: int, seconds: float) -> float:
        study, live, begun = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=0)), {}, time.perf_counter()
        for number in range(trials + WORKERS):
            if number < trials:
                trial = study.ask()
                live[number] = trial, trial.suggest_float("x", 0.0, 1.0)
                engine.submit(Order(number, "hello", {"seconds": seconds}))
            if number >= WORKERS:
                while (found := engine.wait(10.0)) is None:
                    pass
                assert found[1]["status"] == "complete", found
                study.tell(*live.pop(found[0]))
        return time.perf_counter() - begun

    return timed


def through_tune(folder: Path) -> Timed:
    """Ray Tune as its documentation has it: OptunaSearch, ASHA, three reports a trial, actors that are used again."""
    from ray import tune
    from ray.tune.schedulers import ASHAScheduler
    from ray.tune.search.optuna import OptunaSearch

    class Trial(tune.Trainable):  # type: ignore[misc]
        def setup(self, config: Mapping[str, float]) -> None:
            import torch

            torch.set_num_threads(1)
            self.config = config

        def step(self) -> dict[str, Any]:
            time.sleep(self.config["seconds"] / 3)
            return {"loss": self.config["x"], "done": self.iteration >= 2}

        def reset_config(self, config: Mapping[str, float]) -> bool:
            self.config = config
            return True

        def save_checkpoint(self, folder: str) -> None:
            """Nothing to keep."""

        def load_checkpoint(self, folder: str) -> None:
            """Nothing was kept."""

    def timed(trials: int, seconds: float) -> float:
        config = tune.TuneConfig(
            metric="loss", mode="min", num_samples=trials, max_concurrent_trials=WORKERS, reuse_actors=True,
            search_alg=OptunaSearch(seed=0), scheduler=ASHAScheduler(max_t=3, grace_period=3),
        )  # fmt: skip
        space = {"x": tune.uniform(0.0, 1.0), "seconds": seconds}
        run = tune.RunConfig(storage_path=str(folder), verbose=0)
        begun = time.perf_counter()
        results = tune.Tuner(Trial, param_space=space, tune_config=config, run_config=run).fit()
        spent = time.perf_counter() - begun
        assert len(results) == trials and not results.errors, results.errors
        return spent

    return timed


def measured(arms: Mapping[str, Timed]) -> dict[str, dict[str, list[float]]]:
    """Arm → what → a number for each round."""
    found: dict[str, dict[str, list[float]]] = {name: {"overhead": [], "at work": []} for name in arms}
    for timed in arms.values():
        timed(4 * WORKERS, 0.0)  # workers and their modules are there
    for number in range(ROUNDS):
        for name, timed in arms.items():
            found[name]["overhead"].append(timed(EMPTY[name], 0.0) / EMPTY[name])
            found[name]["at work"].append(SECOND[name] / (WORKERS * timed(SECOND[name], 1.0)))
            last = {what: round(rows[-1], 4) for what, rows in found[name].items()}
            print(f"round {number + 1} of {ROUNDS}, {name}: {last}", file=sys.stderr, flush=True)
    return found


def page(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """The table, as Markdown."""
    told = (__doc__ or "").partition("\n\n    python")[0], (__doc__ or "").partition("engines.py\n\n")[2].strip()
    lines = [
        "# Engines of a search",
        "",
        told[0].strip(),
        "",
        told[1],
        "",
        "| engine | overhead, ms a trial | against local | at work |",
    ]
    lines += ["|---|---|---|---|"]
    for name, row in rows.items():
        cells = [_cell(row["overhead"], 1e3, 1), _cell(row["against local"], 1, 2), _cell(row["at work"], 1, 3)]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def _cell(found: Mapping[str, float], scale: float, digits: int) -> str:
    value, low, high = (scale * found[k] for k in ("value", "low", "high"))
    return f"{value:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def summed(found: Mapping[str, Mapping[str, Sequence[float]]]) -> dict[str, dict[str, Any]]:
    """Means over rounds, and the overhead as a multiple of the local engine's, with intervals."""
    rows: dict[str, dict[str, Any]] = {}
    for name, own in found.items():
        rows[name] = {what: _mean(values) for what, values in own.items()}
        theirs, ours = ([[seconds] for seconds in found[n]["overhead"]] for n in (name, "local"))
        rows[name]["against local"] = ratio(theirs, ours).plain()
    return rows


def _mean(values: Sequence[float]) -> dict[str, float]:
    low, high = (float(x[0]) for x in student([values], 0.99))
    return {"value": (low + high) / 2, "low": low, "high": high}


def main() -> int:
    """All rounds; 0 if our engines keep their workers at work 95 % of the time."""
    import ray

    os.environ.update(RAY_USAGE_STATS_ENABLED="0", RAY_AIR_NEW_OUTPUT="0", TUNE_DISABLE_AUTO_CALLBACK_LOGGERS="1")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    logging.disable(logging.WARNING)  # Tune tells of each trial that it kept no results, which is what was asked for
    with tempfile.TemporaryDirectory(prefix="quadriga-engines-") as folder:
        ray.init(
            address="local", num_cpus=2 * WORKERS, include_dashboard=False, log_to_driver=False
        )  # room for Tune's beside ours
        local, ours = Local(WORKLOAD, Path(folder), 0, WORKERS), Ray(Cluster("local"), WORKLOAD, Path(folder), 0, live=WORKERS)
        try:
            tune = through_tune(Path(folder))
            found = measured({"local": through(local), "ray": through(ours), "ray tune": tune})
        finally:
            local.close()
            ours.close()
            ray.shutdown()
    rows = summed(found)
    write_json(KEPT, {"benchmark": "engines", "rows": rows, "rounds": found, "machine": facts()})
    atomic_write(PAGE, page(rows))
    told = {name: {"ms": 1e3 * r["overhead"]["value"], "at work": r["at work"]["value"]} for name, r in rows.items()}
    print(json.dumps({"benchmark": "engines", **told}))
    return 0 if min(rows[n]["at work"]["value"] for n in ("local", "ray")) >= 0.95 else 1


if __name__ == "__main__":
    sys.exit(main())
