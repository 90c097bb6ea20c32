"""The ranks that train one model together, as one of them sees it: its part of the model, of the batch and of the mesh."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from quadriga.core.batch import Tree
from quadriga.core.batch import to_device as to_device_tree
from quadriga.core.copies import copy_model
from quadriga.core.slots import ParallelSpec
from quadriga.parallel.collect import Parts, whole
from quadriga.parallel.group import join
from quadriga.parallel.mesh import mesh_of
from quadriga.parallel.pipeline import Pipeline
from quadriga.parallel.place import Place, shard
from quadriga.parallel.replicate import Replicated, with_synced_norms
from quadriga.parallel.shards import Sharded
from quadriga.parallel.share import Share, joined
from quadriga.parallel.tensor import cut_matrices

Entries = Mapping[int, Tensor]  # dimension → entries there; see `Place`


class Team:
    """A plan realised on this rank, with a copy of the model; the model itself is left as it is.

    Args:
        model: whole, in training mode.
        spec: the plan.
        device: of this rank.
        example: two examples' inputs.
        batch: examples in a batch of all ranks.
        micro: the most that a rank works off at once, or None.

    Attributes:
        model: what this rank trains.
        share: its part of each batch.
        shapes: of the whole model's parameters and buffers.
        places: of its parameters and buffers, where they lie in the whole model's.
        pipe: the pipeline, if layers are spread.
        layers: the group of ranks that hold the other layers, or None.

    Raises:
        NotApplicable: the plan does not fit the processes or the model.
    """

    def __init__(
        self, model: nn.Module, spec: ParallelSpec, device: torch.device, example: Tree, batch: int, micro: int | None = None
    ) -> None:
        join(device.type)
        self.spec, self.device = spec, device
        self.mesh = mesh_of(spec, device.type)
        self.shapes = {name: tuple(t.shape) for name, t in tensors_of(model).items()}
        self.group = self.mesh.get_group("shard" if spec.data == "shard" else "replica")
        self.share = Share(dist.get_rank(self.group), dist.get_world_size(self.group))
        self.model = with_synced_norms(copy_model(model), spec, device)
        alone = spec.data == "shard" and spec.tensor == spec.pipeline == 1
        if not alone:  # FSDP moves what it cuts, so that no device holds all
            to_device(self.model, device)
        self.entries: Mapping[str, Entries] = {}
        if spec.tensor > 1:
            there = to_device_tree(example, device)
            self.entries = cut_matrices(self.model, self.mesh["tensor"], spec, there)
        self.pipe: Pipeline | None = None
        self.constants: dict[str, Tensor] = {}  # buffers of the whole model, which no stage changes
        if spec.pipeline > 1:
            of = self.share.of(batch)
            self.constants = {name: b.detach().clone() for name, b in self.model.named_buffers()}
            mesh = self.mesh["pipeline"]
            self.pipe = Pipeline(self.model, mesh, spec, example, of.stop - of.start, micro)
            self.model = self.pipe.model
        self.layers = self.mesh.get_group("pipeline") if self.pipe else None
        self.data = self._deal_out()
        to_device(self.model, device)
        if self.pipe:
            self.pipe.ready()
        self.forward: Any = self.data.forward if isinstance(self.data, Replicated) else self.model
        self.places = {name: self._place(t, self.shapes[name], self.entries.get(name)) for name, t in self.tensors().items()}

    def _deal_out(self) -> Replicated | Sharded | None:
        """What keeps the weights of ranks that see different examples: beside other plans FSDP, with whole copies if asked."""
        stages = self.pipe.modules if self.pipe else [self.model]
        if self.spec.data == "shard" or (self.spec.data and self.spec.tensor * self.spec.pipeline > 1):
            return Sharded(stages, self.mesh, self.spec)
        return Replicated(self.model, self.mesh, self.spec) if self.spec.data else None

    def tensors(self) -> dict[str, Tensor]:
        """This rank's parts of parameters and buffers."""
        if self.pipe is None:
            return tensors_of(self.model)
        return {**dict(self.model.named_parameters()), **self.constants}

    def _place(self, tensor: Tensor, shape: tuple[int, ...], entries: Entries | None) -> Place:
        """Where this rank's part of a tensor lies. FSDP deals out the first dimension of what the tensor ranks have."""
        found = dict(entries or {})
        at = {name: self.mesh.get_local_rank(name) for name in ("pipeline", "replica", "shard", "tensor")}
        parameter = isinstance(tensor, nn.Parameter)
        sharded = self.spec.data == "shard" and parameter
        if sharded:
            found[0] = shard(found.get(0, torch.arange(shape[0])), at["shard"], self.share.size)
        owner = not at["replica"] and (sharded or not at["shard"]) and (bool(entries) or not at["tensor"])
        return Place(shape, found, owner and (parameter or not at["pipeline"]))

    @property
    def replicated(self) -> bool:
        """Whether every rank has all weights."""
        return self.spec.data != "shard" and self.spec.tensor == self.spec.pipeline == 1

    @property
    def speaks(self) -> bool:
        """Whether this rank is the first of those that see the same examples."""
        return not self.mesh.get_local_rank("pipeline") and not self.mesh.get_local_rank("tensor")

    def synced(self, wanted: bool) -> AbstractContextManager[Any]:
        """Backward passes inside exchange gradients, or add up what each rank has alone; a pipeline does so by itself."""
        return nullcontext() if self.data is None or self.pipe else self.data.synced(wanted)

    def settle_gradients(self) -> None:
        """Sum what tensor ranks have added up apart, as of norms that each applied to its part of the time steps."""
        for p in self.model.parameters() if self.spec.tensor > 1 else ():
            if isinstance(p.grad, DTensor) and p.grad.placements != p.placements:  # type: ignore[attr-defined]
                p.grad = p.grad.redistribute(placements=p.placements)  # type: ignore[attr-defined]

    def total(self, t: Tensor) -> Tensor:
        """The sum over the ranks that see different examples."""
        total = t.detach().clone()
        if self.share.size > 1:
            dist.all_reduce(total, group=self.group)
        return total

    def joined(self, t: Tensor, count: int) -> Tensor:
        """The rows [count, ...] of the whole batch, from each rank's rows [its share, ...]."""
        return joined(t, self.share, count, self.group)

    @property
    def order(self) -> list[str]:
        """The names of the whole model's parameters and buffers."""
        return list(self.shapes)

    def owner_of(self, path: str) -> str | None:
        """The parameter or buffer that a path such as "optimizer/state/fc.weight/exp_avg" names, if it names one."""
        return next((part for part in path.split("/") if part in self.shapes), None)

    def place_of(self, path: str, shape: tuple[int, ...]) -> Place | None:
        """Where this rank's part of a tensor lies that a checkpoint has under a path; None if it has none.

        What stands under a parameter's name and is as large is spread as it is. All else is the same in all ranks, but what
        belongs to other ranks' layers.

        Args:
            path: of the tensor.
            shape: whole.
        """
        owner = self.owner_of(path)
        if owner is not None and owner not in self.places:
            return None
        if owner is not None and shape == self.shapes[owner]:
            return self.places[owner]
        return self._same(shape, owner)

    def _same(self, shape: tuple[int, ...], owner: str | None) -> Place:
        """Of a tensor that all ranks have, or all that have the layer."""
        names = ("replica", "shard", "tensor", *(["pipeline"] if owner is None else []))
        return Place(shape, {}, not any(self.mesh.get_local_rank(name) for name in names))

    def spread(self, weights: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> Parts:
        """Weights by name and a state's other tensors by path, this rank's parts, under "model/" and "other/"."""
        parts = {f"model/{n}": (t, self.places[n]) for n, t in weights.items()}
        for path, t in other.items():
            owner = self.owner_of(path)
            alike = owner is not None and tuple(t.shape) == self.places[owner].local_shape
            parts[f"other/{path}"] = t, self.places[owner] if owner and alike else self._same(tuple(t.shape), owner)
        return parts

    def parts(self, tensors: Mapping[str, Tensor]) -> Parts:
        """Tensors that are spread as the parameters and buffers of their names are."""
        return {name: (t, self.places[name]) for name, t in tensors.items()}

    def whole(self, tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """(name, whole tensor), in all ranks, of tensors that are spread as the parameters and buffers of their names are."""
        return whole(self.parts(tensors), self.device)

    @torch.no_grad()
    def give_back(self, model: nn.Module) -> None:
        """Copy what was trained into a whole model, in all ranks."""
        own = tensors_of(model)
        for name, full in self.whole(self.tensors()):
            own[name].copy_(full)


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers, each once, under its first name."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def to_device(model: nn.Module, device: torch.device) -> None:
    """Move what is not spread yet; DTensors are where they belong."""
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is not None and not hasattr(p, "device_mesh") and p.device != device:
                p.data = p.data.to(device)
                assert module._parameters[name] is p
        for name, b in module._buffers.items():
            if b is not None and b.device != device:
                module._buffers[name] = b.to(device)
