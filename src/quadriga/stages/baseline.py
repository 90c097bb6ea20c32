"""The baseline: the unchanged model, trained as its user does; and its strongest unchanged opponents."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from statistics import NormalDist, geometric_mean

from quadriga.core.errors import BadInput
from quadriga.core.recipe import Recipe, step
from quadriga.core.trial import Status, Trial
from quadriga.measure.stats import smallest_floor
from quadriga.search.allocate import Bar
from quadriga.stages.state import FINALISTS, LEVEL, NothingToFind, Study

LEAST_PACE = 20.0  # seconds that a few training steps may take, however small the budget: some are not timed, which compile
FIRST = {"onnxruntime", "openvino"}  # built in seconds and nearly always the fastest; what takes longer is probed in between


def measure_baseline(study: Study) -> Trial:
    """Train and score the baseline; meanwhile probe what eager PyTorch and a lossless export can do at best.

    Raises:
        BadInput: the budget is smaller than the baseline's time, the baseline fails, or the floor cannot be proved.
        NothingToFind: no runtime can execute the model, so that there could be no artifact.
    """
    with study.budget.phase("baseline"):
        check_floor(study)
        if not study.stage("export"):
            study.submit("export", "export", Recipe(), limit=study.patience(60))
        if not study.stage("baseline"):
            _check_pace(study)
            _order_pace(study)
            study.say("baseline", "training and scoring the unchanged model" + _how_long(study))
            study.submit("baseline", "train", study.workload.baseline, args={"guess": True})
        _submit_opponents(study)
        probes = _probes(study)
        while not study.stage("baseline") or _awaited(study):
            if probes and study.running <= study.workers:
                study.submit("cost", "cost", probes.pop(0), limit=study.patience(90))
            study.collect(1.0)
            _check_export(study)
        _check_baseline(study)
    base = study.baseline
    study.say("baseline", f"quality {base.values['quality']:.4g} {study.workload.metric.unit} on val{_guess(study)}")
    return base


def _awaited(study: Study) -> bool:
    """Whether an answer is under way that the search needs: does the model export, how fast are training and eager PyTorch."""
    eager = study.eager is None and study.under_way("tuned_eager")
    return bool(eager or study.under_way("pace") or study.under_way("export"))


def _how_long(study: Study) -> str:
    needed = next((t.values["seconds"] for t in study.stage("pace") if t.ok), 0.0)
    return f", about {needed:.0f} s" if needed >= 1 else ""


def _check_export(study: Study) -> None:
    """End a study that can hand nothing over: every runtime begins with the same export, and that one was refused."""
    refused = next((t for t in study.stage("export") if t.status is Status.REFUSED), None)
    if refused is not None and study.options.minimize != "train_cost":  # there the training is what is handed over
        study.forget()
        raise NothingToFind(f"no runtime can execute the model: {refused.reason}", refused.info.get("remedy", ""))


def _guess(study: Study) -> str:
    """What guessing reaches, beside the baseline's quality; a baseline that is no better is told of as loudly as can be."""
    found, unit = study.baseline.info.get("guess"), study.workload.metric.unit
    if not found:
        return ""
    told = f"guessing reaches {found['value']:.4g} {unit} ({found['how']})".replace("  ", " ")
    if not found["beaten"]:
        study.notes.append(
            f"the baseline is no better than guessing: its {study.workload.metric.name} on val is "
            f"{study.baseline.values['quality']:.4g} {unit}, and {told}; look at its data, its training and its metric first"
        )
        study.say("warning", study.notes[-1])
    return f"; {told}"


def _check_baseline(study: Study) -> None:
    for trial in study.stage("baseline"):
        if not trial.ok:
            problem, remedy = trial.info.get("bad_input", [trial.reason, trial.info.get("remedy", "")])
            late = "give a larger --budget" if trial.status is Status.TIMED_OUT else "mend the workload and try again"
            raise BadInput(f"the baseline failed: {problem}", remedy or late)


def _check_pace(study: Study) -> None:
    """Refuse a budget that the baseline alone would use up, after timing a few of its steps."""
    if not any(s.is_train for s in study.workload.baseline.steps):
        return
    limit = max(LEAST_PACE, study.budget.left / 10)
    study.say("baseline", f"timing a few training steps (at most {limit:.0f} s)")
    study.submit("pace", "pace", study.workload.baseline, limit=limit)
    trial = None
    while trial is None and study.running:
        found = study.collect(1.0)
        _check_export(study)
        trial = found if found is not None and found.stage == "pace" else None
    if trial is None or not trial.ok:
        if trial is not None and trial.status is not Status.TIMED_OUT:
            problem, remedy = trial.info.get("bad_input", [trial.reason, trial.info.get("remedy", "")])
            raise BadInput(f"the baseline cannot be trained: {problem}", remedy or "mend the workload and try again")
        raise BadInput(
            f"a few training steps took longer than {limit:.0f} s, of a budget of {study.options.budget:.0f} s",
            "give a larger --budget, or a smaller batch",
        )
    needed = trial.values["seconds"]
    if needed > 0.6 * study.options.budget:
        remedy = f"give --budget {math.ceil(needed / 30)}m or more, or fewer baseline epochs"
        raise BadInput(
            f"training the baseline alone takes about {needed:.0f} s of the budget of {study.options.budget:.0f} s", remedy
        )


def _order_pace(study: Study) -> None:
    """Of a model that comes trained, time a few training steps: candidates are trained further."""
    given = study.workload.train is not None and not any(s.is_train for s in study.workload.baseline.steps)
    if given and not study.options.hardware_alone and not study.stage("pace"):
        further = Recipe((step("optimizer", kind="adamw", lr=1e-3), step("train", epochs=1)), "further training")
        study.submit("pace", "pace", further, limit=max(LEAST_PACE, study.budget.left / 10))


def check_floor(study: Study, disagreement: float = 0.03) -> float:
    """The smallest floor that the test split can prove, said before any time is spent.

    Raises:
        BadInput: the floor asked for is a tenth of it or less, so that no result could be proved.
    """
    metric, n = study.workload.metric, len(study.workload.test)
    smallest = smallest_floor(n, disagreement, LEVEL) * metric.scale
    if metric.unit != "pt":
        return smallest
    margin = study.options.floor.margin(100.0)
    study.notes.append(
        f"{n} test examples can prove a floor of {-smallest:.2f} pt, if predictions differ on {disagreement:.0%}"
    )
    study.say("floor", study.notes[-1])
    if 0 < margin < smallest / 2:
        remedy = f"ask for {-smallest:.2g}pt or give about {math.ceil(n * (smallest / margin) ** 2)} test examples"
        raise BadInput(f"the floor {study.options.floor} cannot be proved with {n} test examples", remedy)
    return smallest


def bar(study: Study) -> Bar:
    """What candidates have to reach on val."""
    z = NormalDist().inv_cdf(1 - (1 - LEVEL) / FINALISTS)
    margin = study.options.floor.margin(study.baseline.values["quality"])
    return Bar(margin, z, len(study.workload.val), len(study.workload.test))


def lossless_recipes(study: Study) -> list[Recipe]:
    """The unchanged model in every runtime that keeps its numerics, with the thread counts worth trying."""
    found = []
    for name, card in sorted(study.space.cards.items()):
        if card.get("unsearched"):
            continue
        if "RUNTIME" in card["adds"] and card["numerics"] in ("exact", "close") and name not in ("eager", "inductor"):
            found += [Recipe((step("threads", count=1), step(name)), f"{name}, 1 thread"), Recipe((step(name),), name)]
    return found


def eager_recipes(study: Study) -> list[Recipe]:
    """Eager PyTorch, tuned: threads, memory format and matmul back end; on the GPU too, where there is one."""
    one = step("threads", count=1)
    wanted = [(), (one,), (step("channels_last"),), (one, step("channels_last")), (step("matmul_backend"),)]
    if "hardware" in study.space.families and not study.space.cards["cuda"].get("unsearched"):
        wanted += [(step("cuda"),), (step("cuda"), step("channels_last"))]
    return [Recipe(w, "eager" + ", ".join(["", *map(str, w)])) for w in wanted]


def _submit_opponents(study: Study) -> None:
    known = {(t.stage, t.recipe.hash) for t in study.trials}
    eager = [("tuned_eager", "eager_variant", r) for r in eager_recipes(study)]
    wanted = eager[:1]
    if study.options.minimize != "train_cost":  # where nothing is claimed of latency, the time belongs to training
        lossless = [("cost", "cost", r) for r in lossless_recipes(study)]
        wanted = [*wanted, *lossless, *(eager[1:] if not study.short else [])]
    able = [w for w in wanted if (w[0], w[2].hash) not in known and study.space.illegal(w[2]) is None]
    first = [w for w in able if w in wanted[:1] or {s.method for s in w[2].steps} & FIRST]
    study.later = [w for w in able if w not in first]
    for stage, task, recipe in first:
        study.submit(stage, task, recipe, limit=study.patience(60 if recipe.steps else 120))  # all is held against plain eager


def _probes(study: Study) -> list[Recipe]:
    """Cost parts of the portfolio that need no trained weights: what the other workers do while the baseline trains."""
    known = {r.hash for r in (*(t.recipe for t in study.stage("cost")), *study.under_way("cost"))}
    able = [r for r in study.portfolio if study.space.illegal(r) is None] if study.workers > 1 else []
    parts = {part.hash: part for part in map(study.space.cost_part, able)}
    return [part for name, part in parts.items() if name not in known and not study.space.fixed(part)]


def lossless_trials(study: Study) -> list[Trial]:
    """The cost probes of the unchanged model in each lossless runtime."""
    wanted = lossless_recipes(study)
    return [replace(t, recipe=r) for r in wanted for t in study.stage("cost") if t.ok and t.recipe == r]


def fastest(study: Study, tried: list[Trial]) -> list[Trial]:
    """The fastest for each batch size, without repetition."""
    best = [max(tried, key=lambda t, b=b: t.values[f"speed/{b}"]) for b in study.batches] if tried else []  # type: ignore[misc]
    return list({t.number: t for t in best}.values())


def gain_of(study: Study, values: Mapping[str, float], epochs: float = 0.0) -> float:
    """Natural logarithm of the objective's improvement over the baseline; `epochs` is the whole training's length."""
    if study.options.minimize == "latency":
        return math.log(geometric_mean(study.speed_ups(values)))
    base = study.baseline.values
    if study.options.minimize == "train_cost":
        examples = len(study.workload.train) if study.workload.train is not None else 0
        cost = values.get("samples", epochs * examples) * values.get("pace", 1.0)
        return math.log(base["samples"] / cost) if cost and base["samples"] else 0.0
    return math.log(base[study.options.minimize] / values[study.options.minimize])
