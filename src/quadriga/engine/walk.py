"""Walk a recipe from top to bottom: apply its methods, carry out its train steps or take them from checkpoints."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from quadriga.core.copies import copy_model
from quadriga.core.data import Data
from quadriga.core.errors import BadInput, NotApplicable
from quadriga.core.method import Family, Method
from quadriga.core.recipe import Recipe, Step
from quadriga.core.setup import PROBE, Setup
from quadriga.core.slots import Factors, RuntimeSpec, Schedule
from quadriga.core.workload import Workload
from quadriga.engine.decisions import Decisions
from quadriga.engine.teacher import asks, can_teach, lesson
from quadriga.methods import build
from quadriga.train.checkpoint import load_finished
from quadriga.train.gradients import fisher_diagonal, mean_gradients
from quadriga.train.loop import fit
from quadriga.verify.promise import hold
from quadriga.workloads import load
from quadriga.workloads.identity import identity
from quadriga.workloads.suspects import suspect


@dataclass(frozen=True)
class Walked:
    """The end of a walk.

    Args:
        setup: the finished setup; its model is trained if the recipe trains.
        samples: training examples seen, over all train steps, cached ones included.
        seconds: of training, cached steps included.
        cpu_seconds: processor time of training, cached steps included.
        checkpoint: folder of the last train step, or None.
        decisions: what methods decided by measurement: rows with "index" and "step", "key" and "value".
        notes: what happened in train steps, such as a return to an earlier state.
        staleness: of each train step by several workers, as in its outcome.
        left: what steps were asked for and left as it is: pairs of the step and the reason.
        rounds: number and name of the last step that set the type of the weights in the runtime, which may refuse it.
    """

    setup: Setup
    samples: int
    seconds: float
    cpu_seconds: float
    checkpoint: Path | None
    decisions: tuple[dict[str, Any], ...] = ()
    notes: tuple[str, ...] = ()
    staleness: tuple[dict[str, Any], ...] = ()
    left: tuple[tuple[str, str], ...] = ()
    rounds: tuple[int, str] | None = None


def walk(
    workload: Workload,
    recipe: Recipe,
    *,
    seed: int,
    store: Path | None,
    progress: Callable[[float], None] | None = None,
    services: Mapping[str, Any] | None = None,
    decisions: Path | None = None,
    until: int | None = None,
    ready: Path | None = None,
    before_train: Callable[[Setup, int], None] | None = None,
    rehearsal: bool = False,
) -> Walked:
    """Apply every step of a recipe to a fresh setup.

    Train steps are kept under `store` by the hash of (workload, seed, prefix, decisions made in it), so that recipes
    with a common prefix share its training and a killed step goes on where it was. Without a store nothing is trained:
    the walk is a cost probe, which grants TRAINED and can never be verified.

    Where a method requires TEACHER, the baseline is walked first, in the same store: it is trained there once, for every
    recipe and process that learns from it. A model that comes trained is its own teacher.

    Args:
        services: further fields of the context, such as `evaluate` and `time`.
        decisions: folder of what methods decided by measurement; without one it holds for this walk.
        until: only so many steps are carried out; what the later ones say of the runtime is known all the same.
        ready: where a probe finds checkpoints: a train step that is finished there gives its weights, others are skipped.
        before_train: of a probe, called with the setup and the number of the step where a train step stands.
        rehearsal: of a probe that a training follows: what is decided behind a skipped train step is not kept, since it
            will be decided on other weights.

    Raises:
        NotApplicable: a method refuses, and `place` is the number of its step; Diverged: the loss is not finite.
    """
    assert workload.baseline is not None, "a workload fills in its baseline"
    recipe = recipe.on(workload.baseline)
    methods: list[Method | None] = [None if s.is_train else build(s) for s in recipe.steps]
    known = dict(services or {})
    if can_teach(workload) and asks(methods[:until]):
        taught = lesson(workload, recipe)
        places: dict[str, Any] = {"store": store, "decisions": decisions, "ready": ready}
        teacher = walk(workload, taught, seed=seed, progress=progress, services=services, **places).setup.model
        known["teacher"] = teacher.eval().requires_grad_(False)
    start = _start(workload, seed, known)
    runtime = final_runtime(start, methods)
    decide = Decisions(decisions, lambda: [workload_key(workload), seed], runtime)
    left: list[tuple[str, str]] = []
    context = replace(start.context, runtime=runtime, decide=decide, leave=lambda why: left.append((str(walker.at), why)))
    start = replace(start, context=context)
    walker = _Walker(workload, recipe, seed, store, progress, start, decide, ready, before_train, rehearsal)
    for index, method in enumerate(methods[:until]):
        decide.prefix, decide.at = shaping(recipe, methods, index), index
        walker.at = recipe.steps[index]
        with _placed(recipe, index):
            if method is None:
                walker.train(index)
            else:
                walker.apply(method, index)
    return Walked(
        walker.setup, walker.samples, walker.seconds, walker.cpu_seconds, walker.last, tuple(decide.plain()), walker.notes,
        walker.staleness, tuple(left), walker.rounds,
    )  # fmt: skip


@contextmanager
def _placed(recipe: Recipe, index: int) -> Iterator[None]:
    """A refusal of this step tells its name and its number, for those who may leave it out."""
    try:
        yield
    except NotApplicable as refusal:
        notes = getattr(refusal, "__notes__", None)
        if not notes:  # else it is a method that acts in the course of training
            refusal.add_note(recipe.steps[index].method)
        named = [k for k, s in enumerate(recipe.steps[: index + 1]) if s.method == refusal.__notes__[-1]]
        refusal.place = named[-1] if named else index
        raise


@dataclass
class _Walker:
    """The setup so far, and what it cost; `at` is the step in hand, `changed` a structure step since the last train step."""

    workload: Workload
    recipe: Recipe
    seed: int
    store: Path | None
    progress: Callable[[float], None] | None
    setup: Setup
    decisions: Decisions
    ready: Path | None = None
    before_train: Callable[[Setup, int], None] | None = None
    rehearsal: bool = False
    samples: int = 0
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    notes: tuple[str, ...] = ()
    staleness: tuple[dict[str, Any], ...] = ()
    last: Path | None = None
    changed: str = ""
    at: Step | None = None
    rounds: tuple[int, str] | None = None

    def apply(self, method: Method, index: int) -> None:
        pending, before = len(self.setup.training.finish), self.setup.runtime
        self.setup = _apply(method, self.setup)
        if (before.quant, before.weights) != (self.setup.runtime.quant, self.setup.runtime.weights):
            self.rounds = index, method.name
        if method.family is Family.STRUCTURE:
            self.changed = method.name
        if len(self.setup.training.finish) > pending and not any(s.is_train for s in self.recipe.steps[index + 1 :]):
            raise NotApplicable(f"{method.name} acts in the course of training, and no train step follows", "add one behind it")

    def train(self, index: int) -> None:
        fields = self.recipe.steps[index].fields
        going_on = bool(fields.get("continue", False))
        if "TRAIN_DATA" not in self.setup.traits:
            raise NotApplicable("train requires TRAIN_DATA", "give the workload training data")
        if going_on and self.changed:
            raise NotApplicable(f"{self.changed} stands between a train step and its continuation", "put it before both")
        if going_on and not any(s.is_train for s in self.recipe.steps[:index]):
            raise NotApplicable("train has nothing to continue", "put a train step without continue before it")
        name = prefix_key(self.workload, self.recipe, index, self.seed, self.decisions.mark)
        if self.before_train is not None:
            self.before_train(self.setup, index)
        if self.store is not None:
            self._fit(index, self.store / name, fields.get("epochs", 10), going_on)
        else:
            known = self.ready is not None and load_finished(self.ready / name, self.setup.model)
            self.setup = replace(self.setup, traits=self.setup.traits - {PROBE} if known else self.setup.traits | {PROBE})
            if self.rehearsal and not known:
                self.decisions.folder = None
        self.setup, self.changed = _after_train(self.setup, self.workload, keep=_continues(self.recipe, index)), ""

    def _fit(self, index: int, folder: Path, epochs: float, going_on: bool) -> None:
        data, start, setup = self.workload.train, self.last if going_on else None, self.setup
        if setup.training.asynchronous is not None and self.workload.reference is not None:
            assert self.store is not None
            had = tuple(name for name in SERVICES if getattr(setup.context, name) is not None)
            places = {"store": self.store, "decisions": self.decisions.folder}
            key = workload_key(self.workload)
            again = partial(rebuilt, self.workload.reference, self.recipe, index, self.seed, had, places, key)
            setup = replace(setup, context=replace(setup.context, again=again))
        outcome = fit(setup, data, epochs=epochs, seed=self.seed, start=start, checkpoint=folder, progress=self.progress)
        self.samples, self.seconds, self.last = self.samples + outcome.samples, self.seconds + outcome.seconds, folder
        self.cpu_seconds += outcome.cpu_seconds
        self.notes += (outcome.note,) if outcome.note else ()
        self.staleness += (dict(outcome.staleness),) if outcome.staleness else ()


SERVICES = ("evaluate", "enough", "time", "pace", "granules")


def rebuilt(
    reference: str, recipe: Recipe, index: int, seed: int, had: tuple[str, ...], places: Mapping[str, Path | None], key: str
) -> tuple[Setup, Data]:
    """In a worker of train step `index`: its setup, by the steps before it once more, and its data.

    Train steps before it are loaded, and what was decided by measurement is read. Of the services that methods `had`, none is
    asked for anything again.

    Raises:
        BadInput: the workload is another one than that of `key`.
    """
    workload = load(reference)
    if workload_key(workload) != key:
        raise BadInput("a worker of the train step made another workload from the same file", suspect(reference))

    def settled(*args: Any, **kwargs: Any) -> Any:
        raise BadInput("a worker would have to measure what the study has decided", "leave out hogwild")

    services = dict.fromkeys(had, settled)
    walked = walk(workload, recipe, seed=seed, services=services, until=index, **places)
    assert workload.train is not None
    return walked.setup, workload.train


def _start(workload: Workload, seed: int, services: Mapping[str, Any]) -> Setup:
    setup = Setup.of(workload, seed, **services)
    loss, batches = workload.loss, setup.context.calibration
    context = replace(
        setup.context,
        gradients=lambda model: mean_gradients(model, loss, batches),
        curvature=lambda model: fisher_diagonal(model, loss, batches),
    )
    return replace(setup, context=context)


def shaping(recipe: Recipe, methods: Sequence[Method | None], index: int) -> Recipe:
    """The steps up to `index` that shape the network or its runtime, and marks of training between them, as in a cost probe.

    What is decided by measurement is decided for these, so that the network that was costed is the one that is trained, at
    every length and under every optimizer.
    """

    def shapes(method: Method | None) -> bool:
        return (
            method is not None
            and method.family in (Family.STRUCTURE, Family.HARDWARE)
            and method.shapes
            and not method.lays_out()
        )

    kept = [s for k, s in enumerate(recipe.steps[: index + 1]) if k == index or s.is_train or shapes(methods[k])]
    marked = [Step("train") if s.is_train else s for s in kept]
    return Recipe(tuple(s for k, s in enumerate(marked) if not (s.is_train and k and marked[k - 1].is_train)))


def final_runtime(setup: Setup, methods: Iterable[Method | None]) -> RuntimeSpec:
    """The runtime slot that a recipe ends in, going by its hardware steps alone, which only write what they ask for.

    Args:
        setup: as the walk starts; it is left as it is.
        methods: all of the recipe; train steps are None. Traits that a step needs are granted, one that refuses is left out.
    """
    silent = replace(
        setup.context, time=None, pace=None, evaluate=None, enough=None, granules=None
    )  # nothing is measured to know what is asked
    setup = replace(setup, context=silent, traits=setup.traits | {PROBE})
    for method in methods:
        if method is None or method.family is not Family.HARDWARE:
            continue
        model = copy_model(setup.model) if "model" in method.writes else setup.model
        try:
            after = method(replace(setup, model=model, traits=setup.traits | method.needs()))
        except NotApplicable:
            continue
        setup = replace(setup, runtime=after.runtime, traits=after.traits)
    return setup.runtime


def _apply(method: Method, setup: Setup) -> Setup:
    ties = _ties(setup.model) if method.family is Family.STRUCTURE else set()
    after = hold(method, setup)
    if "TIED" in after.traits and len(_ties(after.model)) < len(ties):
        raise NotApplicable(f"{method.name} breaks the tie of {' and '.join(sorted(ties)[0])}", "leave these layers out")
    return after


def _ties(model: nn.Module) -> set[tuple[str, ...]]:
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return {tuple(sorted(group)) for group in names.values() if len(group) > 1}


def _continues(recipe: Recipe, index: int) -> bool:
    following = next((s for s in recipe.steps[index + 1 :] if s.is_train), None)
    return following is not None and bool(following.fields.get("continue", False))


def _after_train(setup: Setup, workload: Workload, *, keep: bool) -> Setup:
    if not keep:
        return setup.reset_training(workload)
    training = replace(setup.training, schedules=_held(setup.training.schedules))
    optimizer = replace(setup.optimizer, schedules=_held(setup.optimizer.schedules))
    return replace(setup, training=training, optimizer=optimizer, traits=setup.traits | {"TRAINED"})


def _held(schedules: tuple[Schedule, ...]) -> tuple[Schedule, ...]:
    """Schedules of a finished step stay where they ended, while new ones start at 0."""
    end = Factors()
    for schedule in schedules:
        end = end * schedule(1.0)
    return (lambda progress: end,) if schedules else ()


def prefix_key(workload: Workload, recipe: Recipe, index: int, seed: int, decided: str = "") -> str:
    """Name of the checkpoint of train step `index`: a hash of all that decides its weights.

    Args:
        decided: the mark of the decisions made before it, since they may have given the network another shape.

    Steps that only lay training out over processes are left out, so that a run goes on with more or fewer of them.
    """
    steps = Recipe(tuple(s for s in recipe.steps[: index + 1] if s.is_train or not build(s).lays_out())).plain()
    text = json.dumps([workload_key(workload), seed, steps, *([decided] if decided else [])], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def workload_key(workload: Workload) -> str:
    """A content hash: name, every example of every split as it is stored, and the untrained model's weights."""
    return identity(workload).key
