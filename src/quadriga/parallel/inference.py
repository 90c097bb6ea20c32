"""A finished model executed by several processes: batches dealt out to replicas, matrices or layers shared."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from quadriga.core.batch import Tree, call, resize, tensors, tree_map
from quadriga.core.batch import to_device as tree_to
from quadriga.core.copies import copy_model
from quadriga.core.errors import NotApplicable
from quadriga.core.slots import ParallelSpec
from quadriga.parallel.group import join
from quadriga.parallel.mesh import mesh_of
from quadriga.parallel.pipeline import Pipeline
from quadriga.parallel.share import Share, joined
from quadriga.parallel.team import to_device
from quadriga.parallel.tensor import cut_matrices


class Spread:
    """Calls a model in all processes at once: every one gives the same inputs and gets the whole output.

    Args:
        model: finished; it is not changed.
        spec: `data="replicate"` deals each batch out, `tensor` and `pipeline` share the weights, together or alone, as in
            training; "shard" is for training.
        example: two examples' inputs.
        batch: examples of a batch. Others are cut or padded where layers are shared, whose stages are traced for one size.
        device: "cpu" or "cuda".

    Raises:
        NotApplicable: the plan does not fit the processes or the model.

    Example:
        >>> model = nn.Linear(4, 2)
        >>> spread = Spread(model, ParallelSpec("replicate"), torch.ones(2, 4), batch=8)  # in one process: all is there
        >>> bool((spread(torch.ones(3, 4)) == model(torch.ones(3, 4))).all())
        True
        >>> dist.destroy_process_group()
    """

    def __init__(self, model: nn.Module, spec: ParallelSpec, example: Tree, batch: int, device: str = "cpu") -> None:
        if spec.data == "shard":
            raise NotApplicable("sharded weights are gathered at every call, which is for training", 'use data="replicate"')
        join(device)
        self.device = torch.device(device, torch.cuda.current_device()) if device == "cuda" else torch.device(device)
        mesh = mesh_of(spec, device)
        self.group = mesh.get_group("replica")
        self.share = Share(dist.get_rank(self.group), dist.get_world_size(self.group))
        self.model = copy_model(model).eval().requires_grad_(False)
        to_device(self.model, self.device)
        if spec.tensor > 1:
            cut_matrices(self.model, mesh["tensor"], spec, tree_to(example, self.device))
        self.pipe: Pipeline | None = None
        if spec.pipeline > 1:
            self.pipe = Pipeline(self.model, mesh["pipeline"], spec, example, self.share.largest(batch), None)
            self.pipe.ready()

    @torch.no_grad()
    def __call__(self, inputs: Tree) -> Tree:
        """inputs [batch, ...] → output, in every process."""
        inputs = tree_to(inputs, self.device)
        count = len(tensors(inputs)[0])
        if self.share.size == 1:
            return self._own(inputs)
        padded = resize(inputs, max(count, self.share.size))  # so that every replica has one
        here = self.share.of(len(tensors(padded)[0]))
        output = self._own(tree_map(lambda t: t[here], padded))
        return tree_map(lambda t: joined(t, self.share, len(tensors(padded)[0]), self.group)[:count], output)

    def _own(self, inputs: Tree) -> Tree:
        """This replica's part."""
        if self.pipe is None:
            return call(self.model, inputs)
        count, size, found = len(tensors(inputs)[0]), self.pipe.batch, list[Tensor]()
        for start in range(0, count, size):
            part = tree_map(lambda t: t[start : start + size], inputs)  # noqa: B023
            found.append(self.pipe.run(resize(part, size)))
        return torch.cat(found)[:count]
