"""Fully sharded data parallelism: every process has a part of the weights and works off a part of each batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from quadriga.core.method import Numerics
from quadriga.core.setup import Setup
from quadriga.methods.hardware._ranks import OverRanks, no_data_yet, planned


@dataclass(frozen=True, kw_only=True)
class FullySharded(OverRanks):
    """Train in several processes, each with a part of weights, gradients and optimizer state, and with a part of each batch
    (PyTorch's FSDP2). A block's weights are gathered while it computes.

    For networks that one device does not hold: memory for weights, gradients and state falls with the number of processes,
    and traffic is half as much again as with `data_parallel`. What acts on whole matrices (muon, low ranks, clusters) is
    refused; clipping, averages and optimizers that treat each entry by itself work. In one process it is plain training, unless
    products are in half precision. Processes are started by `quadriga train … --nproc N`, torchrun or srun.

    Args:
        precision: of products and of gathered weights; weights and state stay float32.
        reduce: type in which gradients travel and are summed.
        reshard: give a block's gathered weights back after its forward pass, and gather them again for its backward pass.

    Source: Zhao et al. 2023, PyTorch FSDP, arXiv:2304.11277; Rajbhandari et al. 2020, ZeRO, arXiv:1910.02054.
    """

    numerics = Numerics.CHANGED
    source = "arXiv:2304.11277, arXiv:1910.02054"

    precision: Literal["fp32", "bf16"] = "fp32"
    reduce: Literal["fp32", "bf16"] = "fp32"
    reshard: bool = True

    def lays_out(self) -> bool:
        return self.precision == self.reduce == "fp32"

    def apply(self, setup: Setup) -> Setup:
        """Ask for it. NotApplicable where the weights are dealt out already, or the step is compiled."""
        no_data_yet(setup)
        options = {"precision": self.precision, "reduce": self.reduce, "reshard": self.reshard}
        return planned(setup, data="shard", options=options)
