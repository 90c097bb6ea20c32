"""What makes two runs the same run: compared before a checkpoint is resumed."""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch

from quadriga.core.errors import BadInput
from quadriga.core.method import Method
from quadriga.core.setup import Setup
from quadriga.core.slots import Hook
from quadriga.train.factors import product
from quadriga.train.state import DRIVEN, model_tensors

POINTS = 16  # of progress, at which schedules are compared


def describe(function: Any, depth: int = 8) -> str:
    """A name for a callable that is equal in every process: of its code, and of the methods, numbers and functions
    that it was made with.

    Example:
        >>> describe(len)
        'len'
    """
    names = getattr(getattr(function, "__code__", None), "co_freevars", ())
    cells = list(inspect.getclosurevars(function).nonlocals.values()) if names and depth else []
    parts = [repr(v) for v in (getattr(function, "__self__", function), *cells) if isinstance(v, Method | int | float | str)]
    parts += [describe(v, depth - 1) for v in cells if callable(v) and hasattr(v, "__qualname__") and not isinstance(v, type)]
    name = getattr(function, "__qualname__", type(function).__qualname__)
    return f"{name}[{', '.join(parts)}]" if parts else name


def methods_of(make: Any) -> list[str]:
    """The methods, with all their fields, that a maker of hooks belongs to or was made with."""
    if isinstance(make, partial):
        return [repr(v) for v in (*make.args, *make.keywords.values()) if isinstance(v, Method)] + methods_of(make.func)
    bound = getattr(make, "__self__", None)
    cells = inspect.getclosurevars(make).nonlocals.values() if inspect.isfunction(make) else ()
    return [repr(v) for v in (bound, *cells) if isinstance(v, Method)]


def digest(value: Any) -> str:
    """Twelve hexadecimal digits of plain data."""
    return hashlib.sha256(repr(value).encode()).hexdigest()[:12]


def config_of(
    setup: Setup,
    optimizer: torch.optim.Optimizer,
    groups: Sequence[Mapping[str, Any]],
    hooks: Sequence[Hook],
    length: int,
) -> dict[str, Any]:
    """The facts of a train step that its checkpoints have to share, as JSON data; not how it is spread over processes.

    Args:
        groups: of the optimizer as it was made, with names for the parameters.
    """
    tensors, aliases = model_tensors(setup.model)
    training, runtime = setup.training, setup.runtime
    schedules = (*training.schedules, *setup.optimizer.schedules)
    options = runtime.parallel.options if runtime.parallel else {}
    return {
        "model": digest([(n, tuple(t.shape), str(t.dtype)) for n, t in tensors.items()] + sorted(aliases.items())),
        "examples": length,
        "batch size": [training.batch_size, training.micro],
        "loss": describe(training.loss),
        "transforms": [describe(t) for t in training.transforms],
        "schedules": digest([dataclasses.astuple(product(schedules, i / POINTS)) for i in range(POINTS + 1)]),
        "hooks": [type(h).__qualname__ for h in hooks] + [t for make in training.make_hooks for t in methods_of(make)],
        "optimizer": type(optimizer).__qualname__,
        "optimizer's values": digest([sorted((k, v) for k, v in g.items() if k in DRIVEN) for g in groups]),
        "optimizer's groups": digest([g["params"] for g in groups]),
        "runtime": [
            *(runtime.device, runtime.channels_last, runtime.matmul, runtime.compile, runtime.autocast),
            *([runtime.compile_mode] if runtime.compile_mode != "default" else []),
            *[kind for name in ("precision", "reduce") if (kind := options.get(name, "fp32")) != "fp32"],
        ],
        **({"asynchronous": [shared.workers, shared.scale]} if (shared := training.asynchronous) else {}),
    }


def machine(device: str = "cpu") -> dict[str, Any]:
    """What a resumption has to share with the run for bit-exactness, though it may go on without."""
    gpu = {} if device == "cpu" else {"gpu": torch.cuda.get_device_name()}
    return {"threads": torch.get_num_threads(), "torch": torch.__version__, **gpu}


def check_same(config: Mapping[str, Any], machine_now: Mapping[str, Any], extra: Mapping[str, Any], folder: str) -> list[str]:
    """Whether a checkpoint is of this run; returns what makes the resumption not bit-exact.

    Raises:
        BadInput: it is of another run, naming what differs.
    """
    for key, value in config.items():
        if extra["config"].get(key) != value:
            problem = f"{folder} holds the checkpoint of another run: {key} is {value!r}, there {extra['config'].get(key)!r}"
            raise BadInput(problem, "give another folder, or delete it to train again")
    was = extra["machine"]
    changed = [key for key, value in machine_now.items() if was.get(key, value) != value]
    return [f"not bit-exact: {key} is {machine_now[key]}, was {was[key]}" for key in changed]
