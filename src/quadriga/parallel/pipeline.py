"""Layers dealt out over ranks: torch.distributed.pipelining, with stages of equal measured cost."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.pipelining import (
    Schedule1F1B,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    SplitPoint,
    pipeline,
)

from quadriga.core.batch import Batch, Tree, call, evaluating, resize, rows, tensors, to_device
from quadriga.core.errors import BadInput, NotApplicable, did_you_mean
from quadriga.core.norms import BATCH_NORMS
from quadriga.core.slots import ParallelSpec
from quadriga.core.stacks import Block, blocks_of
from quadriga.parallel.cost import block_costs, cut_evenly
from quadriga.parallel.group import same

SCHEDULES: dict[str, Any] = {"1f1b": Schedule1F1B, "gpipe": ScheduleGPipe, "interleaved": ScheduleInterleaved1F1B}
Losses = Callable[[Any, Batch], tuple[Tensor, Tensor]]  # output, part of the batch → losses, their factors


class Pipeline:
    """This rank's stages, and the schedule by which micro-batches pass through all ranks'.

    Args:
        model: whole, on its device, and in training mode if it is to be trained; its tensors are taken over.
        mesh: of the pipeline ranks.
        spec: options "schedule", "microbatches", "chunks" (stages of a rank, for "interleaved") and "cuts" (names of the
            modules that stages begin with; by default measured).
        example: two examples' inputs.
        batch: examples of a rank's batch, always as many.
        micro: the most of a micro-batch, or None.

    Attributes:
        model: the modules of these stages, as they stand in the whole model; others are gone.

    Raises:
        NotApplicable: the model cannot be cut so.
    """

    def __init__(
        self, model: nn.Module, mesh: DeviceMesh, spec: ParallelSpec, example: Tree, batch: int, micro: int | None
    ) -> None:
        self.trains = model.training
        check(model)
        kind, size, at = spec.options.get("schedule", "1f1b"), mesh.size(), mesh.get_local_rank()
        if kind not in SCHEDULES:
            raise BadInput(f'there is no schedule "{kind}"', did_you_mean(kind, SCHEDULES))
        chunks = spec.options.get("chunks", 2) if kind == "interleaved" else 1
        self.group, self.batch, self.stages_in_all = mesh.get_group(), batch, size * chunks
        self.count = micro_batches(batch, spec.options.get("microbatches"), self.stages_in_all, micro)
        device = next(model.parameters()).device
        inputs = to_device(resize(example, batch // self.count), device)
        with evaluating(model), torch.no_grad():
            if not isinstance(call(model, inputs), Tensor):
                raise NotApplicable("a pipeline's last stage has to return one tensor", "return the logits alone")
        cuts = spec.options.get("cuts") or self._measured(model, inputs)
        if len(cuts) != self.stages_in_all - 1:
            raise BadInput(
                f"{len(cuts)} cuts do not make {self.stages_in_all} stages", f"name {self.stages_in_all - 1} modules"
            )
        args, named = arguments(inputs)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of torch.export about itself
                pipe = pipeline(model, args, named, split_spec={name: SplitPoint.BEGINNING for name in cuts})
        except Exception as error:  # torch.export raises its own types
            raise NotApplicable(f"the model cannot be traced for a pipeline: {error}", "use fully_sharded") from error
        mine = range(at, self.stages_in_all, size)
        self.modules = [pipe.get_stage_module(k) for k in mine]
        self._make = lambda: [pipe.build_stage(k, device, self.group) for k in mine]
        self.kind, self.first, self.last = SCHEDULES[kind], at == 0, at == size - 1
        self.cuts = tuple(cuts)
        self.model = only(model, {name for module in self.modules for name, _ in module.named_parameters()})
        self._schedule: Any = None
        self._now: tuple[Batch, Losses, float] | None = None
        self._found: dict[int, tuple[Tensor, Tensor]] = {}

    def _measured(self, model: nn.Module, inputs: Tree) -> list[str]:
        """The blocks that stages of equal cost begin with; the first rank measures."""
        blocks = stack_of(model, self.stages_in_all)
        costs = same(lambda: block_costs(model, [b.module for b in blocks], inputs))
        return [blocks[k].name for k in cut_evenly(costs, self.stages_in_all)]

    def ready(self) -> None:
        """Make the schedule, once the stages' weights are as they will stay."""
        for module in self.modules:  # FSDP has put other objects there
            for name, p in module.named_parameters():
                owner, _, own = name.rpartition(".")
                self.model.get_submodule(owner)._parameters[own] = p  # type: ignore[assignment]
        stages = self._make()
        given: dict[str, Any] = {"loss_fn": self._loss if self.trains else None, "scale_grads": False}
        many = self.kind is ScheduleInterleaved1F1B
        self._schedule = self.kind(stages if many else stages[0], n_microbatches=self.count, **given)

    def step(self, batch: Batch, losses: Losses, scale: float) -> tuple[Tensor, Tensor]:
        """Add the gradients of one batch: (its losses, what it adds to the loss of the whole batch), the same on all ranks.

        Args:
            batch: of this rank and of those that hold its other layers.
            losses: takes the loss of a micro-batch's output.
            scale: of the gradients.
        """
        if len(batch) != self.batch:
            raise NotApplicable(
                f"a pipeline for batches of {self.batch} examples got one of {len(batch)}", "keep the batch size"
            )
        self._now, self._found = (batch, losses, scale), {}
        args, named = arguments(batch.inputs) if self.first else ((), {})
        target = {"target": torch.arange(len(batch))} if self.last else {}
        self._schedule.step(*args, **named, **target)
        self._now = None
        return self._told(len(batch), batch.index.device)

    @torch.no_grad()
    def run(self, inputs: Tree) -> Tensor:
        """The output [batch, ...] of one batch, the same on all ranks, of a model that was given in evaluation mode."""
        args, named = arguments(inputs) if self.first else ((), {})
        output = self._schedule.eval(*args, **named)
        source = dist.get_global_rank(self.group, dist.get_world_size(self.group) - 1)
        told: list[Any] = [(tuple(output.shape), output.dtype) if self.last else None]
        dist.broadcast_object_list(told, source, group=self.group)
        sent = output.contiguous() if self.last else torch.empty(told[0][0], dtype=told[0][1], device=tensors(inputs)[0].device)
        dist.broadcast(sent, source, group=self.group)
        return sent

    def _loss(self, output: Any, places: Tensor) -> Tensor:
        """Of a micro-batch: its part of the whole batch's loss."""
        assert self._now is not None
        batch, losses_of, scale = self._now
        start = int(places[0])
        losses, factors = losses_of(output, rows(batch, slice(start, start + len(places))))
        self._found[start] = losses.detach(), factors
        return (losses * factors).sum() * scale

    def _told(self, count: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Losses [batch], or a scalar, from the last stage's rank."""
        sent = torch.zeros(count + 2, device=device)  # the loss, whether there is one per example, and these
        if self.last:
            found = [self._found[k] for k in sorted(self._found)]
            sent[0] = sum(float((losses * factors).sum()) for losses, factors in found)
            if found[0][0].dim():
                sent[1] = 1
                sent[2:] = torch.cat([losses for losses, _ in found]).float()
        dist.broadcast(sent, dist.get_global_rank(self.group, dist.get_world_size(self.group) - 1), group=self.group)
        return (sent[2:] if sent[1] else sent[0]), sent[0]


def arguments(inputs: Tree) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """How a model is called with inputs.

    Example:
        >>> arguments({"a": 1}), arguments([1, 2]), arguments(3)
        (((), {'a': 1}), ((1, 2), {}), ((3,), {}))
    """
    if isinstance(inputs, dict):
        return (), dict(inputs)
    return (tuple(inputs) if isinstance(inputs, tuple | list) else (inputs,)), {}


def micro_batches(batch: int, wanted: int | None, stages: int, micro: int | None = None) -> int:
    """How many micro-batches of equal size: as many as wanted, or the divisor of the batch next to two for each stage.

    Raises:
        BadInput: the batch cannot be cut so.

    Example:
        >>> micro_batches(32, None, 4), micro_batches(12, None, 4), micro_batches(12, 6, 4)
        (8, 6, 6)
    """
    least = max(stages, -(-batch // micro) if micro else 1)
    divisors = [k for k in range(1, batch + 1) if batch % k == 0 and k >= least]
    if wanted is not None:
        if wanted not in divisors:
            problem = f"a rank's batch of {batch} cannot be cut into {wanted} micro-batches for {stages} stages"
            raise BadInput(problem, f"give one of {', '.join(map(str, divisors)) or 'a larger batch'}")
        return wanted
    if not divisors:
        raise BadInput(f"a rank's batch of {batch} is too small for {stages} stages", "raise the batch size")
    return max((k for k in divisors if k <= max(least, 2 * stages)), default=divisors[0])


def check(model: nn.Module) -> None:
    """Raises NotApplicable for what a pipeline would compute otherwise."""
    if model.training and any(isinstance(m, BATCH_NORMS) for m in model.modules()):
        raise NotApplicable("batch normalization would take its statistics over micro-batches", "use data_parallel")
    names = list(dict(model.named_parameters(remove_duplicate=False)))
    if len(names) > len(list(model.parameters())):
        raise NotApplicable("the model has tied weights, which two stages would hold", "use fully_sharded or tensor_parallel")


def stack_of(model: nn.Module, stages: int) -> list[Block]:
    """The blocks of the stack with the most weights.

    Raises:
        NotApplicable: there is none, or it has fewer blocks than stages.
    """
    stacks: dict[int, list[Block]] = {}
    for block in blocks_of(model):
        stacks.setdefault(id(block.stack), []).append(block)
    weights = {key: sum(p.numel() for b in some for p in b.module.parameters()) for key, some in stacks.items()}
    best = stacks[max(weights, key=lambda key: weights[key])] if stacks else []
    if len(best) < stages:
        reason = f"the model has {len(best)} blocks in a stack, and {stages} stages are asked for"
        raise NotApplicable(reason, "ask for fewer, or name the modules that stages begin with in cuts")
    return best


def only(model: nn.Module, names: Sequence[str] | set[str]) -> nn.Module:
    """The model with these parameters alone; modules keep their types, and those without any are replaced by `nn.Identity`."""
    names, gone = set(names), set[str]()
    for path, module in list(model.named_modules()):
        if any(path.startswith(f"{other}.") for other in gone):
            continue
        own = [f"{path}.{name}".lstrip(".") for name, _ in module.named_parameters()]
        if path and own and not names & set(own):
            parent, _, name = path.rpartition(".")
            model.get_submodule(parent)._modules[name] = nn.Identity()
            gone.add(path)
            continue
        for name in [n for n in module._parameters if f"{path}.{n}".lstrip(".") not in names]:
            module._parameters[name] = None
    return model
