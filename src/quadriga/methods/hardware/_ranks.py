"""What the methods share that spread training over processes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from quadriga.core.errors import NotApplicable
from quadriga.core.setup import Setup
from quadriga.core.slots import ParallelSpec

ONE = "a search trains each of its trials in one process; a recipe may name it, for quadriga train --nproc"


def plan(setup: Setup) -> ParallelSpec:
    """What the steps before said of the ranks."""
    return setup.runtime.parallel or ParallelSpec()


def planned(setup: Setup, *, options: dict[str, Any] | None = None, **fields: Any) -> Setup:
    """The setup with more in its plan. Refuse where training is compiled, which no plan goes with."""
    if setup.runtime.compile:
        raise NotApplicable("the training step is compiled, which no plan for several processes goes with", "leave compile out")
    return replace(setup, runtime=replace(setup.runtime, parallel=plan(setup).but(options=options, **fields)))


def no_data_yet(setup: Setup) -> None:
    """Refuse a second way to deal out examples."""
    if has := plan(setup).data:
        raise NotApplicable(f"the ranks {has} weights already", "keep one of data_parallel and fully_sharded")
