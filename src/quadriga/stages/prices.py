"""What the end of a study takes: seconds that the search has to leave."""

from __future__ import annotations

import os
from collections.abc import Mapping

from quadriga.core.recipe import Recipe
from quadriga.measure.latency import LEAST_RESTARTS
from quadriga.measure.quality import Scores
from quadriga.search.space import trained_epochs
from quadriga.stages.baseline import fastest, lossless_trials
from quadriga.stages.state import Study

RESTARTS = 8  # of the verification
PRICED = 6  # of these: with fewer its intervals are wider, and the search has the time
BLOCKS, BLOCK_SECONDS = 8, {False: 0.04, True: 0.02}  # of each restart; the second in a short study
ABLATION = 0.1  # of the budget, at the most: the steps that matter come first, and what is not reached is said
ABLATED = {"restarts": 6, "blocks": 6, "block_seconds": 0.02}  # the ablation's timing
REPORT = 3.0  # seconds


def verification_seconds(study: Study) -> float:
    """What a verification takes at least, going by what a process takes to start: building, scoring, timing, handing over.

    Arms load at the same time, as many as there are cores at once.
    """
    arms, restarts = (3, LEAST_RESTARTS) if study.short else (_arms(study), PRICED)
    blocks = arms * len(study.batches) * BLOCKS * BLOCK_SECONDS[study.short] * 1.5
    restart = arms * study.startup / min(arms, os.cpu_count() or 1) + blocks
    return restarts * restart + hand_over_seconds(study, {}) + 3 * study.startup


def _arms(study: Study) -> int:
    """Processes that a restart starts: two finalists, eager PyTorch and its best settings, and the best exports."""
    tuned = sum(bool(t.recipe.steps) for t in fastest(study, [t for t in study.stage("tuned_eager") if t.ok]))
    return 3 + tuned + len(fastest(study, lossless_trials(study)))


def hand_over_seconds(study: Study, scores: Mapping[str, Scores]) -> float:
    """Seconds that the artifact takes to be written, loaded and scored in a fresh process, and the report to be written."""
    longest = max((s.seconds for name, s in scores.items() if name.startswith("final")), default=0.0)
    return 2 * study.startup + 1.5 * longest + REPORT


def ablation_seconds(study: Study, recipe: Recipe | None, training: float) -> float:
    """What it takes to train and time a recipe without each of its steps, as far as the budget's share for it goes.

    Args:
        recipe: as a template; None where nothing is found yet, which is priced as a runtime and a precision.
        training: seconds that its own train steps take.
    """
    own = recipe.steps[study.space.fixed(recipe) :] if recipe is not None else ()
    last = max((i for i, s in enumerate(own) if s.is_train), default=-1)
    anew = sum(not s.is_train for s in own[: last + 1])
    arms = min(6, max(3, len(own) - anew))
    blocks = len(study.batches) * ABLATED["blocks"] * ABLATED["block_seconds"] * 1.5
    timing = ABLATED["restarts"] * arms * (study.startup / min(arms, os.cpu_count() or 1) + blocks)
    return min(ABLATION * study.options.budget, anew * training / study.workers + timing)


def epoch_seconds(study: Study) -> float:
    """Seconds that a worker takes to train the unchanged model for an epoch; 0 where nobody has timed it."""
    base, train = study.baseline.values, study.workload.train
    if train is not None and base.get("samples"):
        return base["seconds"] / base["samples"] * len(train)
    for trial in study.stage("pace"):
        if trial.ok and (epochs := trained_epochs(trial.recipe)):
            return trial.values["seconds"] / epochs
    return 0.0
