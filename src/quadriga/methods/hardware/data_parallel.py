"""Data parallelism: every process has all weights and works off a part of each batch."""

from __future__ import annotations

from dataclasses import dataclass

from quadriga.core.setup import Setup
from quadriga.methods.hardware._ranks import OverRanks, no_data_yet, planned


@dataclass(frozen=True, kw_only=True)
class DataParallel(OverRanks):
    """Train in several processes, each with all weights and with a part of each batch; gradients are averaged while they are
    computed (PyTorch's DistributedDataParallel).

    The batch stays what it is in one process, and so do loss, gradients and data order: N processes do the same training in
    less time. What looks at a part alone sees the part: batch normalization takes its statistics over it, unless they are
    synchronized, and dropout draws for it. Processes are started by `quadriga train … --nproc N`, torchrun or srun; in one
    process this is plain training. Beside tensor or pipeline parallelism the weights of the copies are kept equal by FSDP2.

    Args:
        unused: some weights may get no gradient in a step, as in a network that takes one of several ways.
        sync_batchnorm: batch normalization takes its statistics over the whole batch; on GPUs only.

    Source: Li et al. 2020, PyTorch Distributed, arXiv:2006.15704.
    """

    source = "arXiv:2006.15704"

    unused: bool = False
    sync_batchnorm: bool = False

    def lays_out(self) -> bool:
        return not self.sync_batchnorm

    def apply(self, setup: Setup) -> Setup:
        """Ask for it. NotApplicable where the weights are dealt out already, or the step is compiled."""
        no_data_yet(setup)
        return planned(setup, data="replicate", options={"unused": self.unused, "sync_batchnorm": self.sync_batchnorm})
