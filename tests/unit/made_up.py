"""A study of finished models on an engine whose answers are made up."""

from __future__ import annotations

from quadriga import methods
from quadriga.core.metric import Floor
from quadriga.core.recipe import Recipe
from quadriga.core.trial import Status, Trial
from quadriga.engine.base import Resources
from quadriga.search.space import Space
from quadriga.stages.opening import _for_search
from quadriga.stages.state import Options, Study
from quadriga.testing import tiny_mlp

FLOOR = Floor.parse("-1pt")


class Engine:
    """Keeps orders until they are waited for; `wait` is for those who inherit."""

    def __init__(self, workers):
        self.workers, self.queue, self.done = workers, [], []

    def resources(self):
        return Resources(self.workers, {})

    def submit(self, order):
        self.queue.append(order)

    def cancel(self, number=None):
        self.queue.clear()


def hardware_study(folder, store, engine, budget=600.0, **options):
    """A study by the hardware family alone, whose baseline and plain eager PyTorch are known."""
    cards = {c["name"]: {**_for_search(c, ()), "unsearched": ""} for c in methods.cards()}
    space = Space(cards, frozenset({"TRAINED", "FLOAT_WEIGHTS"}), Recipe(), frozenset({"hardware"}))
    given = Options(FLOOR, budget=budget, families=("hardware",), **options)
    study = Study(tiny_mlp(), given, folder, store, engine, space, lambda event: None)
    if not study.trials:
        known = {"quality": 90.0, "bytes": 400.0, "seconds": 1.0, "samples": 0.0, "parameters": 10.0}
        study.add(Trial(0, "baseline", Recipe(), 0, Status.COMPLETE, "", known))
        study.add(Trial(1, "tuned_eager", Recipe(), 0, Status.COMPLETE, "", {f"speed/{b}": 1.0 for b in study.batches}))
    return study
