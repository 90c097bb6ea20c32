"""Seconds per call of several models in one process, block by block in turn: for decisions inside a method, not for claims."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import geometric_mean, median
from typing import Any

import torch

from quadriga import runtime
from quadriga.core.batch import Batch, Tree, evaluating, resize, tensors
from quadriga.core.copies import copy_model
from quadriga.core.cuda import settle
from quadriga.core.products import products_kept
from quadriga.core.setup import Arm, Context
from quadriga.core.slots import RuntimeSpec
from quadriga.runtime._capture import describe

FEW, CAREFUL, ROUGH = 4, 41, 7  # few arms are whole networks whose ratio is wanted; more are a table, which is fitted
SLOW = 0.1  # seconds of a call that is a block by itself and needs no warm-up: a network's probe must not take a minute


def timed(arms: Sequence[Arm], spec: RuntimeSpec, context: Context, folder: Path) -> list[float]:
    """Realise every arm by the specification and time them in turn.

    Args:
        arms: a model and the inputs that it is called with, examples along dimension 0; the models are left as they are.
        spec: eager without quantization runs the live module; anything else is built as an artifact would be.
        context: gives the calibration batches for arms that take the workload's inputs; others are calibrated on their own.
        folder: for scrap, which is gone afterwards.

    Returns:
        median seconds per call of each arm.

    Raises:
        NotApplicable: an arm cannot be realised.
    """
    folder.mkdir(parents=True, exist_ok=True)
    scrap = Path(tempfile.mkdtemp(prefix="timed-", dir=folder))
    try:
        with as_it_was(arms), torch.inference_mode():
            calls = [_call(arm, spec, context, scrap / str(k)) for k, arm in enumerate(arms)]
            return in_turn(calls, rounds=CAREFUL if len(arms) <= FEW else ROUGH)
    finally:
        shutil.rmtree(scrap, ignore_errors=True)


def _call(arm: Arm, spec: RuntimeSpec, context: Context, folder: Path) -> Callable[[], Any]:
    model, inputs = arm
    if spec.name == "eager" and spec.quant is None:
        own = copy_model(model)  # a table that it keeps from its first call must not be of inference mode
        run = runtime.prepare(own, spec)
    else:
        with torch.inference_mode(False):
            built = runtime.build(model, spec, _seen(inputs, context), folder, batches=(len(tensors(inputs)[0]),))
        run = built.run()
    return lambda: run(inputs)


def _seen(inputs: Tree, context: Context) -> Context:
    """The context that an arm is captured in: the workload's own, or for a layer alone, the inputs that it gets here."""
    mine, whole = tensors(inputs), tensors(context.example)
    alike = [(t.shape[1:], t.dtype) for t in mine] == [(t.shape[1:], t.dtype) for t in whole]
    if alike and describe(inputs) == describe(context.example):
        return context
    example = resize(inputs, max(2, len(mine[0])))  # a batch of one would be captured as a constant
    return replace(context, example=example, calibration=(Batch(example, None, torch.arange(len(tensors(example)[0]))),))


@contextmanager
def as_it_was(arms: Sequence[Arm]) -> Iterator[None]:
    """Afterwards models have their modes back, and the process its threads and matmul precision."""
    threads = torch.get_num_threads()
    with products_kept(), ExitStack() as stack:
        for model, _ in arms:
            stack.enter_context(evaluating(model))
        try:
            yield
        finally:
            torch.set_num_threads(threads)


def in_turn(
    calls: Sequence[Callable[[], Any]],
    *,
    rounds: int,
    seconds: float = 0.02,
    rest: float = 0.003,
    clock: Callable[[], float] = time.perf_counter,
) -> list[float]:
    """Median seconds of each call: A B C, then C B A, and so on, so that the machine's slow changes fall on all alike.

    Args:
        calls: what to time.
        rounds: blocks per call.
        seconds: a block has as many calls as last this long, at least two, after one in ten that is not timed; a call of
            `SLOW` seconds or more is a block by itself.
        rest: seconds before a block, in which the threads of the arm before fall asleep.
        clock: in seconds.

    Returns:
        for each call the median over rounds of its block's median over the round's geometric mean, times the median of
        these means: what slows a whole round down, such as a neighbour's work, does not change the ratios.
    """
    counts = [_count(call, seconds, clock) for call in calls]
    blocks: list[list[float]] = [[] for _ in calls]
    for number in range(rounds):
        order = range(len(calls)) if number % 2 == 0 else range(len(calls) - 1, -1, -1)
        for k in order:
            time.sleep(rest)
            blocks[k].append(_block(calls[k], counts[k], clock))
    means = [geometric_mean(row) for row in zip(*blocks, strict=True)]
    return [median(t / mean for t, mean in zip(times, means, strict=True)) * median(means) for times in blocks]


def _count(call: Callable[[], Any], seconds: float, clock: Callable[[], float]) -> int:
    settle(call())  # the first may compile
    last = _timed(call, clock)
    return 1 if last >= SLOW else max(2, min(1000, int(seconds / max(_block(call, 2, clock), 1e-9))))


def _block(call: Callable[[], Any], count: int, clock: Callable[[], float]) -> float:
    for _ in range(1 + count // 10 if count > 1 else 0):
        settle(call())
    return median(_timed(call, clock) for _ in range(count))


def _timed(call: Callable[[], Any], clock: Callable[[], float]) -> float:
    before = clock()
    settle(call())
    return clock() - before
