"""Pipeline parallelism: processes share the layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from quadriga.core.setup import Setup
from quadriga.methods.hardware._ranks import OverRanks, not_shared_yet, planned


@dataclass(frozen=True, kw_only=True)
class PipelineParallel(OverRanks):
    """Train in several processes, each with some of the layers; a batch passes through in micro-batches.

    A stack of blocks is cut where the stages cost the same, as measured in a few training steps. Little is sent, so that stages
    may lie on different machines; the price is the bubble, (stages - 1) / (micro-batches + stages - 1) of the time. The model
    is traced, has to return one tensor, and may have neither batch normalization nor weights that two stages share. Batches
    have one size.

    Args:
        degree: processes that share the layers, at least 2.
        schedule: "1f1b", one forward then one backward pass, which keeps few activations; "gpipe", all forward passes first;
            "interleaved", several stages a process, for a smaller bubble and more traffic.
        microbatches: of a process's batch; by default about two for each stage.
        chunks: stages a process, of "interleaved".
        cuts: names of the modules that stages begin with, but for the first stage; by default measured.

    Source: Huang et al. 2019, GPipe, arXiv:1811.06965; Narayanan et al. 2021, arXiv:2104.04473 (1F1B, interleaved).
    """

    source = "arXiv:1811.06965, arXiv:2104.04473"

    degree: int = 2
    schedule: Literal["1f1b", "gpipe", "interleaved"] = "1f1b"
    microbatches: int | None = None
    chunks: int = 2
    cuts: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        self.insist(
            ("degree", self.degree >= 2, "give at least 2 processes"),
            ("chunks", self.chunks >= 2, "give at least 2 stages a process"),
            (
                "microbatches",
                self.microbatches is None or self.microbatches >= self.degree,
                "give at least one a process",
            ),
        )

    def apply(self, setup: Setup) -> Setup:
        """Ask for it. NotApplicable with too few processes, beside shared matrices, or twice."""
        not_shared_yet(setup, "pipeline", self.degree, self.name)
        names = ("schedule", "microbatches", "chunks", "cuts")
        return planned(setup, pipeline=self.degree, options={name: getattr(self, name) for name in names})
