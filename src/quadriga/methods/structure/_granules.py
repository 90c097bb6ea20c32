"""`round_to`: the granules in which widths are cut, given or found for the runtime that the recipe ends in."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from math import gcd, lcm
from typing import Literal, NamedTuple

from torch import nn

from quadriga.core.axes import Group, Member
from quadriga.core.axes.importance import rounded
from quadriga.core.errors import BadInput, did_you_mean
from quadriga.core.granules import LEASTS, SIDES, Counts, defaults, kind
from quadriga.core.setup import Setup

RoundTo = int | Literal["auto"] | Mapping[str, int]


class Grain(NamedTuple):
    """The widths that a group of units may have: multiples of a step, halves of the step down to a least one, and its own.

    Example:
        >>> Grain(16, 8).widths(40), Grain(8, 8).widths(6), Grain(16, 4).widths(12)
        ([8, 16, 32, 40], [6], [4, 8, 12])
    """

    step: int = 1
    least: int = 1

    def widths(self, size: int) -> list[int]:
        """Ascending, up to the size that there is."""
        halves = [w for w in self._halves() if w < size]
        return sorted({*halves, *range(self.step, size, self.step), size})

    def near(self, width: float, size: int) -> int:
        """The nearest of them.

        Example:
            >>> Grain(8, 8).near(11, 16), Grain(8, 8).near(13, 16), Grain(1, 1).near(0.2, 6)
            (8, 16, 1)
        """
        if self.step == 1:
            return rounded(width, size)
        return min(self.widths(size), key=lambda w: (abs(w - width), -w))

    def up(self, width: int) -> int:
        """The next of them, where the size does not matter.

        Example:
            >>> Grain(8, 8).up(9), Grain(16, 4).up(3), Grain(16, 4).up(16)
            (16, 4, 16)
        """
        whole = -(-width // self.step) * self.step
        return min([w for w in self._halves() if w >= width], default=whole)

    def _halves(self) -> list[int]:
        found, width = list[int](), self.step
        while width % 2 == 0 and width // 2 >= self.least:
            width //= 2
            found.append(width)
        return found

    @classmethod
    def joined(cls, grains: Iterable[Grain]) -> Grain:
        """One that suits all.

        Example:
            >>> Grain.joined([Grain(16, 8), Grain(8, 8), Grain()])
            Grain(step=16, least=8)
        """
        all_ = list(grains)
        step = lcm(*(g.step for g in all_))
        return cls(step, min(step, lcm(*(g.least for g in all_))))


def check_round_to(name: str, value: RoundTo) -> None:
    """Raise BadInput unless it is "auto", a granule, or granules of known sides."""
    if isinstance(value, str):
        return
    given = value if isinstance(value, Mapping) else {"": value}
    for side, granule in given.items():
        if side and side not in (*SIDES, *LEASTS):
            raise BadInput(f'{name}.round_to names "{side}"', did_you_mean(side, [*SIDES, *LEASTS]))
        if not isinstance(granule, int) or isinstance(granule, bool) or granule < 1:
            raise BadInput(f"{name}.round_to is {value!r}", 'give at least 1, or "auto"')


def granules(round_to: RoundTo, sides: Collection[str], setup: Setup) -> dict[str, Grain]:
    """The granule of each side: what `round_to` says, or what is right for the runtime that the recipe ends in.

    "auto" is decided once: another process, or a rebuild on another machine, takes the same numbers.

    Args:
        round_to: a number for all; numbers by side, 1 where one is missing; or "auto".
        sides: as in `core.granules.SIDES`.
        setup: the recipe's runtime, and the service that measures.
    """
    if isinstance(round_to, int):
        return dict.fromkeys(sides, Grain(round_to, round_to))
    if isinstance(round_to, Mapping):
        return _grains(sides, round_to)
    names = sorted({*sides, *(one for side in sides if (one := _least(side)))})
    if not names:
        return {}
    decided = setup.context.decide(f"granules of {', '.join(names)}", lambda: {"round_to": _measured(names, setup)})
    return _grains(sides, decided["round_to"])


def _least(side: str) -> str | None:
    name = f"{side.partition('_')[0]}_least"
    return name if name in LEASTS else None


def _grains(sides: Collection[str], known: Counts) -> dict[str, Grain]:
    steps = {side: known.get(side, 1) for side in sides}
    return {side: Grain(step, min(step, known.get(_least(side) or side, step))) for side, step in steps.items()}


def _measured(names: list[str], setup: Setup) -> dict[str, int]:
    """Of a recipe that two runtimes execute, the granule that suits both."""
    final, ask = setup.context.runtime, setup.context.granules or defaults
    specs = [final, *([final.alone] if final.alone is not None else [])]
    answers = [ask(names, spec) for spec in specs]
    return {name: lcm(*(answer[name] for answer in answers)) for name in names}


def of_groups(round_to: RoundTo, model: nn.Module, groups: Iterable[Group], setup: Setup) -> dict[str, Grain]:
    """For each width, by its name, the granule of its units: that of all layers which write or read it.

    Args:
        round_to: as the method has it.
        model: that the groups were traced from.
        groups: the widths.
        setup: see `granules`.
    """
    ends = {group.name: sorted(set(_ends(model, group))) for group in groups}
    if isinstance(round_to, int):  # so many units, whatever they are made of
        return dict.fromkeys(ends, Grain(round_to, round_to))
    known = granules(round_to, {side for found in ends.values() for side, _ in found}, setup)
    return {name: Grain.joined(_units(known[side], each) for side, each in found) for name, found in ends.items()}


def _ends(model: nn.Module, group: Group) -> Iterator[tuple[str, int]]:
    """(side, positions of one unit) for each layer that writes or reads a width."""
    for member in group.members:
        for name in member.names if member.producer or member.reader else ():
            path, _, tensor = name.rpartition(".")
            layer = model.get_submodule(path)
            if what := kind(layer, member.tensor):
                yield _side(what, tensor, member), _positions(what, member)


def _side(what: str, tensor: str, member: Member) -> str:
    if what == "depthwise":
        return what
    if what == "recurrent":
        return "recurrent_in" if tensor.startswith("weight_ih") and member.dim == 1 else "recurrent_out"
    return f"{what}_out" if member.producer else f"{what}_in"


def _positions(what: str, member: Member) -> int:
    """Channels of a unit: 25 where a map of 5×5 is flattened, those of a head. Gates and groups hold one of each unit."""
    if what in ("recurrent", "depthwise", "grouped"):
        return 1
    units = member.units[member.units >= 0]
    return len(units) // len(units.unique())


def _units(grain: Grain, positions: int) -> Grain:
    """Units whose positions make whole granules.

    Example:
        >>> _units(Grain(16, 8), 1), _units(Grain(16, 16), 25).step, _units(Grain(16, 16), 4).step
        (Grain(step=16, least=8), 16, 4)
    """
    return Grain(*(width // gcd(width, positions) for width in grain))


def layer_sides(layer: nn.Module, *ends: Literal["in", "out"]) -> list[str]:
    """Sides of a layer that a method is about to make.

    Example:
        >>> layer_sides(nn.Conv2d(4, 8, 3), "in", "out"), layer_sides(nn.Linear(4, 8), "out")
        (['dense_in', 'dense_out'], ['linear_out'])
    """
    what = kind(layer, layer.weight)  # type: ignore[arg-type]
    return [what if what == "depthwise" else f"{what}_{end}" for end in ends]
