"""What the stations share: the task, the budget, the store, the engine, and the trials so far."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from quadriga.core.errors import BadInput, did_you_mean
from quadriga.core.metric import Floor
from quadriga.core.recipe import Recipe
from quadriga.core.trial import Status, Trial
from quadriga.core.workload import Workload
from quadriga.engine.base import Engine, Order
from quadriga.engine.store import Store
from quadriga.measure.machine import fingerprint
from quadriga.measure.quality import Scores
from quadriga.search.space import Space
from quadriga.stages.again import code_key, counts, told

PROBE, SHARE = 80, 10  # training steps, as long as which a probe may take; it may take one part in so many of the budget
LEVEL = 0.975  # one-sided, of the quality claim, divided among the finalists (ICH E9 convention)
TIMING_LEVEL = 0.99
FINALISTS = 2
TIMED = ("speed/", "pace", "latency/")  # values that are compared, and hold for one kind of machine
OBJECTIVES = ("latency", "bytes", "parameters", "train_cost")
WORDS = 60  # characters of a recipe on screen
SILENCE = 5.0  # seconds, after which what is under way is told of again
DOING = {
    "train": "training and scoring",
    "cost": "measuring the cost of",
    "pace": "timing training steps of",
    "export": "exporting",
    "eager_variant": "timing",
    "profile": "profiling",
    "build": "building",
    "realize": "building",
    "score": "scoring",
    "artifact": "writing",
    "step_cost": "timing training steps of",
    "timings": "timing",
}
Progress = Callable[[Mapping[str, Any]], None]


class NothingToFind(Exception):
    """No recipe can end in an artifact, so the study ends before it has begun.

    Args:
        reason, remedy: as of the refusal.
    """

    def __init__(self, reason: str, remedy: str) -> None:
        super().__init__(reason)
        self.reason, self.remedy = reason, remedy


@dataclass(frozen=True)
class Options:
    """What the user asked for.

    Args:
        floor: how much quality may be lost.
        minimize: the objective, one of OBJECTIVES.
        limits: upper bounds of ratios winner/baseline, by objective name.
        budget: wall-clock seconds for everything from baseline to report.
        families: those that may be used.
        seed: of everything random.
        command: what reproduces the run.

    Raises:
        BadInput: a value that cannot be.
    """

    floor: Floor
    minimize: str = "latency"
    limits: Mapping[str, float] = field(default_factory=dict)
    budget: float = 600.0
    families: tuple[str, ...] = ("structure", "training", "optimizer", "hardware")
    seed: int = 0
    command: str = ""

    def __post_init__(self) -> None:
        for name in (self.minimize, *self.limits):
            if name not in OBJECTIVES:
                raise BadInput(f'"{name}" cannot be minimized or limited', did_you_mean(name, OBJECTIVES))
        for name in self.families:
            if name not in (known := ("structure", "training", "optimizer", "hardware")):
                raise BadInput(f'there is no family "{name}"', did_you_mean(name, known))
        for name, bound in self.limits.items():
            if not 0 < bound < float("inf"):
                raise BadInput(f"the limit {name}={bound} is not a positive ratio", "for example bytes=0.2")
        if not 1 <= self.budget < float("inf"):
            raise BadInput(f"the budget is {self.budget} seconds", "give at least a second, such as 90s or 10m")

    @property
    def hardware_alone(self) -> bool:
        """Whether only the hardware family is searched, so that nothing is trained anew."""
        return set(self.families) == {"hardware"}

    def identity(self) -> dict[str, Any]:
        """What makes two runs the same study."""
        return {**{k: v for k, v in asdict(self).items() if k not in ("command", "floor", "budget")}, "floor": str(self.floor)}


class Budget:
    """Wall-clock seconds of all sessions of a study; the time between sessions does not count, nor that of a broken-off end.

    Args:
        total: seconds.
        store: keeps what was spent.
        clock: monotonic seconds.
    """

    def __init__(self, total: float, store: Store, clock: Callable[[], float] = time.monotonic) -> None:
        self.total, self._store, self._clock = total, store, clock
        self._before = float(store.get("whole", store.get("spent", 0.0)))
        self._start = clock()
        self.phases: dict[str, float] = dict(store.get("phases", {}))

    @property
    def spent(self) -> float:
        """Seconds so far."""
        return self._before + self._clock() - self._start

    @property
    def left(self) -> float:
        """Seconds still to be had; negative when overdrawn."""
        return self.total - self.spent

    def keep(self) -> None:
        """Make what was spent durable."""
        self._store.put("spent", self.spent)
        self._store.put("phases", self.phases)

    def whole(self) -> None:
        """From here to the study's end all is done in one go: broken off, it is begun anew with the time that is left now."""
        self._store.put("whole", self._store.get("whole", self.spent))

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Book the time inside under a name."""
        start = self._clock()
        try:
            yield
        finally:
            self.phases[name] = self.phases.get(name, 0.0) + self._clock() - start


class Study:
    """One study's state. The stations read it and add trials to it; nothing else is shared between them."""

    def __init__(
        self, workload: Workload, options: Options, folder: Path, store: Store, engine: Engine, space: Space, progress: Progress
    ) -> None:
        self.workload, self.options, self.folder = workload, options, folder
        self.store, self.engine, self.space = store, engine, space
        self.budget = Budget(options.budget, store)
        self.code = code_key(workload.reference)
        known = store.trials()
        self.trials, lost = [t for t in known if counts(t, self.code)], [t for t in known if not counts(t, self.code)]
        self._next = 1 + max((t.number for t in known), default=-1)
        self.progress = progress
        self.machine = engine.resources().target  # facts of the one machine whose timings are compared
        self.notes: list[str] = told(lost)
        self.left_out: dict[tuple[str, str], dict[str, None]] = {}  # what of a recipe, and why → names of the recipes
        self.portfolio: list[Recipe] = []
        self.later: list[tuple[str, str, Recipe]] = []  # stage, task and recipe of opponents that are probed during the search
        self._orders: dict[int, tuple[str, Recipe, dict[str, Any]]] = {}
        self._doing: dict[int, str] = {}  # what each order under way is, in words
        self._count = 0
        self._said = ("", "", self.budget.spent)  # stage and text of the last progress, and when

    @property
    def short(self) -> bool:
        """Whether the budget is too small for every opponent: then only the strongest by the search's timing is an arm."""
        return self.options.budget < 120

    @property
    def batches(self) -> tuple[int, ...]:
        """The batch sizes at which latency is measured: 1 and the workload's."""
        return tuple(sorted({1, self.workload.batch_size}))

    def say(self, stage: str, text: str, **numbers: Any) -> None:
        """Report progress as plain data."""
        self._said = stage, text, self.budget.spent
        self.progress({"stage": stage, "text": text, "left": max(0.0, self.budget.left), **numbers})

    def add_word(self, more: str) -> None:
        """Say again what was said last, with how far it has come."""
        stage, text, _ = self._said
        self.progress({"stage": stage, "text": f"{text} · {more}", "left": max(0.0, self.budget.left)})
        self._said = stage, text, self.budget.spent

    def _still(self) -> None:
        """Say what is under way, where nothing was said for a while."""
        if self.budget.spent - self._said[2] >= SILENCE and self._doing:
            self.add_word("; ".join(list(self._doing.values())[: self.workers]))

    def submit(self, stage: str, task: str, recipe: Recipe, *, limit: float | None = None, **info: Any) -> int:
        """Send a recipe to the engine; `info` is kept in the trial."""
        self._count += 1
        always = {
            "batches": self.batches,
            "objective": self.options.minimize,
            "floor": self._floor(),
        }
        args = {"recipe": recipe.plain(), "hash": recipe.hash, **always, **info.pop("args", {})}
        self._orders[self._count] = (stage, recipe, info)
        self._doing[self._count] = f"{DOING.get(task, task)} {_named(recipe)}"
        self.engine.submit(Order(self._count, task, args, limit if limit is not None else max(5.0, self.budget.left)))
        return self._count

    def patience(self, least: float) -> float:
        """Seconds that a probe may take: a share of the budget, and as long as some batches take to train.

        Args:
            least: seconds.
        """
        return max(
            [least, self.options.budget / SHARE, *(PROBE * t.values.get("step", 0.0) for t in self.stage("pace") if t.ok)]
        )

    def _floor(self) -> dict[str, Any] | None:
        """What a candidate on val is held against, once the baseline was measured."""
        found = next((t for t in self.trials if t.stage == "baseline" and t.ok), None)
        if found is None:
            return None
        quality = found.values["quality"]
        margin = self.options.floor.margin(quality)
        narrow = margin - abs(margin) / 2  # val is no proof of what holds on test
        return {"quality": quality, "margin": narrow, "scores": found.info.get("scores")}

    @property
    def workers(self) -> int:
        """How many orders the engine runs at once."""
        return self.engine.resources().workers

    @property
    def startup(self) -> float:
        """Seconds that a fresh process takes until PyTorch and the workload are in its memory."""
        return self.engine.resources().startup

    @property
    def running(self) -> int:
        """Orders under way."""
        return len(self._orders)

    def collect(self, timeout: float) -> Trial | None:
        """Wait for one order and acknowledge its trial; None when none ended in time.

        Raises:
            BadInput: the answer is one that every process would give, such as that it made another workload.
        """
        found = self.engine.wait(timeout)
        if found is not None and found[1].get("fatal"):
            raise BadInput(*found[1]["bad_input"])
        if found is None or found[0] not in self._orders:
            self._still()
            return None
        stage, recipe, info = self._orders.pop(found[0])
        self._doing.pop(found[0], None)
        result = self._comparable(found[1])
        code = {"code": self.code} if result["status"] == Status.FAILED else {}
        trial = Trial(
            self.number, stage, recipe, self.options.seed, Status(result["status"]), result.get("reason", ""),
            result.get("values", {}), {**info, **result.get("info", {}), **_extra(result), **code},
        )  # fmt: skip
        self.add(trial)
        return trial

    @property
    def number(self) -> int:
        """Of the next trial."""
        return self._next

    def _comparable(self, result: dict[str, Any]) -> dict[str, Any]:
        """The result, unless it was timed on a machine unlike the target: unlike machines are never ranked together."""
        timed = [name for name in result.get("values", {}) if name.startswith(TIMED)]
        if not timed or result.get("machine") in (None, fingerprint(self.machine)):
            return result
        reason = f"{timed[0]} was measured on a machine unlike {self.machine['processor']}, where this study measures"
        return {"status": Status.REFUSED, "reason": reason, "machine": result["machine"]}

    def add(self, trial: Trial) -> None:
        """Acknowledge a trial: it is durable when this returns."""
        self.store.add(trial)
        self.budget.keep()
        self.trials.append(trial)
        self._next = max(self._next, trial.number + 1)

    def collect_all(self, deadline: float) -> list[Trial]:
        """Wait for every order under way, until so many seconds of budget are left."""
        done = []
        while self._orders and self.budget.left > deadline:
            trial = self.collect(min(1.0, max(0.01, self.budget.left - deadline)))
            if trial is not None:
                done.append(trial)
        return done

    def forget(self) -> int:
        """Give up what is still under way; returns how many orders were dropped. Those that no worker began are not run."""
        dropped = len(self._orders)
        self.engine.cancel()
        self._orders.clear()
        self._doing.clear()
        return dropped

    def stage(self, name: str) -> list[Trial]:
        """The trials of one stage."""
        return [t for t in self.trials if t.stage == name]

    def find(self, stages: Iterable[str], recipe: Recipe) -> Trial | None:
        """A completed trial of this very recipe."""
        return next((t for t in self.trials if t.stage in stages and t.recipe == recipe and t.ok), None)

    def under_way(self, stage: str) -> list[Recipe]:
        """Recipes whose orders of a stage have not come back."""
        return [recipe for name, recipe, _ in self._orders.values() if name == stage]

    @property
    def baseline(self) -> Trial:
        """The baseline's trial."""
        return next(t for t in self.trials if t.stage == "baseline")

    @property
    def eager(self) -> Trial | None:
        """How fast plain eager PyTorch is against the workers' reference; None until it was measured."""
        return next((t for t in self.trials if t.stage == "tuned_eager" and t.ok and not t.recipe.steps), None)

    def speed_ups(self, values: Mapping[str, float]) -> list[float]:
        """Speed against plain eager PyTorch, one for each batch size; all 1 where it was not measured."""
        eager = self.eager.values if self.eager else {}
        return [values.get(f"speed/{b}", 1.0) / eager.get(f"speed/{b}", 1.0) for b in self.batches]

    def scores(self, trial: Trial) -> Scores:
        """A trial's per-example results on val."""
        return Scores.load(self.folder / trial.info["scores"])

    def paired(self, trial: Trial) -> tuple[float, float]:
        """Quality difference to the baseline on val (positive is better) and its standard deviation per example."""
        ours, base = self.scores(trial), self.scores(self.baseline)
        metric = self.workload.metric
        sign = metric.scale if metric.higher_is_better else -metric.scale
        difference = metric.gain(ours.value, base.value)
        if ours.values is None or base.values is None:
            return difference, abs(base.value) * 0.5
        weights = base.weights / base.weights.mean()
        return difference, float(np.std(sign * (ours.values - base.values) * weights))


def _named(recipe: Recipe) -> str:
    """A recipe in a line for people."""
    told = recipe.name or (str(recipe) if recipe.steps else "the unchanged model")
    return told if len(told) <= WORDS else f"{told[: WORDS - 1]}…"


def _extra(result: Mapping[str, Any]) -> dict[str, Any]:
    kept = ("remedy", "spec", "bad_input", "step", "place", "machine")
    return {k: result[k] for k in kept if result.get(k) not in (None, "")}
