"""The composer: baseline → explore → ablate → conclude → report. It is short because the stations do the work."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from quadriga import report
from quadriga.arguments import parse_budget
from quadriga.console import Progress as Console
from quadriga.core.files import write_json
from quadriga.core.metric import Floor
from quadriga.core.recipe import Recipe
from quadriga.core.workload import Workload
from quadriga.engine.opening import Where
from quadriga.stages import seal
from quadriga.stages.ablate import Ablation, Ablator
from quadriga.stages.baseline import check_floor, measure_baseline
from quadriga.stages.compare import compare
from quadriga.stages.conclude import Conclusion, Judge
from quadriga.stages.explore import Explorer, load_portfolio
from quadriga.stages.handover import Kept, clear, keep
from quadriga.stages.heat import heat, share
from quadriga.stages.opening import open_study
from quadriga.stages.portfolio import adapted
from quadriga.stages.prices import verification_seconds
from quadriga.stages.profile import order_profile
from quadriga.stages.rates import learning_rates
from quadriga.stages.records import records, result
from quadriga.stages.state import NothingToFind, Options, Progress, Study
from quadriga.stages.verbs import profile, train
from quadriga.workloads import load

__all__ = ["compare", "learning_rates", "open_study", "optimize", "profile", "run", "train"]
Seconds = float
LEAST_VERIFICATION, MARGIN = 90.0, 1.1  # seconds kept for it, and how much more than its price


def run(
    workload: Workload,
    *,
    floor: str = "-0.5pt",
    minimize: str = "latency",
    limits: Mapping[str, float] | None = None,
    budget: Seconds = 600.0,
    out: str | Path = "out",
    families: tuple[str, ...] | None = None,
    seed: int = 0,
    command: str = "",
    where: Where | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Optimize a workload: search recipes over the four families, ablate, freeze, export, verify, report.

    Args:
        workload: model, data, loss and metric.
        floor: the quality that may be lost, with its unit: "-0.5pt" or "-0.5%rel".
        minimize: "latency", "bytes", "parameters" or "train_cost".
        limits: upper bounds of ratios winner/baseline, such as {"bytes": 0.2}.
        budget: wall-clock seconds for everything; time between a kill and the same call again does not count.
        out: folder for artifact, report and records; the same call with the same folder goes on where it was.
        families: those that may be used; all by default.
        seed: of everything random.
        command: what reproduces the run, for the report.
        where: the engine, the processes of this machine by default; the same study may go on on another, if latency is still
            measured on a machine of the same kind.
        progress: called with plain data.

    Returns:
        The result object, also in out/result.json: `status` is "verified" or "infeasible".

    Raises:
        BadInput: the workload or an option cannot be used; nothing was lost.
        KeyboardInterrupt: interrupted; the same call goes on.
    """
    chosen = {"families": families} if families else {}
    options = Options(Floor.parse(floor), minimize, dict(limits or {}), float(budget), seed=seed, command=command, **chosen)
    with open_study(workload, options, Path(out), progress or (lambda event: None), where) as study:
        if (done := study.store.get("result")) is not None:
            seal.check(study.store, study.folder)
            study.say("done", "this study is finished; its result is shown again")
            write_json(study.folder / "result.json", done)
            return dict(done)
        return _stations(study)


def optimize(workload: Workload | str, *, budget: str | float = "10m", quiet: bool = False, **options: Any) -> dict[str, Any]:
    """`run` for scripts and notebooks: the budget may be text, and progress is shown on stderr.

    Args:
        workload: a `Workload`, a ready-made name, or "file.py:function".
        budget: seconds, or text such as "90s", "10m", "1h30m".
        quiet: show no progress.
        options: as of `run`: floor, minimize, limits, out, families, seed, where.

    Returns:
        The result object; `result["status"]` is "verified" or "infeasible".

    Raises:
        BadInput: as `run`.
    """
    task = load(workload) if isinstance(workload, str) else workload
    seconds = parse_budget(budget)
    if quiet:
        return run(task, budget=seconds, **options)
    with Console() as progress:
        return run(task, budget=seconds, progress=progress, **options)


def _stations(study: Study) -> dict[str, Any]:
    """All stations in order; each takes up what its trials say was done before."""
    study.portfolio = adapted(study, load_portfolio(study.options.minimize))
    smallest = check_floor(study)
    try:
        measure_baseline(study)
    except NothingToFind as end:
        return _finish(study, None, Conclusion([], None, None, {}), smallest, end)
    order_profile(study)
    verify = _reserve(study)
    explorer = Explorer(study, verify + share(study))
    if study.store.get("frozen") is None:
        with study.budget.phase("search"):
            explorer.run()
            study.forget()
            heat(study, explorer, verify)
    frozen = _frozen(study, explorer, verify)
    study.budget.whole()
    with study.budget.phase("verification"):
        conclusion = Judge(study).run(frozen)
    return _finish(study, explorer, conclusion, smallest)


def _reserve(study: Study) -> Seconds:
    """Seconds kept for verification."""
    total, price = study.options.budget, verification_seconds(study)
    if price > 0.45 * total:
        study.notes.append(f"a verification takes about {price:.0f} s here, much of the budget of {total:.0f} s")
        study.say("plan", f"{study.notes[-1]}; it may be overdrawn")
    return min(0.45 * total, max(min(0.25 * total, LEAST_VERIFICATION), MARGIN * price))


def _frozen(study: Study, explorer: Explorer, reserve: Seconds) -> list[tuple[Recipe, Ablation | None]]:
    """The finalists: the best candidate, ablated, and perhaps a safer one. Named once, before test is opened."""
    if (kept := study.store.get("finalists")) is not None:
        return [(Recipe.from_plain(r["recipe"], r["name"]), r["ablation"] and Ablation.from_plain(r["ablation"])) for r in kept]
    chosen = explorer.finalists()
    frozen: list[tuple[Recipe, Ablation | None]] = []
    origins: list[str] = []
    for number, candidate in enumerate(chosen):
        if number == 0:
            with study.budget.phase("ablation"):
                ablation = Ablator(study, explorer, candidate, reserve).run()
            frozen.append((ablation.recipe, ablation))
        elif (exact := explorer.exact(candidate.recipe, explorer.rung(candidate))) not in [r for r, _ in frozen]:
            frozen.append((exact, None))
        origins += [candidate.recipe.hash] * (len(frozen) - len(origins))
    rows = [
        {"recipe": r.plain(), "name": r.name, "ablation": a and a.plain(), "candidate": c}
        for (r, a), c in zip(frozen, origins, strict=True)
    ]
    study.store.put("finalists", rows)
    return frozen


def _finish(
    study: Study, explorer: Explorer | None, conclusion: Conclusion, smallest: float, end: NothingToFind | None = None
) -> dict[str, Any]:
    """Artifact, result, records and report; the store learns last that the study is done."""
    with study.budget.phase("report"):
        kept = _handed_over(study, conclusion)
    outcome = result(study, conclusion, kept, end)
    everything = records(study, outcome, explorer, conclusion, smallest)
    write_json(study.folder / "records.json", everything)
    report.write(everything, study.folder)
    write_json(study.folder / "result.json", outcome)
    study.store.put("result", outcome)
    seal.seal(study.store, study.folder)
    clear(study)
    return outcome


def _handed_over(study: Study, conclusion: Conclusion) -> Kept:
    """The winner's artifact; where what was written does not hold, there is no winner, and the baseline is handed back."""
    kept = keep(study, conclusion, result(study, conclusion))
    lost = conclusion.winner is not None and kept.folder is None
    if lost and (kept.written or study.options.minimize != "train_cost"):  # there the recipe is the winner, without a file too
        conclusion.disown(kept.why_not)
        kept = keep(study, conclusion, result(study, conclusion))
    return kept
