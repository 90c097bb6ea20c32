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
from quadriga.core.slots import ParallelSpec


def with_synced_norms(model: nn.Module, spec: ParallelSpec, device: torch.device) -> nn.Module:
    """Batch normalizations over the ranks' whole batch, where the plan asks for it.

    Raises:
        NotApplicable: on the CPU, where PyTorch has none.
    """
    if not spec.options.get("sync_batchnorm") or not any(isinstance(m, BATCH_NORMS) for m in model.modules()):
        return model
    if device.type == "cpu":
        raise NotApplicable("PyTorch synchronizes batch normalization on GPUs only", "leave sync_batchnorm out")
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
