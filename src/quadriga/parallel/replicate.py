"""Every rank has all weights and a part of each batch: DistributedDataParallel."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.parallel import DistributedDataParallel

from quadriga.core.errors import NotApplicable
from quadriga.core.norms import BATCH_NORMS
from quadriga.core.plain import is_plain
from quadriga.core.slots import ParallelSpec

PLAIN_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


def with_synced_norms(model: nn.Module, spec: ParallelSpec, device: torch.device) -> nn.Module:
    """Batch normalizations over the ranks' whole batch, where the plan asks for it.

    Raises:
        NotApplicable: on the CPU, where PyTorch has none; or a norm has a forward of its own, which the conversion would lose.
    """
    norms = {name: m for name, m in model.named_modules() if isinstance(m, BATCH_NORMS)}
    if not spec.options.get("sync_batchnorm") or not norms:
        return model
    if device.type == "cpu":
        raise NotApplicable("PyTorch synchronizes batch normalization on GPUs only", "leave sync_batchnorm out")
    if own := [name for name, m in norms.items() if not is_plain(m, *PLAIN_NORMS)]:
        what = f"{own[0]} ({type(norms[own[0]]).__name__}) computes more than a batch normalization"
        raise NotApplicable(f"{what}, and would lose it when it is synchronized", "leave sync_batchnorm out")
    return nn.SyncBatchNorm.convert_sync_batchnorm(model)


class Replicated:
    """The copy of one rank, whose gradients are the mean over all.

    Args:
        model: on its device.
        mesh: its dimension "replica" is used.
        spec: `options["unused"]` says that some weights may get no gradient in a step.
    """

    def __init__(self, model: nn.Module, mesh: DeviceMesh, spec: ParallelSpec) -> None:
        on_gpu = next(model.parameters()).device.type == "cuda"
        ids: dict[str, Any] = {"device_ids": [torch.cuda.current_device()]} if on_gpu else {}
        unused = bool(spec.options.get("unused"))
        group = mesh.get_group("replica")
        self.forward = DistributedDataParallel(model, process_group=group, find_unused_parameters=unused, **ids)

    def synced(self, wanted: bool) -> AbstractContextManager[Any]:
        """Backward passes inside exchange gradients, or add up what each rank has alone."""
        return nullcontext() if wanted else self.forward.no_sync()
