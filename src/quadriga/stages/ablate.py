"""Ablation on val: what a method gives, and whether it pays. What does not pay is taken out."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any

from quadriga.core.folders import BUILT
from quadriga.core.recipe import Recipe
from quadriga.core.trial import Trial
from quadriga.measure.stats import EQUIVALENT, UNMEASURED, ratio
from quadriga.measure.timings import Timings
from quadriga.search.allocate import SAFE, Bar, Candidate, Score
from quadriga.stages.baseline import bar
from quadriga.stages.explore import Explorer, over_limit
from quadriga.stages.prices import ABLATED, ablation_seconds
from quadriga.stages.state import TIMING_LEVEL, Study
from quadriga.stages.timing import timed


@dataclass
class Row:
    """What the recipe is without one step.

    Args:
        index: of the step in the template.
        step: in words.
        method, family: of the step.
        quality_gain: what the step adds to quality on val, positive is better.
        latency_ratio: time without it over time with it, with its interval; None where it cannot change.
        bytes_ratio: bytes without it over bytes with it.
        train_cost_ratio: training FLOPs without it over those with it.
        pays: whether it stays; None when it was not measured.
        why: in words.
    """

    index: int
    step: str
    method: str
    family: str
    quality_gain: float | None = None
    latency_ratio: dict[str, Any] | None = None
    bytes_ratio: float | None = None
    train_cost_ratio: float | None = None
    pays: bool | None = None
    why: str = ""


@dataclass
class Ablation:
    """The rows, and the recipe that is left: as a template, and at its training length."""

    rows: list[Row] = field(default_factory=list)
    template: Recipe = field(default_factory=Recipe)
    recipe: Recipe = field(default_factory=Recipe)
    taken_out: list[str] = field(default_factory=list)

    def plain(self) -> dict[str, Any]:
        """As JSON data."""
        recipes = {"template": self.template.plain(), "recipe": self.recipe.plain(), "name": self.template.name}
        return {"rows": [asdict(r) for r in self.rows], "taken_out": self.taken_out, **recipes}

    @classmethod
    def from_plain(cls, data: Mapping[str, Any]) -> Ablation:
        """Read back what `plain` wrote."""
        parts = (Recipe.from_plain(data[k], data["name"]) for k in ("template", "recipe"))
        return cls([Row(**r) for r in data["rows"]], *parts, taken_out=list(data["taken_out"]))


class Ablator:
    """Measures one candidate without each of its steps.

    Args:
        study: the state.
        explorer: knows rungs and costs.
        candidate: fully trained.
        reserve: seconds of budget to be left.
    """

    def __init__(self, study: Study, explorer: Explorer, candidate: Candidate, reserve: float) -> None:
        self.study, self.explorer, self.candidate, self.reserve = study, explorer, candidate, reserve
        self.bar: Bar = bar(study)
        self.rung = explorer.rung(candidate)
        self.whole = self._trial(candidate.recipe)

    def run(self) -> Ablation:
        """Leave each step out once; then take out together what does not pay, if the floor still holds."""
        template = self.candidate.recipe
        first = self.study.space.fixed(template)
        indices = [i for i, s in enumerate(template.steps) if not s.is_train and i >= first]
        rows = [Row(i, str(template.steps[i]), template.steps[i].method, self._family(template, i)) for i in indices]
        self._train([template.without(i) for i in self._in_turn(indices)])
        self._pace([template.without(i) for i in indices])
        ratios = self._time({r.index: template.without(r.index) for r in rows if self._changes_cost(template, r.index)})
        for row in rows:
            self._judge(row, template.without(row.index), ratios.get(row.index))
        return self._reduce(rows)

    def _in_turn(self, indices: list[int]) -> list[int]:
        """What needs no training first; then one step of each family in turn, since the time may not do for all."""
        steps = self.candidate.recipe.steps
        last = max((i for i, s in enumerate(steps) if s.is_train), default=-1)
        queues: dict[str, list[int]] = {}
        for i in indices:
            if i < last:
                queues.setdefault(self._family(self.candidate.recipe, i), []).append(i)
        turns = (i for turn in zip_longest(*queues.values()) for i in turn if i is not None)
        return [*(i for i in indices if i > last), *turns]

    def _seconds(self) -> float:
        """What the candidate's own training took."""
        before = self.study.baseline.values if self.study.space.fixed(self.candidate.recipe) else {}
        return self.whole.values["seconds"] - before.get("seconds", 0.0) if self.whole is not None else 0.0

    def _family(self, recipe: Recipe, index: int) -> str:
        return str(self.study.space.cards[recipe.steps[index].method]["family"])

    def _changes_cost(self, recipe: Recipe, index: int) -> bool:
        space = self.study.space
        return space.cost_part(recipe.without(index)).hash != space.cost_part(recipe).hash

    def _exact(self, template: Recipe) -> Recipe:
        return self.explorer.exact(template, self.rung)

    def _trial(self, template: Recipe) -> Trial | None:
        return self.study.find(("search", "ablation"), self._exact(template))

    def _train(self, templates: list[Recipe]) -> None:
        """Train those that the time allows, two orders ahead at the most."""
        study = self.study
        waiting = [t for t in templates if study.space.illegal(t) is None and self._trial(t) is None]
        until = self.reserve + ablation_seconds(study, self.candidate.recipe, 0.0)  # what is trained is timed as well
        while (waiting or study.running) and study.budget.left > until:
            while waiting and study.running < study.workers:
                if self._anew(waiting[0]) and self._seconds() > study.budget.left - until:
                    waiting.pop(0)  # it would be cut off
                else:
                    self._submit(waiting.pop(0), until)
            study.collect(min(1.0, max(0.01, study.budget.left - until)))
            study.say("ablation", f"{len(waiting) + study.running} of {len(templates)} left")
        study.forget()

    def _anew(self, template: Recipe) -> bool:
        """Whether its training is another than the candidate's."""
        mine, whole = (self._exact(t) for t in (template, self.candidate.recipe))
        last = max((i for i, s in enumerate(mine.steps) if s.is_train), default=-1)
        return mine.steps[: last + 1] != whole.steps[: last + 1]

    def _pace(self, templates: list[Recipe]) -> None:
        """Time the training steps of each, where training is the objective."""
        study = self.study
        if study.options.minimize == "train_cost":
            for template in templates:
                if study.space.illegal(template) is None and self.explorer.pace(template) is None:
                    study.submit("cost", "cost", study.space.cost_part(template), limit=study.patience(60))
            for trial in study.collect_all(self.reserve):
                self.explorer.costs[trial.recipe.hash] = trial
            study.forget()

    def _submit(self, template: Recipe, until: float) -> None:
        study = self.study
        study.submit("ablation", "train", self._exact(template), limit=max(5.0, study.budget.left - until))

    def _time(self, variants: dict[int, Recipe]) -> dict[int, dict[str, Any]]:
        """Time without each step over time with all, by the paired protocol, both batch sizes together."""
        study = self.study
        if not variants or study.budget.left < self.reserve + 10:
            return {}
        study.say("ablation", f"building the winner without each of {len(variants)} steps, to time them in turn")
        folders = {"whole": self._build(self.candidate.recipe)}
        folders.update({str(i): self._build(t) for i, t in variants.items() if study.space.illegal(t) is None})
        study.collect_all(self.reserve)
        study.forget()
        ready = {k: {"kind": "folder", "path": str(f)} for k, f in folders.items() if (f / "load.py").is_file()}
        if "whole" not in ready or len(ready) < 2:
            return {}
        rounds = [self._round(ready)]
        found = _ratios(rounds, list(ready), study.batches)
        doubtful = [k for k, r in found.items() if _doubtful(r)]
        if doubtful and study.budget.left > self.reserve + 10:  # worth knowing: it may cost speed to leave them out
            rounds.append(self._round({k: ready[k] for k in ("whole", *doubtful)}, restarts=8))
            found.update(_ratios(rounds, ["whole", *doubtful], study.batches))
        return {int(k): r for k, r in found.items()}

    def _round(self, arms: dict[str, dict[str, str]], **more: int) -> Timings:
        study = self.study
        left = max(5.0, study.budget.left - self.reserve)
        study.say("ablation", f"timing {len(arms)} arms in turn, each in its own process (at most {left:.0f} s)")
        return timed(study, arms, **{**ABLATED, **more}, budget=left)

    def _build(self, template: Recipe) -> Path:
        part = self.study.space.cost_part(template)
        name = f"ablation-{part.hash}"
        self.study.submit("build", "build", part, limit=self.study.patience(60), args={"name": name})
        return self.study.folder / BUILT / name

    def _judge(self, row: Row, template: Recipe, timing: dict[str, Any] | None) -> None:
        reason = self.study.space.illegal(template)
        if reason is not None:
            row.pays, row.why = True, f"without it the recipe cannot be: {reason}"
            return
        trial = self._trial(template)
        if trial is None:
            failed = next((t for t in self.study.stage("ablation") if t.recipe == self._exact(template)), None)
            if failed is not None:
                row.pays, row.why = True, f"without it: {failed.reason}"
            else:
                row.why = "the budget did not allow to measure it"
            return
        self._compare(row, trial, timing)
        row.pays, row.why = self._verdict(row, trial)

    def _compare(self, row: Row, trial: Trial, timing: dict[str, Any] | None) -> None:
        assert self.whole is not None
        row.quality_gain = self.study.paired(self.whole)[0] - self.study.paired(trial)[0]
        row.latency_ratio = timing
        row.bytes_ratio = trial.values["bytes"] / self.whole.values["bytes"]
        row.train_cost_ratio = self._training_ratio(row.index, trial)

    def _training_ratio(self, index: int, trial: Trial) -> float | None:
        """Training cost without a step over that with it: in processor time where that is the objective, else in FLOPs."""
        assert self.whole is not None
        if self.study.options.minimize != "train_cost":
            flops = self.whole.values.get("train_flops")
            return trial.values["train_flops"] / flops if flops else None
        recipes = (self.candidate.recipe.without(index), self.candidate.recipe)
        paces = [self.explorer.pace(r) for r in recipes]
        if None in paces:
            return None
        return paces[0] * trial.values["samples"] / (paces[1] * self.whole.values["samples"])  # type: ignore[operator]

    def _verdict(self, row: Row, trial: Trial) -> tuple[bool | None, str]:
        chance = self.bar.chance(Score(*self.study.paired(trial)))
        if chance < SAFE:
            return True, f"without it the floor would hold with a probability of only {chance:.3f}"
        if broken := over_limit(self.study, dict(trial.values)):
            return True, f"without it {broken}"
        objective = self.study.options.minimize
        if objective == "latency" and row.latency_ratio and row.latency_ratio["low"] > 1:
            sure = "at least {low:.2f}" if row.latency_ratio["verdict"] == UNMEASURED else "{value:.2f}"
            return True, f"without it {sure.format(**row.latency_ratio)} times as slow"
        if objective == "latency" and _doubtful(row.latency_ratio):
            return (
                None,
                f"without it perhaps {row.latency_ratio['value']:.2f} times as slow; the interval includes 1, so it stays",
            )
        if objective == "bytes" and (row.bytes_ratio or 1) > 1.001:
            return True, f"without it {row.bytes_ratio:.2f} times the bytes"
        if (row.train_cost_ratio or 1) > 1.02:
            of = "processor time of training" if objective == "train_cost" else "training FLOPs"
            return True, f"without it {row.train_cost_ratio:.2f} times the {of}"
        if objective == "train_cost" and row.train_cost_ratio is None:
            return None, "the budget did not allow to time the training without it"
        if objective == "latency" and row.latency_ratio is None and self._changes_cost(self.candidate.recipe, row.index):
            return None, "the budget did not allow to time the recipe without it"
        return False, "without it nothing is worse"

    def _reduce(self, rows: list[Row]) -> Ablation:
        """Take out what does not pay: all of it, else the one that matters least."""
        template = self.candidate.recipe
        useless = [r for r in rows if r.pays is False]
        tries = [useless] + ([[max(useless, key=self._loss)]] if len(useless) > 1 else [])
        for group in tries:
            reduced = template
            for row in sorted(group, key=lambda r: -r.index):
                reduced = reduced.without(row.index)
            if group and self._holds(reduced):
                taken = [r.method for r in group]
                return Ablation(rows, reduced, self._exact(reduced), taken)
        for row in useless:
            row.why = "without it nothing is worse, but without all of these together the floor is missed; it stays"
        return Ablation(rows, template, self._exact(template))

    def _loss(self, row: Row) -> float:
        return -(row.quality_gain or 0.0)

    def _holds(self, template: Recipe) -> bool:
        if self.study.space.illegal(template) is not None:
            return False
        if self._trial(template) is None:
            self._train([template])
        trial = self._trial(template)
        if trial is None or self.bar.chance(Score(*self.study.paired(trial))) < SAFE:
            return False
        return not over_limit(self.study, dict(trial.values))


def _doubtful(found: dict[str, Any] | None) -> bool:
    """Whether leaving the step out may cost speed, without being shown to."""
    return found is not None and found["verdict"] in ("undecided", UNMEASURED) and found["value"] > EQUIVALENT


def _ratios(rounds: list[Timings], arms: list[str], batches: tuple[int, ...]) -> dict[str, dict[str, Any]]:
    """Arm → time over that of the whole recipe, both batch sizes together, restarts of all rounds put together."""
    found = {}
    for arm in arms:
        slow: list[list[float]] = []
        fast: list[list[float]] = []
        for timings in rounds:
            if arm not in timings[batches[0]]:
                continue
            one, other = (_geometric([timings.per_call(b, name) for b in batches]) for name in (arm, "whole"))
            count = min(len(one), len(other))
            slow, fast = slow + one[:count], fast + other[:count]
        if slow and arm != "whole":
            result = ratio(slow, fast, level=TIMING_LEVEL)
            found[arm] = {"value": result.value, "low": result.low, "high": result.high, "verdict": result.verdict}
    return found


def _geometric(tables: list[list[list[float]]]) -> list[list[float]]:
    """Per restart and block, the geometric mean over tables."""
    return [
        [math.exp(sum(map(math.log, cells)) / len(cells)) for cells in zip(*rows, strict=True)]
        for rows in zip(*tables, strict=True)
    ]
