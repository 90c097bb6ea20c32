"""Setups to try methods on, and a fingerprint of what they must leave alone."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from quadriga.core.copies import copy_model
from quadriga.core.setup import Arm, Setup
from quadriga.core.slots import OptimizerSlot, RuntimeSpec
from quadriga.core.workload import Workload
from quadriga.measure.flops import flops
from quadriga.measure.quality import score
from quadriga.testing.workloads import TINY
from quadriga.train.gradients import fisher_diagonal, mean_gradients

MakeSetup = Callable[[], Setup]
DECIDED: dict[Callable[..., Workload], dict[str, str]] = {}  # what trained setups decided, as JSON


def make_setups(workloads: dict[str, Callable[..., Workload]] | None = None) -> dict[str, MakeSetup]:
    """Name → a function that builds a fresh setup: each tiny workload untrained, and as a trained one.

    The trained ones have a teacher, the gradient service, quality on val, a clock (`fake_time`) and an optimizer with weight
    decay, so that whatever needs one of these finds it. What is decided by measurement is decided once in a process.
    """
    made: dict[str, MakeSetup] = {}
    for name, build in (workloads or TINY).items():
        made[name] = partial(fresh_setup, build)
        made[f"{name}/trained"] = partial(trained_setup, build)
    return made


def fresh_setup(build: Callable[..., Workload]) -> Setup:
    """A setup as the first method of a recipe finds it; its networks are narrower than any granule."""
    return Setup.of(build(), seed=0, granules=unit_granules)


def trained_setup(build: Callable[..., Workload]) -> Setup:
    """A setup as a method finds it late in a recipe."""
    workload = build(trained=True)
    model = workload.build(0)
    teacher = copy_model(model).eval().requires_grad_(False)
    batches = [workload.calibration_source.batch(torch.arange(16))]
    known = DECIDED.setdefault(build, {})

    def decide(key: str, compute: Callable[[], Any]) -> Any:
        if key not in known:
            known[key] = json.dumps(compute())
        return json.loads(known[key])

    setup = Setup.of(workload, model=model, teacher=teacher, time=fake_time, granules=unit_granules, decide=decide)
    loss = setup.training.loss
    context = replace(
        setup.context,
        evaluate=lambda m: score(m, workload.val, setup.context.metric).value,
        gradients=lambda m: mean_gradients(m, loss, batches),
        curvature=lambda m: fisher_diagonal(m, loss, batches, examples=8),
    )
    return replace(setup, context=context, optimizer=OptimizerSlot(decaying_sgd))


def fake_time(arms: Sequence[Arm], spec: RuntimeSpec) -> list[float]:
    """Seconds that nothing was timed for, in place of `Context.time`: 10 ns, 0.1 ns a FLOP, 2 ns a parameter."""
    return [1e-8 + 1e-10 * (flops(model, inputs, None) + 20 * _count(model)) for model, inputs in arms]


def unit_granules(sides: Collection[str], spec: RuntimeSpec) -> dict[str, int]:
    """In place of `Context.granules`: a machine on which every width is as good as its neighbour."""
    return dict.fromkeys(sides, 1)


def _count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def decaying_sgd(model: nn.Module) -> torch.optim.Optimizer:
    """SGD at 0.01 with weight decay."""
    return torch.optim.SGD(model.parameters(), lr=0.01, weight_decay=1e-3)


def fingerprint(model: nn.Module) -> str:
    """SHA-256 over names, shapes, types and bytes of all tensors, ties and training modes included."""
    digest = hashlib.sha256()

    def add(*parts: Any) -> None:
        digest.update(repr(parts).encode())

    for group in (model.named_parameters, model.named_buffers):
        for name, tensor in group(remove_duplicate=False):
            add(name, tuple(tensor.shape), tensor.dtype, tensor.requires_grad)
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    for name, module in model.named_modules():
        add(name, type(module).__qualname__, module.training)
    return digest.hexdigest()
