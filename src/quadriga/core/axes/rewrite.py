"""Constants in the user's forward, such as `view(-1, 400)`, rewritten to follow a changed width.

The literal stands in the user's file, which is not ours to edit. So the one module whose `forward` holds it is traced with
torch.fx, its submodules left whole, the constant exchanged, and the module gets a subclass of its own class with the new
forward: same object, same attributes, same state_dict, same call signature; every other module runs the user's code.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn

from quadriga.core.axes.derive import SPLITS, VIEWS, Derived, derive
from quadriga.core.axes.follow import follow, usual_arguments, with_forward
from quadriga.core.axes.patch import Patch
from quadriga.core.axes.trace import layer_of
from quadriga.core.axes.walk import op_name
from quadriga.core.errors import NotApplicable

if TYPE_CHECKING:
    from quadriga.core.axes.graph import AxisGraph

REMEDY = "derive it from the input's shape"
UNFLATTENED, PARTED = ("unflatten", torch.unflatten), ("split", "split_with_sizes", torch.split, torch.split_with_sizes)
KEYWORDS = {"size", "shape", "sizes", "split_size", "split_sizes", "split_size_or_sections"}
CALLS = ("view", "reshape", torch.reshape, *UNFLATTENED, *PARTED)  # as torch.fx names what holds sizes
Change = dict[int, tuple[int, int]]  # position in the sizes → (constant, new constant)


def settle(graph: AxisGraph, patch: Patch) -> None:
    """After weights changed, let the numbers follow that modules keep, check the interface, and if it broke, let the
    constants in the code follow too, and check again.

    Raises:
        NotApplicable: the interface cannot be kept.
    """
    known = derive(graph.traced, graph.walk) if graph.walk.numbers else Derived()
    for module, name, value in known.fields:
        patch.attr(module, name, value)
    try:
        _check(graph, known)
        return
    except NotApplicable as error:
        failure = error
    derived, trial = known if graph.walk.numbers else derive(graph.traced, graph.walk), Patch()
    if derived.constants:
        try:
            rewrite(graph, derived.constants, trial)
            _check(graph, derived)
            patch.then(trial)
            return
        except NotApplicable as error:
            trial.undo()
            failure = error
    try:
        rewrite(graph, derived.constants, trial, computed=derived.carried)
        _check(graph, derived)
        patch.then(trial)
    except NotApplicable:
        trial.undo()
        raise failure from None


def _check(graph: AxisGraph, derived: Derived) -> None:
    graph.check()
    if derived.parts:
        graph.confirm(derived, "parts of a changed width would not be equal any more")


def rewrite(
    graph: AxisGraph, constants: dict[fx.Node, Change], patch: Patch, computed: dict[fx.Node, Change] | None = None
) -> None:
    """Exchange the constants of these reshapes in the modules that hold them.

    Args:
        computed: of these, sizes that the code computes are exchanged too. `y.reshape(batch, time, width)` with the width
            of the residual stream no longer fits attention's output once one of the two has changed. A module that
            torch.fx cannot follow is left.

    Raises:
        NotApplicable: a module's forward cannot be followed by torch.fx; the reason names the line.
    """
    given, needed = {**(computed or {}), **constants}, {layer_of(node) for node in constants}
    if computed is not None:
        given = {node: {**computed.get(node, {}), **change} for node, change in given.items()}
    for path in dict.fromkeys(layer_of(node) for node in given):
        node = next(n for n in given if layer_of(n) == path)
        module, where = graph.model.get_submodule(path), graph.traced.where(node)
        try:
            changes = _per_call(graph.traced.graph, path, given, where)
            usual = usual_arguments(graph.model, module, graph.example)
            new, kept = _rewritten(module, usual, changes, where, computed is not None)
            for name, tensor in kept.items():
                patch.constant(module, name, tensor)
            patch.kind(module, with_forward(module, new))
        except NotApplicable:
            if path in needed:
                raise


def _per_call(graph: fx.Graph, path: str, constants: dict[fx.Node, Change], where: str) -> list[Change]:
    """The changes of the module's reshapes, in order; a module that is called often needs the same at each call."""
    calls: dict[str, list[Change]] = {}
    for node in graph.nodes:
        if node.op == "call_function" and op_name(node) in (*VIEWS, *SPLITS) and layer_of(node) == path:
            instance = next(reversed(node.meta["nn_module_stack"]))
            calls.setdefault(instance, []).append(constants.get(node, {}))
    lists = list(calls.values())
    if any(other != lists[0] for other in lists):
        raise NotApplicable(f"{where} is called several times and would need different constants")
    return lists[0]


def _rewritten(
    module: nn.Module, usual: Mapping[str, Any], changes: list[Change], where: str, computed: bool
) -> tuple[fx.Graph, dict[str, Tensor]]:
    try:
        graph, constants = follow(module, usual, where)
    except NotApplicable:
        raise
    except Exception as error:  # torch.fx raises many types
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise NotApplicable(f"the constant in {where} cannot be rewritten: {reason}", REMEDY) from error
    views = [n for n in graph.nodes if n.target in CALLS]
    if len(views) != len(changes):
        raise NotApplicable(f"the constant in {where} cannot be found in the forward", REMEDY)
    for view, change in zip(views, changes, strict=True):
        _exchange(view, change, where, computed)
    return graph, constants


def _exchange(view: fx.Node, change: Change, where: str, computed: bool) -> None:
    """Put other sizes into one call."""
    start = 2 if view.target in UNFLATTENED else 1
    for key in KEYWORDS & view.kwargs.keys():
        view.args, view.kwargs = _positional(view, key, start)
    given = view.args[start] if len(view.args) > start else ()
    several, end = isinstance(given, tuple | list), start + 1 if view.target in PARTED else None
    sizes: list[Any] = list(given) if several else list(view.args[start:end])  # type: ignore[arg-type]
    shape = len(sizes) == 1 and isinstance(sizes[0], fx.Node)
    for position, (old, new) in change.items():
        if shape and position > 0:
            continue  # `view(x.shape)` follows by itself
        if position >= len(sizes):
            raise NotApplicable(f"the constant {old} in {where} cannot be found", REMEDY)
        if sizes[position] == old or (computed and isinstance(sizes[position], fx.Node)):  # else it follows by itself
            sizes[position] = new
    rest = view.args[start + 1 :] if several or end else ()
    view.args = (*view.args[:start], *([tuple(sizes)] if several else sizes), *rest)


def _positional(view: fx.Node, key: str, start: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of a call whose sizes were given by keyword, now by position."""
    rest = dict(view.kwargs)
    front = [*view.args, *([rest.pop("dim")] if start == 2 and len(view.args) == 1 and "dim" in rest else [])]
    back = [rest.pop("dim")] if start == 1 and "dim" in rest else []
    return (*front, rest.pop(key), *back), rest
