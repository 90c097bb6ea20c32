"""Tensors in shared memory, side by side in one piece, so that they cost one file descriptor however many they are."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

ALIGN = 64  # bytes; a cache line, so that neighbours are not slowed down by one another's writes


class Block:
    """Copies of tensors in shared memory. It can be given to processes that `torch.multiprocessing` starts.

    Args:
        tensors: by name; of any types and memory formats, on the CPU.

    Raises:
        MemoryError: there is not enough shared memory.

    Example:
        >>> block = Block({"a": torch.ones(2, 3), "n": torch.tensor(7)})
        >>> block.view("a").shape, int(block.view("n"))
        (torch.Size([2, 3]), 7)
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.layout: dict[str, tuple[int, torch.dtype, tuple[int, ...], tuple[int, ...]]] = {}
        end = 0
        for name, t in tensors.items():
            self.layout[name] = (end, t.dtype, tuple(t.shape), torch.empty_like(t, device="meta").stride())
            end += -(-t.numel() * t.element_size() // ALIGN) * ALIGN
        try:
            self.memory = torch.zeros(max(end, 1), dtype=torch.uint8).share_memory_()
        except RuntimeError as error:
            remedy = "enlarge /dev/shm; of a container, by --shm-size"
            raise MemoryError(f"no {end / 2**20:.0f} MiB of shared memory for weights: {error}; {remedy}") from error
        with torch.no_grad():
            for name, t in tensors.items():
                self.view(name).copy_(t)

    def view(self, name: str) -> Tensor:
        """The shared tensor itself: what is written into it, every process sees."""
        start, dtype, shape, stride = self.layout[name]
        count = 1
        for size in shape:
            count *= size
        return self.memory[start : start + count * dtype.itemsize].view(dtype).as_strided(shape, stride)

    def holds(self, t: Tensor) -> bool:
        """Whether a tensor's values lie here."""
        return t.untyped_storage().data_ptr() == self.memory.untyped_storage().data_ptr() or not t.numel()
