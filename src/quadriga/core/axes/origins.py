"""The parameters behind a weight that an operator gets: turned, scaled, standardized, or as they are."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, fx

from quadriga.core.axes.nodes import TURNED, flat, op_name

if TYPE_CHECKING:
    from quadriga.core.axes.walk import Walk


def origins(walk: Walk, node: Any, dim: int) -> list[tuple[int, int]]:
    """(id of a weight, its dimension) that a dimension of what an operator gets is; [] of what inputs decide."""
    if not isinstance(node, fx.Node):
        return []
    if (state := walk.state(node)) is not None:
        return [(state, dim)]
    if op_name(node) in TURNED and len(walk.shape(node)) == 2:
        return origins(walk, node.args[0], 1 - dim)
    axis = walk.axes(node)[dim]
    if not isinstance(axis, Tensor):
        return []
    roots = walk.units.roots(axis)
    matrices = [(s, d, own) for s in sources(walk, node) if len(walk.states[s]) > 1 for d, own in enumerate(walk.states[s])]
    return [(s, d) for s, d, own in matrices if isinstance(own, Tensor) and walk.units.roots(own) == roots]


def sources(walk: Walk, node: fx.Node) -> list[int]:
    """The states that a value is computed from; [] if inputs have a part in it."""
    found, seen, waiting = list[int](), {node}, [node]
    while waiting:
        one = waiting.pop()
        if (state := walk.state(one)) is not None:
            found.append(state)
        elif one.op == "placeholder" and walk.traced.states.get(one.name) is None:
            return []
        new = [n for n in flat([one.args, one.kwargs]) if n not in seen]
        seen.update(new)
        waiting += new
    return found


def unscaled(walk: Walk, node: Any) -> fx.Node | None:
    """The weight itself, behind factors that are no weights of its shape; None where it is computed in another way.

    A factor that is computed from the weight, as a spectral norm is, makes it another way.
    """
    others = list[fx.Node]()
    while isinstance(node, fx.Node) and walk.state(node) is None:
        name, first = op_name(node), node.args[0] if node.args else None
        if name in TURNED and len(walk.shape(node)) == 2 and isinstance(first, fx.Node) and walk.state(first) is not None:
            break
        factors = [n for n in flat(node.args) if isinstance(n.meta.get("val"), Tensor)] if name in ("mul", "div") else []
        shaped = [n for n in factors if walk.shape(n) == walk.shape(node)]
        others += [n for n in factors if n not in shaped]
        node = shaped[0] if len(shaped) == 1 and (name == "mul" or shaped[0] is first) else None
    if not isinstance(node, fx.Node) or any({*sources(walk, node)} & {*sources(walk, n)} for n in others):
        return None
    return node
