"""The process group: joined once, asked by everybody who has to act as one."""

from __future__ import annotations

import atexit
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from quadriga.core import world
from quadriga.core.errors import BadInput, NotApplicable

PATIENCE = timedelta(minutes=30)  # until a process that waits for the others gives up
_apart: ContextVar[bool] = ContextVar("apart", default=False)


def join(device: str = "cpu") -> None:
    """Meet the other processes that torchrun or srun started; a process alone makes a group of its own.

    Tensors on GPUs go through NCCL, those in main memory through Gloo.

    Raises:
        BadInput: the environment of torchrun or Slurm is incomplete.
    """
    if dist.is_initialized():
        return
    here = world.found()
    if here.by == "Slurm":
        os.environ.update(world.meeting_place(os.environ))
    backend = "gloo"
    if device == "cuda" or (torch.cuda.is_available() and dist.is_nccl_available()):
        torch.cuda.set_device(here.local % torch.cuda.device_count())
        backend = "cpu:gloo,cuda:nccl"
    alone = {} if here.by else {"store": dist.HashStore()}
    dist.init_process_group(backend, rank=here.rank, world_size=here.size, timeout=PATIENCE, **alone)
    atexit.register(leave)


def leave() -> None:
    """Leave the group, if one was joined."""
    if dist.is_initialized():
        dist.destroy_process_group()


@contextmanager
def apart() -> Iterator[None]:
    """What this process does inside, it does by itself: a plan for several is left out, and nobody waits."""
    token = _apart.set(True)
    try:
        yield
    finally:
        _apart.reset(token)


def joined() -> bool:
    """Whether this process is in a group."""
    return dist.is_available() and dist.is_initialized()


def together() -> bool:
    """Whether this process acts with others now."""
    return joined() and dist.get_world_size() > 1 and not _apart.get()


def is_apart() -> bool:
    """Whether this process is inside `apart`."""
    return _apart.get()


def rank() -> int:
    """Of this process, 0 where it is alone."""
    return dist.get_rank() if joined() else 0


def same(compute: Callable[[], Any]) -> Any:
    """What the first process computes, apart from the others, in all processes: plain data.

    Raises:
        NotApplicable, BadInput: what `compute` raised there, in all of them; RuntimeError for other errors.

    Example:
        >>> same(lambda: {"widths": [3, 4]})
        {'widths': [3, 4]}
    """
    if not together():
        return compute()
    told = [_computed(compute)] if rank() == 0 else [""]
    dist.broadcast_object_list(told, src=0)
    kind, value = json.loads(told[0])
    if kind == "value":
        return value
    errors: dict[str, Callable[..., Exception]] = {"NotApplicable": NotApplicable, "BadInput": BadInput}
    raise errors.get(kind, RuntimeError)(*value)


def _computed(compute: Callable[[], Any]) -> str:
    try:
        with apart():
            return json.dumps(["value", compute()])
    except NotApplicable as error:
        return json.dumps(["NotApplicable", [error.reason, error.remedy]])
    except BadInput as error:
        return json.dumps(["BadInput", [error.problem, error.remedy]])
    except Exception as error:  # the others must not wait for what will not come
        return json.dumps(["error", [f"{type(error).__name__}: {error}"]])


def gathered(value: Any) -> list[Any]:
    """The plain values of all processes, by rank, in all of them."""
    if not together():
        return [value]
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


def every(holds: bool) -> bool:
    """Whether it holds in all processes."""
    return all(gathered(bool(holds)))
