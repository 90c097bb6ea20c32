"""A model's own tensors while others are trained in their place: their memory is given back, and they are filled at the end."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn


class Away:
    """Frees the memory of a model's parameters and buffers; shapes, types and objects stay.

    Memory that cannot be given back, as that of a mapped file, is left.

    Args:
        model: whose tensors nobody reads until `back`.
    """

    def __init__(self, model: nn.Module) -> None:
        self.sizes: dict[int, tuple[torch.UntypedStorage, int]] = {}
        for tensor in (*model.parameters(), *model.buffers()):
            storage = tensor.untyped_storage()
            if storage.resizable() and storage.data_ptr() not in self.sizes and storage.nbytes():
                self.sizes[storage.data_ptr()] = storage, storage.nbytes()
        for storage, _ in self.sizes.values():
            storage.resize_(0)

    def back(self, tensors: Iterable[Tensor]) -> None:
        """Take the memory again. It holds no numbers yet, so those that can be are NaN."""
        for storage, size in self.sizes.values():
            storage.resize_(size)
        self.sizes = {}
        with torch.no_grad():
            for tensor in tensors:
                if tensor.is_floating_point():
                    tensor.fill_(torch.nan)
