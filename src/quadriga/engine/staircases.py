"""Time layers of one kind at many widths, in one runtime and precision: the staircase that a granule is read off."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Collection, Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

from quadriga.core.granules import HALVES, LEASTS, WIDTHS
from quadriga.core.slots import RuntimeSpec
from quadriga.engine.timing import as_it_was, in_turn
from quadriga.runtime._branches import Branch, calls

MAP, FIXED, CHAIN, GROUPS = 28, 64, 4, 2  # rows of a map, channels of the other side, layers of a chain, groups
TOKENS, FEATURES, STEPS = 64, 256, 16  # rows of a matrix and its other side; of a sequence
ROUNDS, BLOCK, REST = 15, 0.002, 0.0005  # of a width, and seconds of one block and of the pause before it
Times = dict[int, float]


def staircases(
    sides: Collection[str],
    spec: RuntimeSpec,
    *,
    widths: Iterable[int] | None = None,
    rounds: int = ROUNDS,
    clock: Callable[[], float] = time.process_time,
) -> dict[str, Times]:
    """Seconds of a layer at each width, for one example on one thread; the widths of a side are timed in turn.

    A call that computes next to nothing is timed with them, and its seconds are taken off: a network pays them once.

    Args:
        sides: as in `core.granules.SIDES` and `LEASTS`.
        spec: the runtime and its precision.
        widths: channels, or features; by default those that a granule, or a least width, is read off.
        rounds: blocks of each width.
        clock: seconds; of the processor, since other processes' work is not to look like a step.

    Raises:
        NotApplicable: the runtime does not take these layers, or builds each by itself.
    """
    steps = {side: sorted({*(widths or (HALVES if side in LEASTS else WIDTHS))}) for side in sides}
    branches = [branch(side, width) for side in sides for width in steps[side]]
    folder = Path(tempfile.mkdtemp(prefix="quadriga-granules-"))
    try:
        with as_it_was(branches), torch.inference_mode():
            idle, *made = calls([_idle(), *branches], spec, folder)
            rows = {side: [idle, *(made.pop(0) for _ in steps[side])] for side in sides}
            found = {s: in_turn(row, rounds=rounds, seconds=BLOCK, rest=REST, clock=clock) for s, row in rows.items()}
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return {side: _above(first, dict(zip(steps[side], rest, strict=True))) for side, (first, *rest) in found.items()}


def _above(idle: float, times: Times) -> Times:
    """Seconds without those of an idle call; a layer that takes hardly longer is left at a tenth of what was measured."""
    return {width: max(seconds - idle, 0.1 * seconds) for width, seconds in times.items()}


def branch(side: str, width: int) -> Branch:
    """A layer with that width on that side, its activation, and two examples that it reads.

    The other side keeps its width. Where both have one, which is so for depthwise layers and for the least width, there is a
    chain of layers. The width of grouped convolutions is that of one group.
    """
    draw = torch.Generator().manual_seed(0)
    what, _, end = side.partition("_")
    if end == "least" and what != "depthwise":
        made = [_MAKE[what](width, width, draw) for _ in range(CHAIN)]
        model, x = nn.Sequential(*(layer for layer, _ in made)), made[0][1]
    else:
        other = FEATURES if what == "linear" else FIXED
        model, x = _MAKE[what](*((width, other) if end == "in" else (other, width)), draw)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(0.1 * torch.randn(p.shape, generator=draw))
    return model.eval().requires_grad_(False), x


def _idle() -> Branch:
    """Static int8 acts on products alone, so there is one."""
    return nn.Conv2d(8, 8, 1).eval().requires_grad_(False), torch.rand(2, 8, 1, 1)


def _image(channels: int, draw: torch.Generator) -> Tensor:
    return torch.rand(2, channels, MAP, MAP, generator=draw)


def _dense(inside: int, outside: int, draw: torch.Generator) -> Branch:
    return nn.Sequential(nn.Conv2d(inside, outside, 3, padding=1), nn.ReLU()), _image(inside, draw)


def _pointwise(inside: int, outside: int, draw: torch.Generator) -> Branch:
    return nn.Sequential(nn.Conv2d(inside, outside, 1), nn.ReLU()), _image(inside, draw)


def _depthwise(inside: int, outside: int, draw: torch.Generator) -> Branch:
    layers = [m for _ in range(CHAIN) for m in (nn.Conv2d(outside, outside, 3, padding=1, groups=outside), nn.ReLU())]
    return nn.Sequential(*layers), _image(outside, draw)


def _grouped(inside: int, outside: int, draw: torch.Generator) -> Branch:
    layer = nn.Conv2d(GROUPS * inside, GROUPS * outside, 3, padding=1, groups=GROUPS)
    return nn.Sequential(layer, nn.ReLU()), _image(GROUPS * inside, draw)


def _linear(inside: int, outside: int, draw: torch.Generator) -> Branch:
    return nn.Sequential(nn.Linear(inside, outside), nn.ReLU()), torch.rand(2, TOKENS, inside, generator=draw)


def _recurrent(inside: int, outside: int, draw: torch.Generator) -> Branch:
    return nn.LSTM(inside, outside, batch_first=True), torch.rand(2, STEPS, inside, generator=draw)


_MAKE: dict[str, Callable[[int, int, torch.Generator], Branch]] = {
    "dense": _dense, "pointwise": _pointwise, "depthwise": _depthwise, "grouped": _grouped, "linear": _linear,
    "recurrent": _recurrent,
}  # fmt: skip
