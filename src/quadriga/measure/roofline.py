"""Where the time goes, layer by layer, and how far each layer is from what this machine can do."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from quadriga.core.batch import Tree, call, tensors
from quadriga.core.cuda import settle
from quadriga.core.roofline import REST, waits
from quadriga.measure.ceilings import Ceilings, ceilings
from quadriga.measure.flops import evaluating, flops, formulas
from quadriga.measure.size import parameters


@dataclass
class _Layer:
    """Sums over one forward pass, filled by hooks."""

    kind: str
    parameters: int
    seconds: list[float] = field(default_factory=list)  # one per repeat
    bytes: int = 0
    flops: int = 0
    started: float = 0.0


def profile(
    model: nn.Module, inputs: Tree, *, repeats: int = 20, seconds: float = 10.0, ceiling: Ceilings | None = None
) -> list[dict[str, Any]]:
    """One row per layer without children, and one for the time between them, slowest first.

    Args:
        model: called in eval mode without gradients, and left as it was.
        inputs: one batch.
        repeats: forward passes, after three untimed ones; the mean over the faster half of them is taken, so that the rows'
            seconds add up to those of a pass that nothing disturbed.
        seconds: after which no more than three of them are made.
        ceiling: of this machine; measured if None.

    Returns:
        Rows {"layer", "kind", "seconds", "share", "parameters", "flops", "bytes", "bound", "fraction"}: bytes of inputs,
        outputs and weights, each once per call, of an embedding the rows that are looked up, none where the output is the
        input (views, dropout); bound is "compute" or "memory", whichever takes longer at the ceilings; fraction is that
        time / the measured one, so 1 is the roofline. Where the bytes are unknown or none both are None.

    Source: Williams, Waterman and Patterson 2009, Roofline, CACM 52(4).
    """
    ceiling = ceiling or ceilings(torch.get_num_threads())
    layers = {name: _layer(module) for name, module in model.named_modules() if not list(module.children())}
    counter = FlopCounterMode(display=False, custom_mapping=formulas())
    totals: list[float] = []
    with evaluating(model), torch.no_grad():
        with counter, _hooks(model, layers, counter):
            call(model, inputs)
        for _ in range(2):
            call(model, inputs)
        with _hooks(model, layers, None):
            while len(totals) < min(3, repeats) or (len(totals) < repeats and sum(totals) < seconds):
                for layer in layers.values():
                    layer.seconds.append(0.0)
                start = time.perf_counter()
                settle(call(model, inputs))
                totals.append(time.perf_counter() - start)
    rest = _Layer("", 0, [total - sum(layer.seconds[i] for layer in layers.values()) for i, total in enumerate(totals)])
    rest.parameters = max(0, parameters(model) - sum(layer.parameters for layer in layers.values()))
    rest.flops = max(0, flops(model, inputs, batch=None) - sum(layer.flops for layer in layers.values()))
    quiet = _quiet(totals)
    rows = [_row(name, layer, totals, quiet, ceiling) for name, layer in {**layers, REST: rest}.items()]
    return sorted(rows, key=lambda row: -row["seconds"])


def _quiet(totals: list[float]) -> list[int]:
    """Which passes were the faster half."""
    order = sorted(range(len(totals)), key=totals.__getitem__)
    return order[: (len(totals) + 1) // 2]


def _layer(module: nn.Module) -> _Layer:
    return _Layer(type(module).__name__, sum(p.numel() for p in module.parameters()))


def _row(name: str, layer: _Layer, totals: list[float], quiet: list[int], ceiling: Ceilings) -> dict[str, Any]:
    seconds, total = (max(0.0, statistics.fmean(times[i] for i in quiet)) for times in (layer.seconds, totals))
    compute, memory = waits({"flops": layer.flops, "bytes": layer.bytes}, ceiling.plain())
    known = layer.bytes > 0
    return {
        "layer": name or "(model)",
        "kind": layer.kind,
        "seconds": seconds,
        "share": seconds / total if total > 0 else 0.0,
        "parameters": layer.parameters,
        "flops": layer.flops,
        "bytes": layer.bytes,
        "bound": ("compute" if compute > memory else "memory") if known else None,
        "fraction": max(compute, memory) / seconds if known and seconds > 0 else None,
    }


@contextmanager
def _hooks(model: nn.Module, layers: Mapping[str, _Layer], counter: FlopCounterMode | None) -> Iterator[None]:
    """Count every layer's forward meanwhile, or clock it if there is no counter."""
    handles = []
    for name, module in model.named_modules():
        if name in layers:
            before, after = _clocks(layers[name]) if counter is None else _counters(layers[name], counter)
            handles.append(module.register_forward_pre_hook(before, with_kwargs=True, prepend=True))
            handles.append(module.register_forward_hook(after, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _clocks(layer: _Layer) -> tuple[Callable[..., None], Callable[..., None]]:
    def before(module: nn.Module, args: Any, kwargs: Any) -> None:
        layer.started = time.perf_counter()

    def after(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        settle(output)
        layer.seconds[-1] += time.perf_counter() - layer.started

    return before, after


def _counters(layer: _Layer, counter: FlopCounterMode) -> tuple[Callable[..., None], Callable[..., None]]:
    """Bytes that a call moves, and the FLOPs that the counter saw meanwhile."""
    seen, versions = [0], [[0]]

    def before(module: nn.Module, args: Any, kwargs: Any) -> None:
        seen[0], versions[0] = counter.get_total_flops(), [t._version for t in tensors((args, kwargs))]

    def after(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        layer.flops += int(counter.get_total_flops() - seen[0])
        given, made = tensors((args, kwargs)), tensors(output)
        if versions[0] != [t._version for t in given] or not _views(made, given):
            layer.bytes += sum(map(_size, (*given, *made))) + _weights(module, given, made)

    return before, after


def _views(made: list[Tensor], given: list[Tensor]) -> bool:
    """Whether every output lies in the memory of an input, as that of a view or of dropout in eval mode does."""
    places = {t.untyped_storage().data_ptr() for t in given}
    return all(t.untyped_storage().data_ptr() in places for t in made)


def _weights(module: nn.Module, given: list[Tensor], made: list[Tensor]) -> int:
    """Bytes of a module's own weights that a call reads: of an embedding the rows that are looked up."""
    whole = sum(map(_size, module.parameters(recurse=False)))
    if isinstance(module, nn.Embedding):
        return min(whole, sum(map(_size, made)))
    if isinstance(module, nn.EmbeddingBag):
        return min(whole, given[0].numel() * module.embedding_dim * module.weight.element_size())
    return whole


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
