"""Time layers of one kind at many widths, in one runtime and precision: the staircase that a granule is read off."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Collection, Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

from quadriga.core.granules import WIDTHS
from quadriga.core.slots import RuntimeSpec
from quadriga.engine.timing import as_it_was, in_turn, one_registry
from quadriga.runtime._branches import Branch, calls

MAP, TOKENS, FIXED, CHAIN, GROUPS = 14, 32, 64, 4, 2  # positions, rows, the other side's channels, depthwise layers, groups
ROUNDS, BLOCK, REST = 9, 0.004, 0.0005  # of a width, and seconds of one block and of the pause before it
Times = dict[int, float]


def staircases(
    sides: Collection[str],
    spec: RuntimeSpec,
    *,
    widths: Iterable[int] = WIDTHS,
    rounds: int = ROUNDS,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Times]:
    """Seconds of a layer at each width, for one example on one thread; the widths of a side are timed in turn.

    Args:
        sides: as in `core.granules.SIDES`.
        spec: the runtime and its precision.
        widths: channels, or features.
        rounds: blocks of each width.
        clock: seconds.

    Raises:
        NotApplicable: the runtime does not take these layers, or builds each by itself.
    """
    steps = sorted(set(widths))
    branches = [branch(side, width) for side in sides for width in steps]
    folder = Path(tempfile.mkdtemp(prefix="quadriga-granules-"))
    try:
        with as_it_was([(model, x) for model, x in branches]), one_registry(), torch.inference_mode():
            made = calls(branches, spec, folder)
            rows = [made[k : k + len(steps)] for k in range(0, len(made), len(steps))]
            found = [in_turn(row, rounds=rounds, seconds=BLOCK, rest=REST, clock=clock) for row in rows]
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return {side: dict(zip(steps, seconds, strict=True)) for side, seconds in zip(sides, found, strict=True)}


def branch(side: str, width: int) -> Branch:
    """A layer with that width on that side, its activation, and two examples that it reads.

    The other side keeps its width. Depthwise layers, which have one width and are cheap, come as a chain. The width of grouped
    convolutions is that of one group.
    """
    draw = torch.Generator().manual_seed(0)
    what, _, end = side.partition("_")
    inside, outside = (width, FIXED) if end == "in" else (FIXED, width)
    model, x = _MAKE[what](inside, outside, draw)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(0.1 * torch.randn(p.shape, generator=draw))
    return model.eval().requires_grad_(False), x


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


class _Recurrent(nn.Module):
    def __init__(self, inside: int, outside: int) -> None:
        super().__init__()
        self.lstm = nn.LSTM(inside, outside, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.lstm(x)[0]  # type: ignore[no-any-return]


def _recurrent(inside: int, outside: int, draw: torch.Generator) -> Branch:
    return _Recurrent(inside, outside), torch.rand(2, TOKENS, inside, generator=draw)


_MAKE: dict[str, Callable[[int, int, torch.Generator], Branch]] = {
    "dense": _dense, "pointwise": _pointwise, "depthwise": _depthwise, "grouped": _grouped, "linear": _linear,
    "recurrent": _recurrent,
}  # fmt: skip
