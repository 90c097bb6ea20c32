"""Batches on their way to a GPU: through pinned memory, on a stream of their own, while the GPU still computes."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from quadriga.core.batch import Batch, Tree, tensors, tree_map


class Transfer:
    """Copies batches to a GPU beside the computation.

    The loop runs ahead of the GPU: it draws the next batch while the kernels of the step before are still queued. A copy on the
    stream of these kernels would wait for them, and one from pageable memory would hold the loop up. So tensors are pinned,
    copied on another stream, and that stream's end is what the computation waits for.

    Args:
        device: the GPU.

    Source: PyTorch, "CUDA semantics: Use pinned memory buffers" and `Tensor.record_stream`.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.stream = device, torch.cuda.Stream(device)

    def __call__(self, batch: Batch) -> Batch:
        """The batch with every tensor on the GPU; what is there already stays."""
        parts = (batch.inputs, batch.target, batch.index, batch.weight)
        if all(t.device == self.device for t in tensors(parts)):
            return batch
        now = torch.cuda.current_stream(self.device)
        pinned = [tree_map(self._pinned, part) for part in parts]
        with torch.cuda.stream(self.stream):
            inputs, target, index, weight = (self._sent(part) for part in pinned)
        now.wait_stream(self.stream)
        for before, after in zip(tensors(parts), tensors((inputs, target, index, weight)), strict=True):
            if after is not before:
                after.record_stream(now)  # its memory is the other stream's, which may not have it back before this one is done
        return replace(batch, inputs=inputs, target=target, index=index, weight=weight)

    def _pinned(self, t: Tensor) -> Tensor:
        return t.pin_memory() if t.device.type == "cpu" and not t.is_pinned() else t

    def _sent(self, part: Tree) -> Tree:
        return tree_map(lambda t: t.to(self.device, non_blocking=True), part)
