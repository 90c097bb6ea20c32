"""Tensor parallelism: processes share each matrix."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from quadriga.core.setup import Setup
from quadriga.methods.hardware._ranks import OverRanks, not_shared_yet, planned


@dataclass(frozen=True, kw_only=True)
class TensorParallel(OverRanks):
    """Train in several processes, each with a part of the heads of every attention and of the hidden units of every MLP.

    Of a model of `transformers` its own plan is taken. Else it is read off the model: widths that lie between Linear layers
    alone are dealt out, heads as a whole, fused projections and counts of heads in the code included. Two sums over the
    processes a block, forward and backward, so that they belong into one machine. What acts on whole matrices is refused,
    as in `fully_sharded`.

    Args:
        degree: processes that share each matrix, at least 2.
        sequence: between attention and MLP each process keeps a part of the time steps (Megatron's sequence parallelism),
            for blocks that take one tensor [batch, time, width].
        plan: your own: patterns of module names to "colwise", "rowwise", "colwise_gather_output", "rowwise_split_input",
            "embedding_rowwise" or "sequence"; counts of heads in the code are then yours to see to.

    Source: Shoeybi et al. 2019, Megatron-LM, arXiv:1909.08053; Korthikanti et al. 2022, arXiv:2205.05198 (sequence).
    """

    source = "arXiv:1909.08053, arXiv:2205.05198"

    degree: int = 2
    sequence: bool = False
    plan: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        self.insist(("degree", self.degree >= 2, "give at least 2 processes"))

    def apply(self, setup: Setup) -> Setup:
        """Ask for it. NotApplicable with too few processes, in a pipeline, or twice."""
        not_shared_yet(setup, "tensor", self.degree, self.name)
        options = {"sequence": self.sequence, "plan": dict(self.plan or {})}
        return planned(setup, tensor=self.degree, options=options)
