"""The mesh of ranks that a plan asks for."""

from __future__ import annotations

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from quadriga.core.errors import NotApplicable
from quadriga.core.slots import ParallelSpec


def mesh_of(spec: ParallelSpec, device: str) -> DeviceMesh:
    """Dimensions "pipeline", "replica", "shard" and "tensor", outermost first: neighbours share matrices, which talk most.

    Ranks that see different examples are "replica" where each has all weights, "shard" where each has a part.

    Raises:
        NotApplicable: the processes cannot be dealt out so.
    """
    size, fixed = dist.get_world_size(), spec.pipeline * spec.tensor
    if size % fixed:
        reason = f"{size} processes are no multiple of {spec.pipeline} pipeline · {spec.tensor} tensor ranks"
        raise NotApplicable(reason, f"give --nproc {fixed}, or a multiple")
    data = size // fixed
    if data > 1 and not spec.data:
        reason = f"there are {size} processes, and the plan has work for {fixed}"
        raise NotApplicable(reason, f"add data_parallel or fully_sharded, or give --nproc {fixed}")
    replicas, shards = (1, data) if spec.data == "shard" else (data, 1)
    names = ("pipeline", "replica", "shard", "tensor")
    return init_device_mesh(device, (spec.pipeline, replicas, shards, spec.tensor), mesh_dim_names=names)
