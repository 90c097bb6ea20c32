"""What training costs: a finalist's steps against the baseline's on the quiet machine, in turn, in fresh processes."""

from __future__ import annotations

from typing import Any

from quadriga.core.recipe import Recipe
from quadriga.measure.stats import ratio
from quadriga.stages.state import TIMING_LEVEL, Study

RESTARTS, BLOCKS = 5, 2
KEPT = 10.0  # seconds of budget for the report
SHARE = 0.6  # of the time that is left; processes start in the rest


def time_training(study: Study, recipe: Recipe, samples: float) -> dict[str, Any] | None:
    """How many times less processor time (on a GPU: time) its training takes than the baseline's.

    Args:
        study: its processes are replaced by fresh ones for each restart.
        recipe: exact.
        samples: examples that its training saw.

    Returns:
        the ratio with its interval as plain data: baseline ÷ recipe, of all steps together; None where the budget did not
        allow to measure it, or there is nothing to compare.
    """
    base = study.baseline.values["samples"]
    if not samples or not base:
        return None
    each = SHARE * max(1.0, study.budget.left - KEPT) / RESTARTS  # two restarts that are well measured show nothing, five do
    blocks = [found for _ in range(RESTARTS) if (found := _restart(study, recipe, each)) is not None]
    if not blocks:
        return None
    baseline, mine = ([one[arm] for one in blocks] for arm in ("baseline", "recipe"))
    return ratio(baseline, mine, level=TIMING_LEVEL, factor=base / samples).plain()


def _restart(study: Study, recipe: Recipe, seconds: float) -> dict[str, list[float]] | None:
    if study.budget.left < KEPT:
        return None
    study.engine.renew()
    study.submit("step_cost", "step_cost", recipe, args={"blocks": BLOCKS, "seconds": seconds})
    trials = [t for t in study.collect_all(KEPT / 2) if t.ok]
    study.forget()
    return trials[-1].info["blocks"] if trials else None
