"""Setups to try methods on, and a fingerprint of what they must leave alone."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from quadriga.core.setup import OptimizerSlot, Setup
from quadriga.core.workload import Workload
from quadriga.testing.workloads import TINY
from quadriga.train.gradients import mean_gradients

MakeSetup = Callable[[], Setup]


def make_setups(workloads: dict[str, Callable[..., Workload]] | None = None) -> dict[str, MakeSetup]:
    """Name → a function that builds a fresh setup: each tiny workload untrained, and as a trained one.

    The trained ones have a teacher, the gradient service and an optimizer with weight decay, so that whatever needs
    one of these finds it.
    """
    made: dict[str, MakeSetup] = {}
    for name, build in (workloads or TINY).items():
        made[name] = partial(fresh_setup, build)
        made[f"{name}/trained"] = partial(trained_setup, build)
    return made


def fresh_setup(build: Callable[..., Workload]) -> Setup:
    """A setup as the first method of a recipe finds it."""
    return Setup.of(build(), seed=0)


def trained_setup(build: Callable[..., Workload]) -> Setup:
    """A setup as a method finds it late in a recipe."""
    workload = build(trained=True)
    model = workload.build(0)
    teacher = deepcopy(model).eval().requires_grad_(False)
    batches = [workload.calibration_source.batch(torch.arange(16))]
    setup = Setup.of(workload, model=model, teacher=teacher)
    context = replace(setup.context, gradients=lambda m: mean_gradients(m, setup.training.loss, batches))
    return replace(setup, context=context, optimizer=OptimizerSlot(decaying_sgd))


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
