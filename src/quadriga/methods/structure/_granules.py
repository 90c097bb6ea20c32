"""`round_to`: the granules in which widths are cut, given or found for the runtime that the recipe ends in."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from math import gcd, lcm
from typing import Literal

from torch import nn

from quadriga.core.axes import Group, Member
from quadriga.core.errors import BadInput, did_you_mean
from quadriga.core.granules import SIDES, Counts, defaults, kind
from quadriga.core.setup import Setup

RoundTo = int | Literal["auto"] | Mapping[str, int]


def check_round_to(name: str, value: RoundTo) -> None:
    """Raise BadInput unless it is "auto", a granule, or granules of known sides."""
    if isinstance(value, str):
        return
    given = value if isinstance(value, Mapping) else {"": value}
    for side, granule in given.items():
        if side and side not in SIDES:
            raise BadInput(f'{name}.round_to names "{side}"', did_you_mean(side, SIDES))
        if not isinstance(granule, int) or isinstance(granule, bool) or granule < 1:
            raise BadInput(f"{name}.round_to is {value!r}", 'give at least 1, or "auto"')


def granules(round_to: RoundTo, sides: Collection[str], setup: Setup) -> Counts:
    """The granule of each side: what `round_to` says, or what is right for the runtime that the recipe ends in.

    "auto" is decided once: another process, or a rebuild on another machine, takes the same numbers.

    Args:
        round_to: a number for all; numbers by side, 1 where one is missing; or "auto".
        sides: as in `core.granules.SIDES`.
        setup: the recipe's runtime, and the service that measures.
    """
    if isinstance(round_to, int):
        return dict.fromkeys(sides, round_to)
    if isinstance(round_to, Mapping):
        return {side: round_to.get(side, 1) for side in sides}
    names = sorted(sides)
    if not names:
        return {}
    decided = setup.context.decide(f"granules of {', '.join(names)}", lambda: {"round_to": _measured(names, setup)})
    return dict(decided["round_to"])


def _measured(sides: list[str], setup: Setup) -> dict[str, int]:
    """Of a recipe that two runtimes execute, the granule that suits both."""
    final, ask = setup.context.runtime, setup.context.granules or defaults
    specs = [final, *([final.alone] if final.alone is not None else [])]
    answers = [ask(sides, spec) for spec in specs]
    return {side: lcm(*(answer[side] for answer in answers)) for side in sides}


def of_groups(round_to: RoundTo, model: nn.Module, groups: Iterable[Group], setup: Setup) -> dict[str, int]:
    """For each width, by its name, the granule of its units: that of all layers which write or read it.

    Args:
        round_to: as the method has it.
        model: that the groups were traced from.
        groups: the widths.
        setup: see `granules`.
    """
    ends = {group.name: sorted(set(_ends(model, group))) for group in groups}
    known = granules(round_to, {side for found in ends.values() for side, _ in found}, setup)
    if isinstance(round_to, int):  # so many units, whatever they are made of
        return dict.fromkeys(ends, round_to)
    return {name: lcm(*(_units(known[side], each) for side, each in found)) for name, found in ends.items()}


def _ends(model: nn.Module, group: Group) -> Iterator[tuple[str, int]]:
    """(side, positions of one unit) for each layer that writes or reads a width."""
    for member in group.members:
        for name in member.names if member.producer or member.reader else ():
            path, _, tensor = name.rpartition(".")
            layer = model.get_submodule(path)
            if what := kind(layer, member.tensor):
                yield _side(what, tensor, member), _positions(what, layer, member)


def _side(what: str, tensor: str, member: Member) -> str:
    if what == "depthwise":
        return what
    if what == "recurrent":
        return "recurrent_in" if tensor.startswith("weight_ih") and member.dim == 1 else "recurrent_out"
    return f"{what}_out" if member.producer else f"{what}_in"


def _positions(what: str, layer: nn.Module, member: Member) -> int:
    """Channels of a unit: 25 where a map of 5×5 is flattened, those of a head. Gates and groups hold one of each unit."""
    if what in ("recurrent", "depthwise", "grouped"):
        return 1
    units = member.units[member.units >= 0]
    return len(units) // len(units.unique())


def _units(granule: int, positions: int) -> int:
    """Units whose positions make whole granules.

    Example:
        >>> _units(16, 1), _units(16, 25), _units(16, 4), _units(16, 32)
        (16, 16, 4, 1)
    """
    return granule // gcd(granule, positions)


def layer_sides(layer: nn.Module, *ends: Literal["in", "out"]) -> list[str]:
    """Sides of a layer that a method is about to make.

    Example:
        >>> layer_sides(nn.Conv2d(4, 8, 3), "in", "out"), layer_sides(nn.Linear(4, 8), "out")
        (['dense_in', 'dense_out'], ['linear_out'])
    """
    what = kind(layer, layer.weight)  # type: ignore[arg-type]
    return [what if what == "depthwise" else f"{what}_{end}" for end in ends]


def up(width: int, granule: int) -> int:
    """The next multiple, the width itself if it is one.

    Example:
        >>> up(9, 8), up(16, 8), up(3, 1)
        (16, 16, 3)
    """
    return -(-width // granule) * granule
