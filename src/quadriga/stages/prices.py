"""What the end of a study takes: seconds that the search has to leave."""

from __future__ import annotations

import os
from collections.abc import Mapping

from quadriga.measure.latency import LEAST_RESTARTS
from quadriga.measure.quality import Scores
from quadriga.stages.state import Study

RESTARTS = 8  # of the verification
BLOCKS, BLOCK_SECONDS = 8, {False: 0.04, True: 0.02}  # of each restart; the second in a short study
REPORT = 3.0  # seconds


def verification_seconds(study: Study) -> float:
    """What a verification takes at least, going by what a process takes to start: building, scoring, timing, handing over.

    Arms load at the same time, as many as there are cores at once.
    """
    arms, restarts = (3, LEAST_RESTARTS) if study.short else (6, RESTARTS)
    blocks = arms * len(study.batches) * BLOCKS * BLOCK_SECONDS[study.short] * 1.5
    restart = arms * study.startup / min(arms, os.cpu_count() or 1) + blocks
    return restarts * restart + hand_over_seconds(study, {}) + 3 * study.startup


def hand_over_seconds(study: Study, scores: Mapping[str, Scores]) -> float:
    """Seconds that the artifact takes to be written, loaded and scored in a fresh process, and the report to be written."""
    longest = max((s.seconds for name, s in scores.items() if name.startswith("final")), default=0.0)
    return 2 * study.startup + 1.5 * longest + REPORT
