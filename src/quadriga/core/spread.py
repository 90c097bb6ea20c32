"""Weights that are spread over processes: what a method asks that combines several of them.

DTensors are told by their `device_mesh`, so that nobody imports torch.distributed who does not use it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

_layers: ContextVar[Any] = ContextVar("layers", default=None)  # the group of processes that hold the other layers


@contextmanager
def layers_over(group: Any) -> Iterator[None]:
    """The layers of the model that is trained inside are spread over a process group, or None."""
    token = _layers.set(group)
    try:
        yield
    finally:
        _layers.reset(token)


def alike(tensors: Iterable[Tensor]) -> list[list[int]]:
    """The places of the tensors that one `torch._foreach` operation may take together: plain ones, and DTensors of one mesh.

    Example:
        >>> alike([torch.ones(2), torch.ones(3)])
        [[0, 1]]
    """
    found: dict[Any, list[int]] = {}
    for place, tensor in enumerate(tensors):
        found.setdefault(getattr(tensor, "device_mesh", None), []).append(place)
    return list(found.values())


@torch.no_grad()
def total_norm(tensors: Sequence[Tensor]) -> Tensor:
    """The norm of all entries of all tensors, of every process's parts and layers: the same number everywhere.

    Example:
        >>> total_norm([torch.tensor([3.0]), torch.tensor([[4.0]])])
        tensor(5.)
    """
    norms = [_whole(torch.nn.utils.get_total_norm([tensors[i] for i in some])) for some in alike(tensors)]
    device = tensors[0].device if len(tensors) else torch.device("cpu")
    total = torch.stack(norms).square().sum() if norms else torch.zeros((), device=device)
    if (group := _layers.get()) is not None:
        torch.distributed.all_reduce(total, group=group)
    return total.sqrt()


@torch.no_grad()
def clip_norm(tensors: Sequence[Tensor], limit: float) -> None:
    """Scale all tensors, in place, so that their `total_norm` is at most `limit`, as `torch.nn.utils.clip_grad_norm_`.

    That function refuses tensors of several meshes, and plain ones beside DTensors.
    """
    norm = total_norm(tensors)
    factor = (limit / (norm + 1e-6)).clamp(max=1.0)
    torch._foreach_mul_([local(t) for t in tensors], factor)


def local(tensor: Any) -> Tensor:
    """What of a tensor lies in this process; a plain tensor itself."""
    return tensor.to_local() if hasattr(tensor, "device_mesh") else tensor


def _whole(tensor: Any) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "device_mesh") else tensor
