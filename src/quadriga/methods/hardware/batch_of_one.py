"""Another runtime for a single example than for a batch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from quadriga.core.errors import NotApplicable
from quadriga.core.method import Family, Method, Numerics
from quadriga.core.setup import Setup


@dataclass(frozen=True, kw_only=True)
class BatchOfOne(Method):
    """What stands before it executes calls with one example; what follows executes larger batches of the same model.

    What is fastest for one example, where each call's own cost counts, is often not for a batch, where products do: a small
    CNN on one thread in ONNX Runtime, and in bf16 on all threads in OpenVINO. The artifact has the files of both, and its
    `load.py` chooses by the size of the batch; files that are equal are stored once. Quality is scored through both.

    Precision, threads and the runtime are said anew after it. The device, the memory format, the precision of PyTorch's
    products and the storage hold for both.

    Source: Crankshaw et al. 2017, Clipper, NSDI (what batching gains differs from framework to framework).
    """

    family = Family.HARDWARE
    numerics = Numerics.EXACT
    source = "usenix.org/conference/nsdi17/technical-sessions/presentation/crankshaw"
    search: ClassVar = {}
    requires = frozenset({"RUNTIME"})
    removes = frozenset({"RUNTIME"})
    adds = frozenset({"FLOAT_WEIGHTS"})

    @classmethod
    def unsearched(cls) -> str:
        """A search joins two endings by their measured speeds; without those it would try pairs blindly."""
        return "two endings are joined by it once both were timed"

    def apply(self, setup: Setup) -> Setup:
        """Keep the runtime slot for one example. NotApplicable when that was done already."""
        one = setup.runtime
        if one.alone is not None:
            raise NotApplicable(f"a batch of one runs in {one.alone.name} already", "keep one batch_of_one step")
        more = replace(one, name="eager", threads=None, quant=None, weights="fp32", options={}, alone=one)
        return replace(setup, runtime=more)
