"""Freeze, export, open the sealed split once, time against all opponents, and decide."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quadriga.core.folders import BUILT
from quadriga.core.recipe import Recipe, Step
from quadriga.core.trial import Trial
from quadriga.measure.latency import LEAST_RESTARTS
from quadriga.measure.quality import Scores
from quadriga.measure.stats import WIDE
from quadriga.measure.timings import CALM, Timings
from quadriga.stages.ablate import Ablation
from quadriga.stages.baseline import fastest, lossless_trials
from quadriga.stages.prices import BLOCK_SECONDS, BLOCKS, RESTARTS, hand_over_seconds, verification_seconds
from quadriga.stages.ratios import not_faster, opponents_ratios, surely, unmeasured, widest
from quadriga.stages.state import LEVEL, Study
from quadriga.stages.timing import quiet, timed, wait_for_calm
from quadriga.stages.training_cost import time_training
from quadriga.verify.fake import Worth, told
from quadriga.verify.quality import compare, without_labels

APART = 2.0  # two timings of one model that differ by more were not made under the same conditions

OPPONENTS = {
    "eager": "the unchanged model as its user runs it in PyTorch",
    "tuned_eager": "the unchanged model in PyTorch with the best threads, memory format and matmul back end",
    "lossless_export": "the unchanged model in the fastest runtime that keeps its numerics, chosen for each batch size",
    "same_training": "the original network under the winner's training",
    "from_scratch": "the winner's network, trained from fresh weights at the winner's total cost",
    "by_chance": "the winner, with chance in the place of what chooses, such as which examples are passed over",
}


@dataclass
class Finalist:
    """A frozen recipe and everything measured of it on the sealed split.

    Args:
        recipe: exact.
        ablation: its rows, or None when it was not ablated.
        folder: its realised form, below the study's folder.
        trial: of realising it.
        quality: the record of `verify.quality.compare`, with "holds", and "certificate": what `without_labels` says.
        ratios: opponent → batch → ratio.
        training: the baseline's training cost over its own, where that is the objective.
        why_not: what keeps it from being the winner, or "".
        unmeasured: whether that is only that the machine was too busy to time it.
    """

    recipe: Recipe
    ablation: Ablation | None
    folder: str
    trial: Trial | None = None
    quality: dict[str, Any] | None = None
    ratios: dict[str, dict[str, Any]] | None = None
    training: dict[str, Any] | None = None
    why_not: str = ""
    unmeasured: bool = False


@dataclass
class Conclusion:
    """The end of a study: the finalists in the order named before, the winner among them, the opponents' timings."""

    finalists: list[Finalist]
    winner: Finalist | None
    timings: Timings | None
    controls: dict[str, dict[str, Any]]
    baseline_quality: float | None = None

    @property
    def status(self) -> str:
        """ "verified", "unmeasured" where the machine was too busy to tell, or "infeasible"."""
        if self.winner is not None:
            return "verified"
        return "unmeasured" if any(f.unmeasured for f in self.finalists) else "infeasible"

    def disown(self, why: str) -> None:
        """The winner is none, since it could not be handed over."""
        assert self.winner is not None
        self.winner.why_not, self.winner = f"it could not be handed over: {why}", None


class Judge:
    """Verifies at most three finalists.

    Args:
        study: the state; its processes are replaced by fresh ones before the sealed split is opened.
    """

    def __init__(self, study: Study) -> None:
        self.study = study

    def run(self, frozen: list[tuple[Recipe, Ablation | None]]) -> Conclusion:
        """Freeze the finalists, realise them and the opponents, score on test, time, decide."""
        finalists = [Finalist(r, a, f"{BUILT}/final-{r.hash}") for r, a in frozen]
        if not finalists:
            return Conclusion([], None, None, {})
        self._freeze(finalists)
        arms = self._realize(finalists)
        scores = self._open_test(finalists)
        if "baseline" not in scores:
            return Conclusion(finalists, None, None, {})
        self._judge_quality(finalists, scores)
        if self.study.options.minimize == "train_cost":  # the objective first, latency in the time that is left
            for finalist in finalists:
                self._time_training(finalist)
        timings = self._timed(finalists, arms, scores)
        for number, finalist in enumerate(finalists):
            self._judge_cost(finalist, f"final-{number}", timings)
        self._note_load(timings)
        self._note_eager(timings)
        good = [f for f in finalists if not f.why_not]
        best = max(good, key=self._gain) if good else None
        self._note_fakes(best)
        return Conclusion(finalists, best, timings, self._controls(scores), scores["baseline"].value)

    def _freeze(self, finalists: list[Finalist]) -> None:
        known = self.study.store.get("frozen")
        if known is None:
            record = {"at": time.time(), "recipes": [f.recipe.plain() for f in finalists]}
            self.study.store.put("frozen", record)

    def _realize(self, finalists: list[Finalist]) -> dict[str, dict[str, Any]]:
        """Build finalists and lossless opponents with trained weights; the arms of the timing."""
        study = self.study
        study.say("verification", "building the finalists and their opponents")
        base = study.workload.baseline
        until = max(0.45 * study.budget.left, min(verification_seconds(study), 0.8 * study.budget.left))
        for finalist in finalists:
            if study.find(("final",), finalist.recipe) and (study.folder / finalist.folder / "load.py").is_file():
                continue  # by a session that was broken off
            own = {"name": Path(finalist.folder).name, "baseline_bytes": int(study.baseline.values["bytes"])}
            study.submit("final", "realize", finalist.recipe, args=own)
        self._order_controls(finalists[0].recipe, until)
        for name, trial in self._lossless().items():
            study.submit(
                "opponent", "realize", Recipe((*base.steps, *trial.recipe.steps), trial.recipe.name), args={"name": name}
            )
        if study.workload.reference is None:
            study.submit("opponent", "realize", base, args={"name": "eager"})
        study.collect_all(until)
        while study.under_way("final"):  # the workers of a resumed study have just begun to load; each order has its limit
            study.collect(1.0)
        study.forget()
        for finalist in finalists:
            finalist.trial = next((t for t in study.stage("final")[::-1] if t.recipe == finalist.recipe), None)
        return self._arms(finalists)

    def _order_controls(self, recipe: Recipe, until: float) -> None:
        """Train the controls that would be ready in time, going by what the winner's own training took."""
        study = self.study
        trained = study.find(("search", "ablation"), recipe)
        before = study.baseline.values.get("seconds", 0.0) if study.space.fixed(recipe) else 0.0
        seconds = trained.values["seconds"] - before if trained is not None else 0.0
        for control, other in self._control_recipes(recipe).items():
            if study.find(("control", "search", "ablation"), other) is not None:
                continue
            if seconds < study.budget.left - until:
                study.submit("control", "train", other, limit=max(5.0, study.budget.left - until), control=control)
            else:
                study.notes.append(f"{OPPONENTS[control]}: it takes about {seconds:.0f} s to train, which were not left")

    def _lossless(self) -> dict[str, Trial]:
        """The lossless exports that are within 1.5 of the fastest at some batch size, by the search's quick timing."""
        tried = lossless_trials(self.study)
        if self.study.short:
            return {f"lossless-{n}": t for n, t in enumerate(fastest(self.study, tried))}
        keys = [f"speed/{b}" for b in self.study.batches]
        best = {k: max((t.values[k] for t in tried), default=0.0) for k in keys}
        near = [t for t in tried if any(t.values[k] > best[k] / 1.5 for k in keys)]
        return {f"lossless-{n}": t for n, t in enumerate(near)}

    def _screen(self, arms: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        """Of the lossless exports keep the fastest at each batch size, timed alone on the quiet machine."""
        names = [n for n in arms if n.startswith("lossless-")]
        if len(names) < 2 or self.study.short or self.study.budget.left < 60:
            return arms
        few = {n: arms[n] for n in names}
        self.study.say("verification", f"timing {len(few)} lossless exports in turn, to find the strongest")
        timings = timed(self.study, few, restarts=2, blocks=4, block_seconds=0.03, seed=1)
        keep = set()
        for batch in self.study.batches:
            found = {n: m.value for n in names if (m := timings.latency(batch, n)) is not None}
            keep.add(min(found, key=found.__getitem__) if found else names[0])
        return {n: a for n, a in arms.items() if n not in names or n in keep}

    def _arms(self, finalists: list[Finalist]) -> dict[str, dict[str, Any]]:
        study = self.study
        built = study.folder / BUILT
        arms: dict[str, dict[str, Any]] = {}
        if study.workload.reference is not None:
            kept = study.baseline.info.get("checkpoint")
            checkpoint = str(study.folder / "checkpoints" / kept) if kept else None
            eager = {
                "kind": "eager",
                "workload": study.workload.reference,
                "checkpoint": checkpoint,
                "seed": study.options.seed,
            }
            arms["eager"] = eager
            for number, trial in enumerate(fastest(study, [t for t in study.stage("tuned_eager") if t.ok])):
                if trial.recipe.steps and not self.study.short:  # plain eager is an arm already
                    arms[f"tuned_eager-{number}"] = {**eager, "spec": trial.info["spec"]}
        else:
            arms["eager"] = {"kind": "folder", "path": str(built / "eager")}
        arms.update({name: {"kind": "folder", "path": str(built / name)} for name in self._lossless()})
        for number, finalist in enumerate(finalists):
            if finalist.trial is not None and finalist.trial.ok:
                arms[f"final-{number}"] = {"kind": "folder", "path": str(study.folder / finalist.folder)}
            else:
                finalist.why_not = f"it could not be built: {finalist.trial.reason if finalist.trial else 'no time was left'}"
        return {k: a for k, a in arms.items() if a["kind"] == "eager" or (Path(a["path"]) / "load.py").is_file()}

    def _open_test(self, finalists: list[Finalist]) -> dict[str, Scores]:
        """Score baseline, finalists and controls on test, in processes started for it; nothing is scored twice."""
        study = self.study
        study.engine.renew()
        orders = self._on_test(finalists)
        done = {_scored(t): t for t in study.stage("test") if t.ok and _there(study, t)}  # by a session that was broken off
        waiting = {name: order for name, order in orders.items() if (name, order[0].hash) not in done}
        if waiting:
            opened = study.store.get("opened", [])
            by = [f.recipe.hash for f in finalists]
            study.store.put("opened", [*opened, {"split": "test", "when": time.time(), "by": by}])
        study.say("verification", "scoring on the sealed test split")
        for name, (recipe, args) in waiting.items():
            study.submit("test", "score", recipe, args={"split": "test", "name": name, **args})
        done |= {_scored(t): t for t in study.collect_all(0.0) if t.ok and t.stage == "test"}
        study.forget()
        found = {name: done[name, recipe.hash] for name, (recipe, _) in orders.items() if (name, recipe.hash) in done}
        parts = {name: Scores.load(study.folder / t.info["scores"]) for name, t in found.items()}
        alone = {f"{name}, alone": t.info["alone"] for name, t in found.items() if "alone" in t.info}
        return parts | {name: Scores.load(study.folder / path) for name, path in alone.items()}

    def _on_test(self, finalists: list[Finalist]) -> dict[str, tuple[Recipe, dict[str, Any]]]:
        """What is scored on test: name → recipe, and its folder where it was built."""
        study = self.study
        wanted = {"baseline": (study.workload.baseline or Recipe(), dict[str, Any]())}
        for number, finalist in enumerate(finalists):
            if not finalist.why_not:
                wanted[f"final-{number}"] = finalist.recipe, {"folder": finalist.folder}
        for name, recipe in self._control_recipes(finalists[0].recipe).items():
            if study.find(("control", "search", "ablation"), recipe) is not None:
                wanted[name] = recipe, {}
        return wanted

    def _judge_quality(self, finalists: list[Finalist], scores: dict[str, Scores]) -> None:
        metric, base = self.study.workload.metric, scores["baseline"]
        margin = self.study.options.floor.margin(base.value)
        for number, finalist in enumerate(finalists):
            parts = [scores[n] for n in (f"final-{number}", f"final-{number}, alone") if n in scores]
            if not parts:
                finalist.why_not = finalist.why_not or "it could not be scored on test"
                continue
            proved = [compare(base, mine, metric, margin, LEVEL, finalists=len(finalists)) for mine in parts]
            least = min(range(len(parts)), key=lambda n: proved[n]["low"])  # the floor has to hold at every batch size
            certificate = without_labels(base, parts[least], metric, LEVEL, len(finalists))
            finalist.quality = {**proved[least], "certificate": certificate}
            if not finalist.quality["holds"]:
                low, unit = finalist.quality["low"], metric.unit
                finalist.why_not = f"on test it is proved to lose at most {-low:.3g} {unit}, the floor allows {margin:.3g}"

    def _timed(self, finalists: list[Finalist], arms: dict[str, dict[str, Any]], scores: Mapping[str, Scores]) -> Timings:
        """Timings of all arms; made once more in a quieter moment where an interval is too wide to be a result."""
        study, kept = self.study, hand_over_seconds(self.study, scores)
        quiet(study)
        arms = self._screen(arms)
        names = [f"final-{n}" for n, f in enumerate(finalists) if not f.why_not]
        began = study.budget.left
        timings = self._time(arms, kept, names)
        price = LEAST_RESTARTS * (began - study.budget.left) / max(timings.restarts, 1)
        if widest(timings, names) > WIDE and study.budget.left > kept + price:
            wait_for_calm(study, study.budget.left - kept - price)
            again = self._time(arms, kept, names)
            timings = min(timings, again, key=lambda t: widest(t, names))
        return timings

    def _time(self, arms: dict[str, dict[str, Any]], kept: float, names: list[str]) -> Timings:
        """Timings within the budget, or beyond it until the finalists' intervals are narrow enough for a result."""
        study = self.study
        study.say("verification", f"timing {len(arms)} arms in turn, each in its own process")

        def enough(timings: Timings) -> bool:
            return timings.errors.keys() >= set(names) or widest(timings, names) <= WIDE

        return timed(
            study, arms, enough, restarts=RESTARTS, blocks=BLOCKS,
            block_seconds=BLOCK_SECONDS[study.short], budget=max(10.0, study.budget.left - kept),
        )  # fmt: skip

    def _time_training(self, finalist: Finalist) -> None:
        if finalist.why_not or finalist.trial is None:
            return
        self.study.say("verification", "timing training steps in turn, each time in a fresh process")
        finalist.training = time_training(self.study, finalist.recipe, finalist.trial.values["samples"])

    def _judge_cost(self, finalist: Finalist, arm: str, timings: Timings) -> None:
        """Ratios against each opponent; the winner has to be better in the objective by more than chance."""
        finalist.ratios = opponents_ratios(timings, arm)
        if finalist.why_not:
            return
        objective, base = self.study.options.minimize, self.study.baseline.values
        assert finalist.trial is not None
        mine = finalist.trial.values
        if arm in timings.errors:
            finalist.why_not = f"it failed while it was timed: {timings.errors[arm]}"
        elif objective == "latency" and (why := unmeasured(finalist.ratios.get("eager", {}), timings)):
            finalist.why_not, finalist.unmeasured = why, True
        elif objective == "latency" and (why := not_faster(finalist.ratios.get("eager", {}))):
            finalist.why_not = why
        elif objective in ("bytes", "parameters") and mine[objective] >= base[objective]:
            finalist.why_not = f"it has no fewer {objective} than the unchanged model"
        elif objective == "train_cost" and (finalist.training or {}).get("verdict") != "faster":
            finalist.why_not = "its training is not shown to cost less than the baseline's"

    def _note_load(self, timings: Timings) -> None:
        """What others did to the machine while the arms were timed."""
        if timings.disturbed > CALM:
            self.study.notes.append(
                f"other processes took {timings.disturbed:.0%} of the machine's cores while the verification was timed"
            )

    def _note_eager(self, timings: Timings) -> None:
        """Eager PyTorch as it was timed here, held against the profile of the same model: they cannot be far apart."""
        profiled = next((t.values for t in self.study.stage("profile") if t.ok), {})
        for batch in timings.batches:
            found = timings.latency(batch, "eager") if "eager" in timings[batch] else None
            before = profiled.get(f"latency/{batch}")
            if found is None or not before:
                continue
            times = found.value / before  # the profile has one thread, the arm as many as its user has
            if times > APART or times < 1 / (APART * os.cpu_count()):
                self.study.notes.append(
                    f"eager PyTorch took {found.value:.3g} s a call at batch {batch} in the verification and {before:.3g} s in "
                    f"the profile, on one thread: {max(times, 1 / times):.1f} times apart, so one of them was disturbed"
                )

    def _note_fakes(self, best: Finalist | None) -> None:
        """Say of the winner what looks like compression and is none, with what it gained over the lossless exports."""
        if best and best.trial and (found := best.trial.info.get("fakes", [])):
            runtime, storage = best.trial.info.get("realized", ("the runtime", "plain"))
            least = min((t.values["bytes"] for t in self.study.stage("opponent") if t.ok), default=best.trial.values["bytes"])
            rivals = (best.ratios or {}).get("lossless_export", {}).values()
            faster = math.prod(surely(r) for r in rivals) ** (1 / len(rivals)) - 1 if rivals else None
            worth = Worth(runtime, 1 - best.trial.values["bytes"] / least, faster)
            self.study.notes += [f"the winner: {line}" for line in told(found, worth, storage)]

    def _gain(self, finalist: Finalist) -> float:
        assert finalist.trial is not None and finalist.ratios is not None
        if self.study.options.minimize == "latency":
            return sum(math.log(r["value"]) for r in finalist.ratios["eager"].values())
        if self.study.options.minimize == "train_cost":
            return finalist.training["value"] if finalist.training else 0.0
        return -finalist.trial.values[self.study.options.minimize]

    def _control_recipes(self, recipe: Recipe) -> dict[str, Recipe]:
        """The original network under the winner's training; the winner's network from fresh weights at equal cost."""
        space = self.study.space
        fixed = space.fixed(recipe)
        own = recipe.steps[fixed:]
        last = max((i for i, s in enumerate(own) if s.is_train), default=None)
        if last is None:
            return {}

        def family(one: Step) -> str:
            return "" if one.is_train else str(space.cards[one.method]["family"])

        def learns(one: Step) -> bool:
            return family(one) in ("", "training", "optimizer") or bool(space.cards[one.method]["trains"])

        training = tuple(s for s in own[: last + 1] if learns(s))
        structure = tuple(s for s in own[: last + 1] if family(s) == "structure" and space.cards[s.method]["shapes"])
        found = {"same_training": Recipe((*recipe.steps[:fixed], *training), "original network, winner's training")}
        if fixed and structure and not any("TRAINED" in space.cards[s.method]["requires"] for s in structure):
            found["from_scratch"] = Recipe((*structure, *training, *own[last + 1 :]), "winner's network from fresh weights")
        chance = tuple(s if s.is_train else Step(s.method, {**s.fields, **space.cards[s.method]["control"]}) for s in own)
        if chance != own:
            found["by_chance"] = Recipe((*recipe.steps[:fixed], *chance), "the winner by chance")
        return found

    def _controls(self, scores: dict[str, Scores]) -> dict[str, dict[str, Any]]:
        """Quality on test of the controls that were trained."""
        metric, base = self.study.workload.metric, scores["baseline"]
        return {
            name: compare(base, scores[name], metric, self.study.options.floor.margin(base.value), LEVEL)
            for name in ("same_training", "from_scratch", "by_chance")
            if name in scores
        }


def _scored(trial: Trial) -> tuple[str, str]:
    """The name and the recipe of what a trial scored on test."""
    return Path(trial.info["scores"]).stem.removeprefix("test-"), trial.recipe.hash


def _there(study: Study, trial: Trial) -> bool:
    """Whether what a trial scored lies on disk."""
    return all((study.folder / trial.info[key]).is_file() for key in ("scores", "alone") if key in trial.info)
