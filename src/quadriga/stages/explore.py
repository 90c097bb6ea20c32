"""The search: cost first, then training only those candidates that can still win."""

from __future__ import annotations

import math
import re
from collections import Counter
from itertools import chain
from pathlib import Path
from statistics import geometric_mean

from quadriga.core.errors import BadInput
from quadriga.core.recipe import Recipe, Step
from quadriga.core.trial import Status, Trial
from quadriga.search.allocate import SHARED, Allocator, Candidate, Score
from quadriga.search.lead import Lead
from quadriga.search.propose import Proposer
from quadriga.search.space import at_rung, trained_epochs
from quadriga.stages.baseline import bar, gain_of
from quadriga.stages.portfolio import leave_out, refused_step
from quadriga.stages.prices import ablation_seconds, epoch_seconds
from quadriga.stages.state import Study

OTHERS = 3  # of so many starts one is an opponent's probe, while some are left
OPEN = 6  # candidates kept in sight before new ones are proposed
LEAST = 0.02  # gain in the objective, as a natural logarithm, that is worth a training
PROBED, AGAIN = 90.0, 3.0  # least seconds that a probe may take, for a method may measure on its way; how much more the second
EMPTY_HANDED = 0.5  # of the reserve: a search that has found nothing goes on into the rest, which has nothing to verify
ETA, RUNGS = 2.0, 5  # each rung trains so many times longer than the one before; how many there are
LONGEST = 3.0  # times the baseline's own training: what a candidate may be trained at the most
FREE = 30.0  # epochs, where the model comes trained
HALF = 0.5  # of all workers' time that is left: so long the longest training may take
TOLD = 3  # candidates of which the notes say what they lacked
SLOWER = 1.15  # trainings beside each other take so much longer than the first ones said


class Explorer:
    """Keeps the candidates and decides what the next free worker does.

    Everything it knows comes from acknowledged trials, so a resumed study goes on where it was.

    Args:
        study: the state.
        reserve: seconds of budget to be left for verification and report; what the ablation takes depends on the winner.
    """

    def __init__(self, study: Study, reserve: float) -> None:
        self.study, self.reserve = study, reserve
        self.rungs = rungs(study, reserve)
        self.allocator = Allocator(bar(study), self.rungs, self._reach)
        self.lead = Lead(study.space, self.allocator)
        self.proposer = Proposer(study.space, study.options.seed)
        self.candidates: dict[str, Candidate] = {}
        self.costs: dict[str, Trial] = {}
        self.queue = [r for recipe in study.portfolio for r in self._lengths(recipe) if self._fits(r)]
        self.waiting: dict[str, list[Recipe]] = {r.hash: [] for r in study.under_way("cost")}
        self.known: set[str] = set()
        self.whole: set[str] = set()  # recipes with the ending that they keep
        self.turn = 0
        self.probed = False  # whether the last start was a probe
        self.started = 0
        for trial in study.trials:
            self.remember(trial)

    @property
    def _cheap_training(self) -> bool:
        """Whether training itself is to be cheaper: then a recipe's own length is part of it, and there are no rungs."""
        return self.study.options.minimize == "train_cost"

    def _lengths(self, recipe: Recipe) -> list[Recipe]:
        """The recipe itself; where training is to be cheaper, at half the baseline's length, where `_descend` goes on."""
        total = trained_epochs(self.study.workload.baseline)
        return [scaled(recipe, total / 2)] if self._cheap_training and total else [recipe]

    def _descend(self, candidate: Candidate) -> None:
        """Where training is to be cheaper: half as long if the floor is likely to hold, half as long again if it is not.

        That may be longer than the baseline, as long as it costs less: with steps of a third of the price there is room.
        """
        recipe, length = candidate.recipe, trained_epochs(candidate.recipe)
        wanted = length / 2 if self.allocator.chance(candidate) > 0.5 else length * 1.5
        if length and not self.study.space.fixed(recipe):
            new = scaled(recipe, wanted)
            if new.hash not in self.known and candidate.gain > math.log(wanted / length) + LEAST:
                self.queue.insert(0, new)

    def _fits(self, recipe: Recipe) -> bool:
        reason = self.study.space.illegal(recipe)
        if reason is not None and not any(t.stage == "portfolio" and t.recipe == recipe for t in self.study.trials):
            self.study.add(Trial(self.study.number, "portfolio", recipe, self.study.options.seed, Status.REFUSED, reason))
        return reason is None

    def run(self) -> None:
        """Search until the budget's share is spent or nothing can win any more."""
        study = self.study
        while study.budget.left > self._until():
            while study.running < study.workers and self._start_one():
                pass
            if not study.running:
                break
            trial = study.collect(min(1.0, max(0.01, study.budget.left - self._until())))
            if trial is not None:
                self.remember(trial)
                self._tell()
        if left := [recipe.name for _, _, recipe in study.later]:
            study.notes.append(f"the budget did not allow to probe the unchanged model as: {'; '.join(left)}")
        study.notes += self._lacking()

    def _until(self) -> float:
        """Seconds of budget at which the search ends: later while nothing has been found that could be verified."""
        best = self.allocator.qualified(self.candidates.values())
        return self._kept_for(best[0]) if best else EMPTY_HANDED * self._kept_for(None)

    def _kept_for(self, candidate: Candidate | None, rung: int | None = None) -> float:
        """Seconds that have to be left when a candidate is the winner, at a rung or as long as it was trained."""
        return self.reserve + self.ablating(candidate, rung)

    def ablating(self, candidate: Candidate | None, rung: int | None = None) -> float:
        """Seconds that its ablation takes."""
        if candidate is None or not candidate.trains:
            return ablation_seconds(self.study, candidate and candidate.recipe, 0.0)
        length = self.rungs[max(candidate.scores, default=0) if rung is None else rung]
        return ablation_seconds(self.study, candidate.recipe, length * self._epoch(candidate))

    def _epoch(self, candidate: Candidate) -> float:
        """Seconds that a candidate's epoch takes: as it was seen, else as the unchanged model's."""
        return candidate.epoch or epoch_seconds(self.study)

    def _left(self, candidate: Candidate, rung: int) -> float:
        """Seconds that are left for the search if a candidate is trained to a rung and wins."""
        return self.study.budget.left - max(self._until(), self._kept_for(candidate, rung))

    def _seconds(self, candidate: Candidate, rung: int) -> float:
        """What a candidate's training to a rung takes, from where it stands."""
        if self._cheap_training:  # what it gains is what it costs less
            return self.study.baseline.values["seconds"] * math.exp(-candidate.gain)
        done = self.rungs[max(candidate.scores)] * SHARED if candidate.scores else 0.0
        return SLOWER * self._epoch(candidate) * (self.rungs[rung] - done)

    def _reach(self, candidate: Candidate) -> int:
        """The longest rung that a candidate can be trained to in the time that is left."""
        first = max(candidate.scores, default=-1)
        if self._under_way(candidate):
            return first
        able = [r for r in range(first + 1, len(self.rungs)) if self._seconds(candidate, r) < self._left(candidate, r)]
        return max(able, default=first)

    def _under_way(self, candidate: Candidate) -> bool:
        """Whether its network is being trained for another ending: that training is there for both when it is done."""
        others = (c for c in self.candidates.values() if c.running and c.trains and c is not candidate)
        return any(self.lead.same_network(candidate.recipe, other.recipe) for other in others)

    def _tell(self) -> None:
        best = self.allocator.qualified(self.candidates.values())
        text = f"{len(self.study.stage('search'))} trained, {len(self.costs)} costed"
        shown = math.exp(best[0].gain) if best else None
        self.study.say("search", text, best=shown)

    def _start_one(self) -> bool:
        """Start a cost probe or a training, by turns where there are both; False when nothing is left to do."""
        self.started += 1
        if self.study.later and self.started % OTHERS == 0 and self._oppose():
            return True
        if self.probed and self._in_sight() and self._train_one():
            self.probed = False
            return True
        self.probed = self._probe_next()
        return self.probed or self._train_one() or self._oppose()

    def _oppose(self) -> bool:
        """Start the probe of an opponent that waits for it."""
        while self.study.later:
            stage, task, recipe = self.study.later.pop(0)
            if stage == "cost":
                if recipe.hash in self.costs or recipe.hash in self.waiting:
                    continue
                self.waiting[recipe.hash] = []  # candidates that cost the same wait for this probe
            self.study.submit(stage, task, recipe, limit=self.study.patience(60))
            return True
        return False

    def _probe_next(self) -> bool:
        """Start a cost probe of what waits, or, while few candidates are in sight, of a new proposal."""
        if self._probe_one() or self._probe_again():
            return True
        while not self.queue and self._in_sight() < OPEN and self._propose():  # what waits for its ending goes first
            if self._probe_one():
                return True
        return False

    def _probe_again(self) -> bool:
        """Start a probe that ran into its limit once more, with a larger one: other work may have slowed it down."""
        limit, left = self.study.patience(PROBED), self.study.budget.left - self._until()
        if left < limit:
            return False
        tried = Counter(t.recipe.hash for t in self.study.stage("cost"))
        for part, trial in self.costs.items():
            if trial.status is Status.TIMED_OUT and tried[part] == 1 and part not in self.waiting:
                cost_part = self.study.space.cost_part
                self.waiting[part] = [c.recipe for c in self.candidates.values() if cost_part(c.recipe).hash == part]
                self.study.submit("cost", "cost", trial.recipe, limit=min(AGAIN * limit, left))
                return True
        return False

    def _in_sight(self) -> int:
        """Candidates that may still be trained with a gain over the incumbent."""
        safe = self.allocator.qualified(self.candidates.values())
        bar = safe[0].gain if safe else 0.0
        return sum(c.gain > bar and not c.dead and not self.allocator.done(c) for c in self.candidates.values())

    def _probe_one(self) -> bool:
        """Start the first cost probe of the queue that nobody has asked for yet."""
        while (recipe := self._next_of_queue()) is not None:
            if recipe.hash in self.known:
                continue
            self.known.add(recipe.hash)
            part = self.study.space.cost_part(recipe)
            if part.hash in self.costs:
                self._enter(recipe, self.costs[part.hash])
                continue
            asked = part.hash in self.waiting
            self.waiting.setdefault(part.hash, []).append(recipe)
            if not asked:
                left = max(5.0, self.study.budget.left - self._until())
                self.study.submit("cost", "cost", part, limit=min(self.study.patience(PROBED), left))
                return True
        return False

    def _next_of_queue(self) -> Recipe | None:
        """The next recipe to cost. One that changes the network waits for the ending that suits the unchanged one best."""
        by_speed = self.study.options.minimize == "latency"
        for place, recipe in enumerate(self.queue):
            if not by_speed or recipe.hash in self.whole or not self.lead.changes(recipe):
                return self.queue.pop(place)
            if not self.study.running or not self.lead.open(self.candidates.values(), chain(*self.waiting.values())):
                whole, *more = self.lead.ended(self.queue.pop(place), self.candidates.values())
                self.whole |= {r.hash for r in (whole, *more)}
                self.queue[:0] = more
                return whole
        return None

    def _train_one(self) -> bool:
        """Start the most promising training that would end in time."""
        chosen = self.allocator.next(list(self.candidates.values()))
        if chosen is None:
            return False
        candidate, rung, value = chosen
        self.train(candidate, rung, value, self._until() - 2)
        return True

    def train(self, candidate: Candidate, rung: int, value: float, reserve: float) -> None:
        """Order the training of a candidate, to end when so many seconds of budget are left."""
        candidate.running = True
        recipe = self.exact(candidate.recipe, rung)
        self.study.submit(
            "search", "train", recipe, limit=max(5.0, self.study.budget.left - reserve),
            template=candidate.recipe.plain(), rung=rung, value=value,
        )  # fmt: skip

    def retimed(self, recipe: Recipe) -> Candidate:
        """A candidate by the last measurement of its cost; what is known of its quality stays."""
        old = self.candidates.get(recipe.hash)
        self._enter(recipe, self.costs[self.study.space.cost_part(recipe).hash])
        if old is not None:
            self.candidates[recipe.hash].scores = old.scores
        return self.candidates[recipe.hash]

    def exact(self, recipe: Recipe, rung: int) -> Recipe:
        """A template at a training length."""
        if self._cheap_training:
            return recipe
        return at_rung(recipe, self.rungs, rung, self.study.space.fixed(recipe))

    def _propose(self) -> bool:
        """One new recipe near the best ones: in turn an edit, and fields proposed by TPE. False when there is none."""
        ranked = sorted((c for c in self.candidates.values() if c.scores or not c.trains), key=self._utility, reverse=True)
        for base in ranked[:3]:
            self.turn += 1
            for edit in (self.turn % 2 == 1, self.turn % 2 == 0):
                new = self.proposer.edit(base.recipe, self.known) if edit else self._fields(base.recipe)
                if new is not None and self._fits(new):
                    self.whole.add(new.hash)
                    self.queue.append(new)
                    return True
        return False

    def _fields(self, recipe: Recipe) -> Recipe | None:
        told = [(c.recipe, self._utility(c)) for c in self.candidates.values() if c.scores]
        return self.proposer.fields(recipe, told, self.known)

    def _utility(self, candidate: Candidate) -> float:
        """Gain, less a penalty for what is missing to the floor, in standard errors."""
        if not candidate.scores:
            return candidate.gain - 1.0
        score = candidate.scores[max(candidate.scores)]
        error = score.sd / math.sqrt(self.allocator.bar.n_val) or 1e-9
        return (
            candidate.gain
            + 0.2 * min(0.0, self.allocator.bar.slack(score) / error)
            - 0.1 * (self.allocator.top - max(candidate.scores))
        )

    def remember(self, trial: Trial) -> None:
        """Learn from an acknowledged trial."""
        if trial.stage == "cost":
            self.costs[trial.recipe.hash] = trial
            for recipe in self.waiting.pop(trial.recipe.hash, []):
                self._enter(recipe, trial)
        elif trial.stage == "search":
            self._score(trial)

    def _enter(self, recipe: Recipe, cost: Trial) -> None:
        """A costed recipe becomes a candidate, or is out at once."""
        gain = gain_of(self.study, dict(cost.values), trained_epochs(recipe)) if cost.ok else 0.0
        trains = trained_epochs(Recipe(recipe.steps[self.study.space.fixed(recipe) :])) > 0
        dead = "" if cost.ok else cost.reason
        if cost.ok:
            dead = over_limit(self.study, cost.values) or ("" if gain > LEAST else "no gain in the objective")
        self.known.add(recipe.hash)
        price = math.exp(-gain) if self._cheap_training else None
        self.candidates[recipe.hash] = Candidate(recipe, gain, trains=trains, dead=dead, price=price)
        if trains and not dead and not self._cheap_training:
            self._keep_the_faster(self.candidates[recipe.hash])
        for what, why in cost.info.get("left", ()):
            leave_out(self.study, recipe, f"part of {what}", why)
        if cost.status is Status.REFUSED:
            self._leave_out(recipe, cost)

    def _keep_the_faster(self, candidate: Candidate) -> None:
        """Of one network with two endings the slower one is not trained, unless it computes more exactly."""
        for other in [*self.candidates.values()]:
            if (
                other is not candidate
                and other.trains
                and not other.dead
                and self.lead.same_network(candidate.recipe, other.recipe)
            ):
                fast, slow = sorted((candidate, other), key=lambda c: -c.gain)
                if not slow.scores and not slow.running and in_int8(fast.recipe) <= in_int8(slow.recipe):
                    slow.dead = f"the same network is faster as {fast.recipe.steps[-1].method} executes it"

    def _leave_out(self, recipe: Recipe, trial: Trial) -> None:
        """A recipe of which one step was refused is tried again without that step, before what waits; and so on."""
        fixed = self.study.space.fixed(recipe)
        index = refused_step(recipe, trial, fixed)
        if index is None:
            return
        rest = self.study.space.mended(recipe.without(index))
        if rest is not None and len(rest.steps) > fixed:
            leave_out(self.study, recipe, str(recipe.steps[index]), trial.reason)
            rest = self.study.space.complete(rest)
            self.whole.add(rest.hash)
            self.queue.insert(0, rest)

    def _score(self, trial: Trial) -> None:
        recipe = Recipe.from_plain(trial.info["template"], trial.recipe.name)
        if recipe.hash not in self.candidates:
            part = self.study.space.cost_part(recipe).hash
            if part not in self.costs:
                return
            self._enter(recipe, self.costs[part])
        candidate = self.candidates[recipe.hash]
        candidate.running = False
        if not trial.ok:
            candidate.dead = trial.reason or str(trial.status)
            if trial.status is Status.REFUSED:
                self._leave_out(recipe, trial)
            return
        difference, sd = self.study.paired(trial)
        candidate.scores[trial.info["rung"]] = Score(difference, sd)
        candidate.epoch = self._seen_epoch(candidate, trial) or candidate.epoch
        values = {**self.costs[self.study.space.cost_part(recipe).hash].values, **trial.values}  # bytes may go by the weights
        candidate.gain = gain_of(self.study, values, trained_epochs(recipe))
        candidate.dead = over_limit(self.study, values)
        if self._cheap_training and not candidate.dead:
            self._descend(candidate)

    def _seen_epoch(self, candidate: Candidate, trial: Trial) -> float:
        """Seconds that an epoch of its own training took; 0 where it had none."""
        before = self.study.baseline.values if self.study.space.fixed(candidate.recipe) else {}
        examples = len(self.study.workload.train) if self.study.workload.train is not None else 0
        own = trial.values.get("samples", 0.0) - before.get("samples", 0.0)
        return (trial.values["seconds"] - before.get("seconds", 0.0)) / own * examples if own > 0 else 0.0

    def _lacking(self) -> list[str]:
        """What the fastest that were trained and do not hold the floor lacked, and why they were not carried on."""
        best = self.allocator.qualified(self.candidates.values())
        least, unit = best[0].gain if best else 0.0, self.study.workload.metric.unit
        missed = [c for c in self.candidates.values() if c.trains and c.scores and not c.dead and c.gain > least]
        return [self._lack(c, unit) for c in sorted(missed, key=self._utility, reverse=True)[:TOLD] if c not in best]

    def _lack(self, candidate: Candidate, unit: str) -> str:
        rung, chance = max(candidate.scores), self.allocator.chance(candidate)
        lack = -self.allocator.bar.slack(candidate.scores[rung])
        short = (
            f"{lack:.2g} {unit} short of what proves the floor" if lack > 0 else f"a chance of {chance:.0%} to prove the floor"
        )
        told = f"{candidate.recipe.name}: {math.exp(candidate.gain):.2f} times as fast as eager PyTorch"
        told += f", {short} after {self.rungs[rung]:.3g} epochs"
        if rung == self.allocator.top:
            return f"{told}, the longest training that was planned"
        seconds = self._seconds(candidate, rung + 1)
        late = self._left(candidate, rung + 1) < seconds
        return f"{told}; " + (
            f"{self.rungs[rung + 1]:.3g} epochs take {seconds:.0f} s, which were not left"
            if late
            else "more would hardly reach it"
        )

    def pace(self, recipe: Recipe) -> float | None:
        """What its training costs per example, over the baseline's; None where it was not timed."""
        trial = self.costs.get(self.study.space.cost_part(recipe).hash)
        return trial.values.get("pace") if trial is not None else None

    def finalists(self) -> list[Candidate]:
        """At most two: the best gain that is likely to pass, and one that is likelier to."""
        likeliest = sorted((c for c in self.candidates.values() if c.gain > 0.02), key=self.allocator.chance, reverse=True)
        likeliest = [c for c in likeliest if self.allocator.chance(c) > 0]
        chosen = self.allocator.qualified(self.candidates.values())[:1] or likeliest[:1]
        if chosen and (rest := [c for c in likeliest if c is not chosen[0]]):
            first, second = self.allocator.chance(chosen[0]), self.allocator.chance(rest[0])
            if second > first + 0.02 and first < 0.97:
                chosen.append(rest[0])
        return chosen

    def rung(self, candidate: Candidate) -> int:
        """The longest training that a candidate had."""
        return max(candidate.scores)


def in_int8(recipe: Recipe) -> bool:
    """Whether a recipe's runtime computes in int8."""
    return any(s.method == "quantize_int8" for s in recipe.steps)


def scaled(recipe: Recipe, epochs: float) -> Recipe:
    """The recipe with its train steps scaled to so many epochs together."""
    total = trained_epochs(recipe)
    name = re.sub(r", [\d.]+ epochs$", "", recipe.name)
    steps = (
        Step("train", {**s.fields, "epochs": float(f"{s.fields.get('epochs', 10) * epochs / total:.4g}")}) if s.is_train else s
        for s in recipe.steps
    )
    return Recipe(tuple(steps), name and f"{name}, {epochs:.4g} epochs")


def over_limit(study: Study, values: dict[str, float]) -> str:
    """Which of the user's limits a candidate breaks, or ""."""
    base = study.baseline.values
    for name, bound in study.options.limits.items():
        key = {"train_cost": "seconds"}.get(name, name)
        if name == "latency":
            ratio = 1 / geometric_mean(study.speed_ups(values))
        elif key not in values or not base.get(key):
            continue
        else:
            ratio = values[key] / base[key]
        if ratio > bound:
            return f"{name} is {ratio:.3g} of the baseline, over the limit {bound:g}"
    return ""


def rungs(study: Study, reserve: float) -> tuple[float, ...]:
    """Epochs of the training lengths: the longest is as long as half of what all workers have left, and no longer than
    `LONGEST` times the baseline's own.

    Kept in the store at the first call, since a resumed search has to compare with what was trained before.
    """
    if kept := study.store.get("rungs"):
        return tuple(kept)
    own = trained_epochs(study.workload.baseline)
    if study.options.minimize == "train_cost":
        return (own or 1.0,)
    top, epoch = LONGEST * own if own else FREE, epoch_seconds(study)
    if study.workload.train is not None and epoch:
        top = min(top, HALF * max(5.0, study.budget.left - reserve) * study.workers / epoch)
    top = max(top, 0.05)
    lengths = tuple(float(f"{top / ETA**k:.3g}") for k in reversed(range(RUNGS)))
    study.store.put("rungs", lengths)
    return lengths


def load_portfolio(objective: str = "latency") -> list[Recipe]:
    """The shipped recipes for an objective, in the order of their file names: `train-*` where training is to be cheaper."""
    here = Path(__file__).resolve().parents[1]
    folder = next((f for f in (here / "recipes", here.parents[1] / "recipes") if f.is_dir()), None)
    if folder is None:
        raise BadInput("the shipped recipes are missing", "install Quadriga again")
    pattern = "train-[0-9]*.toml" if objective == "train_cost" else "[0-9]*.toml"
    return [Recipe.load(path) for path in sorted(folder.glob(pattern))]
