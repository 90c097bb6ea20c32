"""Latency of arms in turn, on the one machine where this study measures it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from quadriga.core.folders import TIMING
from quadriga.core.recipe import Recipe
from quadriga.measure.latency import paired
from quadriga.measure.machine import Busy, busy, others
from quadriga.measure.timings import CALM, Timings
from quadriga.stages.state import Study

EXTRA = 120.0  # seconds that the target may take above what the timing is allowed


def quiet(study: Study) -> None:
    """End the workers, so that nothing of this study disturbs what is timed here; on another target begin with fresh ones."""
    if study.engine.resources().here:
        study.engine.stop()
    else:
        study.engine.renew()


def anything(timings: Timings) -> bool:
    """Every timing is enough."""
    return True


def timed(
    study: Study, arms: Mapping[str, Mapping[str, Any]], enough: Callable[[Timings], bool] = anything, **how: Any
) -> Timings:
    """`measure.latency.paired`, here or as an order on the target machine.

    Args:
        study: has no order under way.
        arms: as of `paired`.
        enough: as of `paired`; another machine goes by the budget alone.
        how: further arguments of `paired`, as plain data.

    Returns:
        the timings; with an error for each arm where the target gave none.
    """
    if study.engine.resources().here:
        inputs = {batch: study.workload.inputs(batch) for batch in study.batches}
        return paired(arms, inputs, folder=study.folder / TIMING, told=study.add_word, enough=enough, **how)
    limit = how.get("budget") or max(5.0, study.budget.left)
    study.submit("timing", "timings", Recipe(), limit=limit + EXTRA, args={"arms": dict(arms), "how": how})
    done = [t for t in study.collect_all(0.0) if t.stage == "timing"]
    if done and done[-1].ok:
        return Timings.from_plain(done[-1].info["timings"])
    why = done[-1].reason if done else "no time was left"
    found = Timings.empty(list(study.batches), list(arms), how.get("restarts", 0))
    found.errors.update(dict.fromkeys(arms, f"the target machine gave no timings: {why}"))
    return found


def wait_for_calm(
    study: Study, seconds: float, look: Callable[[], Busy] = busy, sleep: Callable[[float], None] = time.sleep
) -> float:
    """Wait until others leave this machine's cores alone.

    Args:
        study: whose target is waited for; another machine is not.
        seconds: at most.
        look, sleep: the machine's counters, and how a second passes.

    Returns:
        the share of the cores that others took in the last second.
    """
    share = 0.0
    if study.engine.resources().here:
        for _ in range(max(1, int(seconds))):
            before, own = look(), time.process_time()
            sleep(1.0)
            share = others(before, look(), time.process_time() - own)
            if share <= CALM:
                break
            study.say("verification", f"waiting for a quieter machine: other processes take {share:.0%} of its cores")
    return share
