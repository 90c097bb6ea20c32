"""Profile: where the unchanged model's time goes, so that the report can say what there is to gain, and where."""

from __future__ import annotations

from typing import Any

from quadriga.core.recipe import Recipe
from quadriga.stages.state import Study

LIMIT = 60.0  # seconds


def order_profile(study: Study) -> None:
    """Have the unchanged model profiled, once a study; whichever station waits next collects the trial.

    Nothing waits for it: it stands in the queue behind the probes of the opponents, and a short study goes on without.
    """
    if not study.stage("profile") and study.store.get("frozen") is None:
        study.submit("profile", "profile", Recipe(), limit=study.patience(LIMIT))


def profile_of(study: Study) -> dict[str, Any] | None:
    """What was found, or None where there was no time for it, or it failed.

    Returns:
        {"threads", "ceilings", "batches": [{"batch", "seconds", "layers"}, …]}; the ceilings are those of
        `measure.ceilings.Ceilings`, the layers' rows those of `measure.roofline.profile`.
    """
    return next((t.info["profile"] for t in study.stage("profile") if t.ok), None)
