"""Activation checkpointing: compute again instead of keeping."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from quadriga.core.errors import NotApplicable
from quadriga.core.method import Family, Method, Numerics
from quadriga.core.setup import Setup
from quadriga.core.stacks import blocks_of
from quadriga.methods.hardware._ranks import ONE, plan, planned


@dataclass(frozen=True, kw_only=True)
class ActivationCheckpointing(Method):
    """Keep only the inputs of each block for the backward pass and compute what is inside again there.

    Memory for activations falls to about one block's, and a step takes up to a third longer. The same numbers come out. Of a
    pipeline, whole stages are computed again. In one process or in several.

    Args:
        recompute: "blocks", everything inside a block; "cheap", all but matrix products, convolutions and attention, which
            are kept: most of the memory and little of the time.

    Source: Chen et al. 2016, Training deep nets with sublinear memory cost, arXiv:1604.06174; Korthikanti et al. 2022,
    arXiv:2205.05198 (selective).
    """

    family = Family.HARDWARE
    numerics = Numerics.CLOSE
    trains = True
    source = "arXiv:1604.06174, arXiv:2205.05198"
    requires = frozenset({"TRAIN_DATA"})

    recompute: Literal["blocks", "cheap"] = "blocks"

    @classmethod
    def unsearched(cls) -> str:
        return f"it saves memory, which no search asks for; {ONE}"

    def lays_out(self) -> bool:
        return True

    def apply(self, setup: Setup) -> Setup:
        """Ask for it. NotApplicable where there is no stack of blocks, or it is asked for already."""
        if not blocks_of(setup.model):
            raise NotApplicable("the model has no stack of blocks whose activations could be computed again")
        if plan(setup).recompute:
            raise NotApplicable("activations are computed again already", "keep one activation_checkpointing step")
        return planned(setup, recompute=self.recompute)
