"""Every rank has a part of the weights, gathers those of a block while it computes, and a part of each batch: FSDP2."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from quadriga.core.half import HALF
from quadriga.core.slots import ParallelSpec
from quadriga.core.stacks import blocks_of

TYPES = {"fp32": torch.float32, **HALF}


class Sharded:
    """The shards of one rank; each block of a stack is gathered alone, and what is outside of them together.

    Args:
        modules: the model, or a rank's stages of it; their parameters become DTensors.
        mesh: weights are the same along its dimension "replica", and cut along "shard".
        spec: options "precision" and "reduce" are types of products and of gradients on their way; "reshard" says whether
            gathered weights are given back before the backward pass, which a pipeline's stages never do.
    """

    def __init__(self, modules: Sequence[nn.Module], mesh: DeviceMesh, spec: ParallelSpec) -> None:
        kind, reduce = (TYPES[spec.options.get(name, "fp32")] for name in ("precision", "reduce"))
        inside = MixedPrecisionPolicy(param_dtype=kind, reduce_dtype=reduce)
        outside = MixedPrecisionPolicy(param_dtype=kind, reduce_dtype=reduce, output_dtype=torch.float32)
        plain = spec.options.get("precision", "fp32") == spec.options.get("reduce", "fp32") == "fp32"
        over = mesh["replica", "shard"] if mesh["replica"].size() > 1 else mesh["shard"]
        options: dict[str, Any] = {
            "mesh": over,
            "reshard_after_forward": bool(spec.options.get("reshard", True)) and spec.pipeline == 1,
        }
        blocks = [block.module for model in modules for block in blocks_of(model)]
        for block in reversed(blocks):  # inner ones first
            if any(p.requires_grad for p in block.parameters()) and not isinstance(block, FSDPModule):
                fully_shard(block, **options, **({} if plain else {"mp_policy": inside}))
        for model in modules:
            fully_shard(model, **options, **({} if plain else {"mp_policy": outside}))
        self.modules: list[Any] = list(modules)

    @contextmanager
    def synced(self, wanted: bool) -> Iterator[None]:
        """Backward passes inside exchange gradients, or add up what each rank has alone."""
        self._sync(wanted)
        try:
            yield
        finally:
            self._sync(True)

    def _sync(self, wanted: bool) -> None:
        for module in self.modules:
            module.set_requires_gradient_sync(wanted)
            module.set_is_last_backward(wanted)
