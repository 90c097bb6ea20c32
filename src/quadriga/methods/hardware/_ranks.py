"""What the methods share that spread training over processes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from quadriga.core import world
from quadriga.core.errors import NotApplicable
from quadriga.core.method import Family, Method, Numerics
from quadriga.core.setup import Setup
from quadriga.core.slots import ParallelSpec

ONE = "a search trains each of its trials in one process; a recipe may name it, for quadriga train --nproc"


SHARED = {"tensor": "matrices", "pipeline": "layers"}


class OverRanks(Method):
    """How several processes train one model together."""

    family = Family.HARDWARE
    numerics = Numerics.CLOSE
    trains = True
    ranks = True
    requires = frozenset({"TRAIN_DATA"})

    @classmethod
    def unsearched(cls) -> str:
        return ONE

    def lays_out(self) -> bool:
        return True


def plan(setup: Setup) -> ParallelSpec:
    """What the steps before said of the ranks."""
    return setup.runtime.parallel or ParallelSpec()


def planned(setup: Setup, *, options: dict[str, Any] | None = None, **fields: Any) -> Setup:
    """The setup with more in its plan. Refuse where training is compiled, which no plan goes with."""
    if setup.runtime.compile:
        raise NotApplicable("the training step is compiled, which no plan for several processes goes with", "leave compile out")
    return replace(setup, runtime=replace(setup.runtime, parallel=plan(setup).but(options=options, **fields)))


def not_shared_yet(setup: Setup, kind: str, degree: int, name: str) -> None:
    """Refuse a second way to share the weights, "tensor" or "pipeline", or too few processes for it."""
    if getattr(plan(setup), kind) > 1:
        raise NotApplicable(f"the {SHARED[kind]} are shared already", f"keep one {name} step")
    if plan(setup).tensor > 1 or plan(setup).pipeline > 1:
        raise NotApplicable("a pipeline's stages are traced, and their matrices are not shared", "use fully_sharded")
    world.need(degree, name)


def no_data_yet(setup: Setup) -> None:
    """Refuse a second way to deal out examples."""
    if has := plan(setup).data:
        raise NotApplicable(f"the ranks {has} weights already", "keep one of data_parallel and fully_sharded")
