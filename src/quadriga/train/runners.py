"""Who executes a train step: this process, or all that were started to train together."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path

from quadriga.core import world
from quadriga.core.setup import Setup
from quadriga.core.slots import ParallelSpec
from quadriga.parallel import group
from quadriga.train.checkpoint import is_finished
from quadriga.train.step import Runner, prepared


def runner_for(setup: Setup, folder: Path | None) -> AbstractContextManager[Runner]:
    """How this setup is trained here: by one process, or as its plan says by all that were started.

    A train step that is finished in the folder is only loaded, by each process alone.

    Raises:
        NotApplicable: the plan does not fit the processes, or the model, or what is to act on it.
    """
    plan = setup.runtime.parallel
    if plan is None or group.is_apart() or is_finished(folder) or not needs_ranks(plan):
        return prepared(setup)
    from quadriga.train.ranks import ranked  # what it imports of torch.distributed takes seconds

    return ranked(setup)


def needs_ranks(plan: ParallelSpec) -> bool:
    """Whether the plan does anything here: there are other processes, or it changes what one computes."""
    return group.joined() or world.found().size > 1 or plan.options.get("precision", "fp32") != "fp32"
