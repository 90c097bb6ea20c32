"""What a rank sends, counted where PyTorch dispatches collectives; and the memory of its tensors."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Traffic(TorchDispatchMode):
    """Counts the bytes that this rank sends, by kind of collective, as a ring of the ranks would send them.

    Of n ranks and a tensor of s bytes: an all-reduce sends 2 (n - 1) / n · s, an all-gather and a reduce-scatter
    (n - 1) / n · s of the whole tensor, a broadcast or a message s.

    Attributes:
        sent: kind → bytes.
    """

    def __init__(self) -> None:
        super().__init__()
        self.sent: dict[str, float] = defaultdict(float)

    def __torch_dispatch__(
        self, op: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        out = op(*args, **(kwargs or {}))
        space, _, name = op.name().partition("::")
        if space in ("c10d", "_c10d_functional"):
            kind = next((k for k in SHARES if k in name.replace("_", "")), "")
            if kind:
                ranks = _ranks(args, kwargs or {})
                whole = max(_bytes(args), _bytes(out)) if kind in ("allgather", "reducescatter") else _bytes(args[:1])
                self.sent[kind] += SHARES[kind](ranks) * whole
        return out

    @property
    def total(self) -> int:
        """Bytes of all kinds."""
        return round(sum(self.sent.values()))


SHARES: dict[str, Any] = {
    "allreduce": lambda n: 2 * (n - 1) / n,
    "allgather": lambda n: (n - 1) / n,
    "reducescatter": lambda n: (n - 1) / n,
    "alltoall": lambda n: (n - 1) / n,
    "broadcast": lambda n: float(n > 1),
    "send": lambda n: 1.0,
}


def _bytes(tree: Any) -> int:
    """Of the largest of the tensors of a tree that stand for one another, or of all in a list."""
    sizes = [sum(t.numel() * t.element_size() for t in tree_leaves(part) if isinstance(t, Tensor))
             for part in (tree if isinstance(tree, tuple) else (tree,))]  # fmt: skip
    return max(sizes, default=0)


def _ranks(args: Any, kwargs: Mapping[str, Any]) -> int:
    """Of the group that a collective was called with: a process group, or its name."""
    for leaf in tree_leaves((args, dict(kwargs))):
        if isinstance(leaf, dist.ProcessGroup):
            return leaf.size()
        if isinstance(leaf, torch.ScriptObject) and "ProcessGroup" in str(leaf._type()):
            return dist.ProcessGroup.unbox(leaf).size()
        if isinstance(leaf, str) and leaf.isdecimal():
            return dist.distributed_c10d._resolve_process_group(leaf).size()
    return dist.get_world_size()


def peak_added(step: Callable[[], object]) -> int:
    """The most bytes of tensors that a step holds at once, beyond what was there before it.

    On the CPU by PyTorch's profiler, which sees every allocation; on a GPU by the allocator's own count.
    """
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    kineto: Any = profile.profiler
    moves = sorted((e.start_ns(), e.nbytes()) for e in kineto.kineto_results.events() if e.name() == "[memory]")
    return max(accumulate(size for _, size in moves), default=0)
