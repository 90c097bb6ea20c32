"""Whole tensors from the parts that the ranks hold."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from quadriga.core.spread import local
from quadriga.parallel.group import gathered
from quadriga.parallel.place import Place

Parts = Mapping[str, tuple[Tensor, Place]]  # name → this rank's part, and where it lies


def whole(parts: Parts, device: torch.device) -> Iterator[tuple[str, Tensor]]:
    """(name, whole tensor on the device) of every tensor that some rank has a part of, in all ranks, bit for bit.

    Each entry comes from the one rank that owns it; the others add zeros to its bits.
    """
    for name, (shape, kind) in catalogue(parts).items():
        dtype = getattr(torch, kind)
        full = torch.zeros(shape, dtype=dtype, device=device)
        if name in parts and parts[name][1].owner:
            parts[name][1].put(local(parts[name][0].detach()).to(device), full)
        dist.all_reduce(_bits(full))
        yield name, full


def catalogue(parts: Parts) -> dict[str, tuple[tuple[int, ...], str]]:
    """Name → shape of the whole and type, of all ranks' tensors, in the order of the ranks."""
    own = {name: (place.shape, str(tensor.dtype).removeprefix("torch.")) for name, (tensor, place) in parts.items()}
    found: dict[str, tuple[tuple[int, ...], str]] = {}
    for each in gathered(own):
        for name, (shape, kind) in each.items():
            found.setdefault(name, (tuple(shape), kind))
    return found


def _bits(t: Tensor) -> Tensor:
    """The tensor's memory as whole numbers, which every backend adds."""
    return t.view(-1).view({4: torch.int32, 8: torch.int64}.get(t.element_size(), torch.uint8)) if t.numel() else t.view(-1)
