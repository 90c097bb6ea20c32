"""What the blocks of a model cost in a training step, as measured, and where that cuts it into even stages."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

from torch import nn

from quadriga.core import cuda
from quadriga.core.batch import Tree, call, primary, tensors

REPEATS = 5


def block_costs(
    model: nn.Module, blocks: Sequence[nn.Module], inputs: Tree, clock: Callable[[], float] = time.perf_counter
) -> list[float]:
    """Seconds of a forward and backward pass that fall to each block; medians of a few passes.

    Where no gradient is wanted, of the forward pass alone.

    What is computed before the first block counts with it, and what comes behind the last with that.

    Args:
        model: on the inputs' device; its gradients are thrown away.
        blocks: called once each, in this order.
        inputs: of one micro-batch.
        clock: seconds.
    """
    device = str(tensors(inputs)[0].device.type)
    rows = [_once(model, blocks, inputs, device, clock) for _ in range(REPEATS + 1)][1:]
    model.zero_grad(set_to_none=True)
    return [median(row[k] for row in rows) for k in range(len(blocks))]


def _once(model: nn.Module, blocks: Sequence[nn.Module], inputs: Tree, device: str, clock: Callable[[], float]) -> list[float]:
    begun: dict[int, float] = {}  # block → when its forward pass begins
    ended: dict[int, float] = {}  # block → when its backward pass is over

    def now() -> float:
        cuda.synchronize(device)
        return clock()

    def note(k: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = next((t for t in tensors((args, kwargs)) if t.requires_grad), None)
        begun[k] = now()
        if given is not None:
            given.register_hook(lambda _: ended.__setitem__(k, now()))

    hooks = [
        block.register_forward_pre_hook(lambda _, args, kwargs, k=k: note(k, args, kwargs), with_kwargs=True)
        for k, block in enumerate(blocks)
    ]
    try:
        start = now()
        output = primary(call(model, inputs))
        if output.requires_grad:
            output.float().sum().backward()
        end = now()
    finally:
        for hook in hooks:
            hook.remove()
    last = len(blocks) - 1
    forward = [begun[k + 1] - begun[k] for k in range(last)] + [0.0]
    backward = [ended.get(k, end) - ended.get(k + 1, end) for k in range(last)] + [ended.get(last, end) - begun[last]]
    costs = [f + b for f, b in zip(forward, backward, strict=True)]
    costs[0] += begun[0] - start + end - ended.get(0, end)
    return costs


def cut_evenly(costs: Sequence[float], stages: int) -> list[int]:
    """The blocks that stages begin with, but for the first stage, so that the dearest stage is as cheap as can be.

    Example:
        >>> cut_evenly([4, 1, 1, 1, 1], 2), cut_evenly([1, 1, 1, 1], 4)
        ([1], [1, 2, 3])
    """
    count = len(costs)
    sums = [0.0]
    for cost in costs:
        sums.append(sums[-1] + cost)
    best = {(1, end): (sums[end], 0) for end in range(1, count + 1)}  # stages, blocks → cost of the dearest, last cut
    for parts in range(2, stages + 1):
        for end in range(parts, count + 1):
            ways = ((max(best[parts - 1, at][0], sums[end] - sums[at]), at) for at in range(parts - 1, end))
            best[parts, end] = min(ways)
    cuts, end = [], count
    for parts in range(stages, 1, -1):
        end = best[parts, end][1]
        cuts.append(end)
    return cuts[::-1]
