"""Open a study: check the workload, lock the folder, start the workers; and close all of it, whatever happens."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from quadriga import methods
from quadriga.core import supervise
from quadriga.core.errors import BadInput
from quadriga.core.method import REMEDIES
from quadriga.core.recipe import Recipe
from quadriga.core.scratch import scratch
from quadriga.core.setup import Setup
from quadriga.core.workload import Workload
from quadriga.engine.base import Engine
from quadriga.engine.local import Inline
from quadriga.engine.opening import Where, open_engine
from quadriga.engine.store import Store
from quadriga.engine.teacher import TEACHER, can_teach
from quadriga.engine.walk import workload_key
from quadriga.measure.machine import fingerprint
from quadriga.search.space import Space
from quadriga.stages.again import FIRST
from quadriga.stages.state import Options, Progress, Study
from quadriga.verify.fake import fakes
from quadriga.workloads.check import CHECKING, check
from quadriga.workloads.identity import identity as identity_of

SIMULATED = ("mask", "zeros", "fake_quant")


@contextmanager
def open_study(
    workload: Workload, options: Options, out: Path, progress: Progress, where: Where | None = None
) -> Iterator[Study]:
    """Check the workload, open the store and the engine; close both at the end, whatever happens.

    Raises:
        BadInput: the folder holds another study, or timings of another machine; or the workload or the engine cannot be
            used, or the floor's unit is not the metric's.
    """
    out = out.resolve()  # other machines have another working directory
    with scratch(), Store(out) as store:
        progress(CHECKING)
        with supervise.within("looking the workload over"):
            notes = check(workload)
        _check_unit(workload, options)
        identity = json.loads(json.dumps({**options.identity(), "workload": workload_key(workload)}))
        notes += _same_study(store, identity, out)
        model = workload.build(options.seed)
        traits = Setup.of(workload, options.seed, model).traits | ({TEACHER} if can_teach(workload) else set())
        cards = {c["name"]: _for_search(c, options.families) for c in methods.cards()}
        space = Space(
            cards, traits, workload.baseline or Recipe(), frozenset(options.families), options.minimize == "train_cost"
        )
        engine = open_engine(workload, out, options.seed, where, alike="train_cost" in (options.minimize, *options.limits))
        try:
            _check_machine(store, engine, out)
            study = Study(workload, options, out, store, engine, space, progress)
            study.notes += notes + identity_of(workload).notes + _given(model) + _notes(workload, engine) + _left_out(space)
            try:
                yield study
            finally:
                study.budget.keep()
        finally:
            engine.close()


def _same_study(store: Store, identity: Mapping[str, Any], out: Path) -> list[str]:
    """See that the folder holds this very study, or one whose baseline failed and whose workload was mended since; notes.

    Raises:
        BadInput: it holds another.
    """
    known = store.get("identity")
    differs = sorted(k for k in identity if known.get(k) != identity[k]) if isinstance(known, Mapping) else []
    first = [t for t in store.trials() if t.stage in FIRST] if differs else []
    mended = differs == ["workload"] and any(not t.ok for t in first) and not any(t.stage == "baseline" and t.ok for t in first)
    if differs and not mended:
        raise BadInput(f"{out} holds a study with another {', '.join(differs)}", "choose another --out folder")
    if mended:
        store.clear()
    store.put("identity", dict(identity))
    return ["begun anew, with another workload: of the one before no baseline could be trained"] if mended else []


def _check_machine(store: Store, engine: Engine, out: Path) -> None:
    """Timings of unlike machines are never compared, so a study stays with the kind of machine that it began with."""
    now = engine.resources().target
    was = store.get("machine")
    if was is not None and fingerprint(was) != fingerprint(now):
        told = [f"{m['processor']} ({m['instructions']}, {m['accelerator'] or 'no GPU'})" for m in (was, now)]
        remedy = "go on there, or choose another --out folder"
        raise BadInput(f"{out} holds timings of another machine: {told[0]}; this one is {told[1]}", remedy)
    store.put("machine", dict(now))


def _for_search(card: Mapping[str, Any], families: Sequence[str]) -> dict[str, Any]:
    """A card with the fields' defaults, and why the method is not searched on this machine, which only its own family asks."""
    why = methods.available()[card["name"]].unsearched() if card["family"] in families else ""
    return {**card, "fields": {k: f.get("default") for k, f in card["fields"].items()}, "unsearched": why}


def _check_unit(workload: Workload, options: Options) -> None:
    """Half a point of accuracy is little; 0.5 of an F1 between 0 and 1, or of bits per byte, would let anything pass."""
    metric, floor = workload.metric, options.floor
    if metric.unit != "pt" and floor.amount and not floor.relative:
        raise BadInput(
            f"the floor {floor} is in points, and the metric {metric.name} is not",
            f"give a share of it, such as {-abs(floor.amount):g}%rel",
        )


def _notes(workload: Workload, engine: object) -> list[str]:
    notes = []
    if isinstance(engine, Inline):
        notes.append(
            "the model is a live object that no other process can rebuild: trials ran one after the other in the caller's "
            "process, without isolation or time limits, and eager PyTorch was timed through an exported copy"
        )
    if workload.train is None:
        notes.append("there is no training data: only methods that need no training were searched, calibrated on val")
    return notes


def _given(model: nn.Module) -> list[str]:
    """What looks like compression in the model that was brought, and is none."""
    found = [row["text"] for row in fakes(model) if row["kind"] in SIMULATED]
    return [f"the model that was given is not smaller or faster for this: {text}" for text in found]


def _left_out(space: Space) -> list[str]:
    """Methods that this workload cannot have, by the fact that it lacks."""
    reachable = set(space.traits).union({"TRAINED", "TRAIN_DATA"}, *(c["adds"] for c in space.cards.values()))
    lacking: dict[str, list[str]] = {}
    for name, card in sorted(space.cards.items()):
        for fact in sorted(set(card["requires"]) - reachable)[:1] if card["family"] in space.families else ():
            lacking.setdefault(fact, []).append(name)
    notes = [f"not searched, since {fact} is lacking: {', '.join(n)}; {REMEDIES.get(fact, '')}" for fact, n in lacking.items()]
    return notes + [f"not searched: {name}, since {why}" for name, card in space.cards.items() if (why := card["unsearched"])]
