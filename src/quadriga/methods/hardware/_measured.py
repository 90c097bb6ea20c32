"""What is kept only where it is measured to be faster: settings of training, and half precision on this processor."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import torch

from quadriga.core import cuda
from quadriga.core.errors import NotApplicable, NotWorthwhile
from quadriga.core.half import HALF
from quadriga.core.setup import Setup
from quadriga.methods.hardware._needs import ends_on

SLOW = 0.9  # of the speed of float32 products, below which there are no native ones
GAIN = 1.02  # in time per training step, below which a setting is not worth having


def faster(setup: Setup, what: str, **settings: Any) -> None:
    """Time training steps without and with some settings of the runtime slot, all others as the whole recipe ends in.

    The recipe's own end counts, since settings help one another: bfloat16 gains with channels-last what it loses alone. What
    is measured is decided once for a recipe. Without the service `pace` nothing is measured, and the setting is taken.

    Raises:
        NotWorthwhile: it is not faster, with the measured ratio.
    """
    pace = setup.context.pace
    if pace is None:
        return
    if settings.get("autocast") in HALF:  # without such products a few steps would take minutes
        try:
            native(settings["autocast"], ends_on(setup))
        except NotApplicable as error:
            raise NotWorthwhile(error.reason, error.remedy) from error
    final = replace(setup.context.runtime, device=ends_on(setup))
    plain = {name: getattr(setup.runtime, name) for name in settings}
    arms = [replace(setup, runtime=replace(final, **values)) for values in (plain, settings)]

    def measure() -> float:
        without, with_it = pace(arms)
        return without / with_it

    gain = setup.context.decide(f"gain of {what}", measure)
    if gain < GAIN:
        reason = f"{what} is not faster here: a training step takes {1 / gain:.2f} of its time"
        raise NotWorthwhile(reason, 'leave it out, or set keep="always"')


def product_speed(dtype: torch.dtype, clock: Callable[[], float] = time.process_time, size: int = 256) -> float:
    """How many times faster than in float32 this processor multiplies matrices [size, size]: the best of five each."""
    times = {torch.float32: float("inf"), dtype: float("inf")}
    for _ in range(6):  # the first loads kernels
        for kind in times:
            a = torch.ones(size, size, dtype=kind)
            start = clock()
            torch.mm(a, a)
            times[kind] = min(times[kind], clock() - start)
    return times[torch.float32] / max(times[dtype], 1e-9)


speed_here = cache(product_speed)


def native(kind: str, device: str) -> None:
    """Refuse half precision where this processor multiplies in it more slowly than in float32: it has no such products.

    Of a GPU its capability says so: bfloat16 from 8.0 on, float16 from 7.0.

    Raises:
        NotApplicable: with the measured ratio, or the capability.
    """
    row = cuda.found().used if device != "cpu" else None
    if row is not None and not row[kind]:
        raise NotApplicable(f"{row['name']} (capability {row['capability']}) has no {kind} products", "keep float32")
    if device == "cpu" and (speed := speed_here(HALF[kind])) < SLOW:
        reason = f"this processor multiplies {kind} at {speed:.2g} of float32's speed"
        raise NotApplicable(reason, "keep float32, or end in a runtime that only stores the weights so")
