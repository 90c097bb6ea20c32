"""Settings of training that are kept only where they are measured to be faster."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from quadriga.core.errors import NotApplicable
from quadriga.core.setup import Setup

GAIN = 1.02  # in time per training step, below which a setting is not worth having


def faster(setup: Setup, what: str, **settings: Any) -> None:
    """Time training steps without and with some settings of the runtime slot, all others as the whole recipe ends in.

    The recipe's own end counts, since settings help one another: bfloat16 gains with channels-last what it loses alone. What
    is measured is decided once for a recipe. Without the service `pace` nothing is measured, and the setting is taken.

    Raises:
        NotApplicable: it is not faster, with the measured ratio.
    """
    pace = setup.context.pace
    if pace is None:
        return
    final = setup.context.runtime
    plain = {name: getattr(setup.runtime, name) for name in settings}
    arms = [replace(setup, runtime=replace(final, **values)) for values in (plain, settings)]

    def measure() -> float:
        without, with_it = pace(arms)
        return without / with_it

    gain = setup.context.decide(f"gain of {what}", measure)
    if gain < GAIN:
        reason = f"{what} is not faster here: a training step takes {1 / gain:.2f} of its time"
        raise NotApplicable(reason, 'leave it out, or set keep="always"')
