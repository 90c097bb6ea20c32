"""Matrices cut over ranks: torch.distributed.tensor.parallel by a plan of the model's, the user's, or read off the model.

A plan that is read off goes by the axis graph: heads of attentions and hidden units of MLPs are widths between Linear layers,
and a rank keeps its share of them, as if the others were pruned. So fused projections and counts of heads come out right.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    PrepareModuleOutput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from quadriga.core.axes import AxisGraph, Group
from quadriga.core.batch import Tree, tensors
from quadriga.core.errors import BadInput, NotApplicable, did_you_mean
from quadriga.core.plain import is_plain
from quadriga.core.slots import ParallelSpec
from quadriga.core.stacks import Block, blocks_of
from quadriga.parallel.place import shard

Entries = dict[str, dict[int, Tensor]]  # parameter → dimension → entries that this rank has
STYLES: dict[str, Any] = {
    "colwise": ColwiseParallel,
    "rowwise": RowwiseParallel,
    "colwise_gather_output": lambda: ColwiseParallel(output_layouts=Replicate()),
    "rowwise_split_input": lambda: RowwiseParallel(input_layouts=Replicate()),
    "embedding_rowwise": lambda: RowwiseParallel(input_layouts=Replicate()),
    "sequence": SequenceParallel,
}
OTHER_NAMES = {"colwise_rep": "colwise_gather_output", "rowwise_rep": "rowwise_split_input", "sequence_parallel": "sequence"}


def cut_matrices(model: nn.Module, mesh: DeviceMesh, spec: ParallelSpec, example: Tree) -> Entries:
    """Leave this rank's part of each matrix that a plan names; where the parts lie.

    Args:
        model: changed in place, on its device.
        mesh: of the tensor ranks.
        spec: `options["plan"]` is the user's, patterns of module names → styles; `options["sequence"]` asks for activations
            between attention and MLP to be cut along time.
        example: two examples' inputs.

    Raises:
        NotApplicable: nothing can be cut, or not so; BadInput: the plan names nothing, or no style.
    """
    given = dict(spec.options.get("plan") or {}) or own_plan(model)
    if not given:
        return _derived(model, mesh, spec, example)
    if spec.options.get("sequence"):
        raise NotApplicable("sequence parallelism goes by a plan that is read off the model", 'name it in the plan: "sequence"')
    names = matched(model, given)
    if torn := next((names_of for names_of in ties(model) if any(n.rpartition(".")[0] in names for n in names_of)), None):
        raise NotApplicable(
            f"{' and '.join(torn)} are one weight, whose tie the plan would break", "leave them out of the plan"
        )
    plan = {name: styled(style) for name, style in names.items()}
    shapes = {name: p.shape for name, p in model.named_parameters()}
    _divisible(model, plan, mesh.size())
    parallelize_module(model, mesh, plan)
    return {name: at for name, p in model.named_parameters() if (at := _shards(p, shapes[name], mesh))}


def own_plan(model: nn.Module) -> dict[str, str]:
    """A plan that the model brings along, as those of transformers do.

    Raises:
        NotApplicable: it has a style that is not known here.
    """
    own = getattr(model, "tp_plan", None) or getattr(model, "_tp_plan", None)
    plan = {name: OTHER_NAMES.get(style, style) for name, style in own.items()} if isinstance(own, Mapping) else {}
    if odd := sorted(set(plan.values()) - set(STYLES)):
        raise NotApplicable(f'the model\'s own plan asks for the style "{odd[0]}"', "give a plan of your own")
    return plan


def ties(model: nn.Module) -> list[list[str]]:
    """The names of each parameter that has several."""
    names: dict[int, list[str]] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(p), []).append(name)
    return [each for each in names.values() if len(each) > 1]


def matched(model: nn.Module, plan: Mapping[str, str]) -> dict[str, str]:
    """Module → style, of patterns → styles.

    Raises:
        BadInput: a pattern matches no module.

    Example:
        >>> matched(nn.Sequential(nn.Linear(2, 4), nn.Linear(4, 2)), {"0": "colwise", "[1-9]": "rowwise"})
        {'0': 'colwise', '1': 'rowwise'}
    """
    names = [name for name, _ in model.named_modules() if name]
    found: dict[str, str] = {}
    for pattern, style in plan.items():
        hits = [name for name in names if fnmatchcase(name, pattern)]
        if not hits:
            raise BadInput(f'the plan\'s pattern "{pattern}" matches no module', did_you_mean(pattern, names))
        found.update(dict.fromkeys(hits, style))
    return found


def styled(name: str) -> ParallelStyle:
    """A style by name. Raises BadInput if there is none."""
    name = OTHER_NAMES.get(name, name)
    if name not in STYLES:
        raise BadInput(f'there is no style "{name}" of tensor parallelism', did_you_mean(name, STYLES))
    return STYLES[name]()


def _divisible(model: nn.Module, plan: Mapping[str, ParallelStyle], ranks: int) -> None:
    for name, style in plan.items():
        module = model.get_submodule(name)
        if isinstance(module, nn.Embedding) and module.num_embeddings % ranks and isinstance(style, RowwiseParallel):
            raise NotApplicable(f"{name} has {module.num_embeddings} rows, no multiple of {ranks} ranks", "give another degree")
        if isinstance(module, nn.Linear) and isinstance(style, ColwiseParallel | RowwiseParallel):
            width = module.out_features if isinstance(style, ColwiseParallel) else module.in_features
            if width % ranks:
                raise NotApplicable(f"{name} has {width} units, no multiple of {ranks} ranks", "give another degree")


def _shards(parameter: Tensor, shape: torch.Size, mesh: DeviceMesh) -> dict[int, Tensor]:
    if not isinstance(parameter, DTensor):
        return {}
    at = mesh.get_local_rank()
    return {p.dim: shard(torch.arange(shape[p.dim]), at, mesh.size()) for p in parameter.placements if isinstance(p, Shard)}


def _derived(model: nn.Module, mesh: DeviceMesh, spec: ParallelSpec, example: Tree) -> Entries:
    ranks, at = mesh.size(), mesh.get_local_rank()
    graph = AxisGraph.trace(model, example)
    widths, reasons = chosen(graph, ranks)
    if not widths:
        raise NotApplicable(f"no heads and no hidden units can be dealt out to {ranks} ranks ({'; '.join(reasons[:3])})")
    keep = {group: shard(torch.arange(group.size), at, ranks) for group in widths}
    entries = entries_of(keep)
    sides = {name: dim for name, dims in entries.items() if name.endswith(".weight") for dim in dims}
    linears = {name.removesuffix(".weight"): dim for name, dim in sides.items()}
    extra = sequence_plan(model, set(linears), example, ranks) if spec.options.get("sequence") else {}
    graph.cut_all(keep)
    plan: dict[str, ParallelStyle] = {}
    for name, dim in linears.items():
        _as_parts(model.get_submodule(name), mesh, dim)
        between = {"input_layouts" if dim == 0 else "output_layouts": Shard(1)} if extra else {}
        plan[name] = (ColwiseParallel if dim == 0 else RowwiseParallel)(**between)
    parallelize_module(model, mesh, {**plan, **extra})
    return entries


def chosen(graph: AxisGraph, ranks: int) -> tuple[list[Group], list[str]]:
    """Widths to deal out, and why others stay whole: each lies between Linear layers that no other chosen one touches."""
    linears = {p for m in graph.model.modules() if type(m) is nn.Linear for p in m.parameters(recurse=False)}
    found: list[Group] = []
    reasons: list[str] = []
    used: set[str] = set()
    for group in graph.groups():
        layers = {member.names[0].rpartition(".")[0] for member in group.members}
        reason = group.fixed
        if not reason and not all(member.tensor in linears for member in group.members):
            reason = "it is not between Linear layers alone"
        if not reason and not any(member.reader for member in group.members):
            reason = "no Linear layer reads it"
        if not reason and group.size % ranks:
            reason = f"its {group.size} units are no multiple"
        if not reason and layers & used:
            reason = "a layer of it is cut on its other side"
        if reason:
            reasons.append(f"{group.name}: {reason}")
        else:
            found.append(group)
            used |= layers
    return found, reasons


def entries_of(keep: Mapping[Group, Tensor]) -> Entries:
    """What is left of each tensor when these units of each width stay."""
    masks: dict[str, dict[int, Tensor]] = {}
    for group, units in keep.items():
        stays = torch.zeros(group.size, dtype=torch.bool)
        stays[units] = True
        for member in group.members:
            kept = (member.units < 0) | stays[member.units]
            dims = masks.setdefault(member.names[0], {})
            dims[member.dim] = kept & dims[member.dim] if member.dim in dims else kept
    return {name: {dim: kept.nonzero().flatten() for dim, kept in dims.items()} for name, dims in masks.items()}


def _as_parts(linear: nn.Module, mesh: DeviceMesh, dim: int) -> None:
    """Tell PyTorch that a layer's tensors are parts: of its outputs (dimension 0) or of its inputs (1)."""
    for name, p in list(linear.named_parameters(recurse=False)):
        if name == "weight" or dim == 0:
            part = DTensor.from_local(p.data, mesh, [Shard(dim)], run_check=False)
            linear.register_parameter(name, nn.Parameter(part, requires_grad=p.requires_grad))


def sequence_plan(model: nn.Module, linears: set[str], example: Tree, ranks: int) -> dict[str, ParallelStyle]:
    """Styles with which activations are cut along time (dimension 1) from the first block to the last.

    Raises:
        NotApplicable: the blocks are not of that kind, naming what stands in the way.
    """
    length = tensors(example)[0].shape
    if len(length) < 2 or length[1] % ranks:
        raise NotApplicable(f"inputs of the shape {tuple(length)} have no length that {ranks} ranks can share")
    blocks = _outer(b for b in blocks_of(model) if any(name.startswith(f"{b.name}.") for name in linears))
    if not blocks or len({id(b.stack) for b in blocks}) > 1:
        raise NotApplicable("the layers to be cut are not in one stack of blocks", "leave sequence out")
    plan: dict[str, ParallelStyle] = {}
    for block in blocks:
        needed = [p for p in inspect.signature(block.module.forward).parameters.values() if p.default is p.empty]
        if len(needed) != 1:
            raise NotApplicable(f"{block.name} takes {len(needed)} inputs, and one can be cut along time", "leave sequence out")
        for name, module in block.module.named_modules(prefix=block.name):
            if is_plain(module, nn.LayerNorm, nn.RMSNorm):
                plan[name] = SequenceParallel()
            elif name not in linears and any(True for _ in module.parameters(recurse=False)):
                raise NotApplicable(f"{name} would see a part of the time", "leave sequence out")
    whole, part = Replicate(), Shard(1)
    plan[blocks[0].name] = PrepareModuleInput(input_layouts=(whole,), desired_input_layouts=(part,), use_local_output=True)
    plan[blocks[-1].name] = PrepareModuleOutput(output_layouts=(part,), desired_output_layouts=(whole,), use_local_output=True)
    return plan


def _outer(blocks: Iterable[Block]) -> list[Block]:
    found: list[Block] = []
    for block in blocks:
        if not any(block.name.startswith(f"{b.name}.") for b in found):
            found.append(block)
    return found
