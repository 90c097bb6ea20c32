"""One module's own forward as a torch.fx graph that serves both modes, and a class with another forward."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from quadriga.core.batch import Tree, call, device_of, evaluating, resize, to_device
from quadriga.core.errors import NotApplicable


def follow(module: nn.Module, usual: Mapping[str, Any], where: str) -> tuple[fx.Graph, dict[str, Tensor]]:
    """The graph of a forward, and the tensors that it computes from the module alone.

    Args:
        usual: arguments that are taken for constants, with their values.
        where: of the module, for reasons.

    Raises:
        NotApplicable: the forward is another one in training. torch.fx raises many other types where it cannot follow.
    """
    (graph, constants), (other, twins) = (_trace(module, usual, training) for training in (True, False))
    if len(constants) != len(twins) or not all(map(torch.equal, constants.values(), twins.values())):
        raise NotApplicable(f"the forward of {where} has other constants in training")
    _keep_mode(graph, other, where, [constants, twins])
    return graph, constants


def usual_arguments(model: nn.Module, module: nn.Module, example: Tree) -> dict[str, Any]:
    """Arguments of a module that are None, True or False whenever the model calls it: branches on them can be followed.

    The model need not run to its end.
    """
    signature, calls = inspect.signature(module.forward), []

    def listen(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        calls.append({k: v for k, v in bound.arguments.items() if v is None or isinstance(v, bool)})

    handle = module.register_forward_pre_hook(listen, with_kwargs=True)
    with contextlib.suppress(Exception), evaluating(model), torch.no_grad():  # it may not fit together yet
        call(model, to_device(resize(example, 2), device_of(model)))
    handle.remove()
    return {k: v for k, v in calls[0].items() if all(k in c and c[k] is v for c in calls)} if calls else {}


class _Shallow(fx.Tracer):
    """Follows one module's own forward; every submodule stays a call, and what is computed from buffers is followed too."""

    proxy_buffer_attributes = True

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


def _trace(module: nn.Module, usual: Mapping[str, Any], training: bool) -> tuple[fx.Graph, dict[str, Tensor]]:
    """torch.fx leaves what a forward computes from the module alone in the module's own dictionary."""
    was, module.training, before = module.training, training, set(vars(module))
    try:
        graph = _Shallow().trace(module, dict(usual))
        _rename(graph, usual)
    finally:
        module.training = was
        constants = {name: vars(module).pop(name) for name in vars(module).keys() - before}
    return graph, constants


def _rename(graph: fx.Graph, usual: Mapping[str, Any]) -> None:
    """torch.fx numbers the arguments that it takes for constants."""
    for node in graph.nodes:
        name, _, number = str(node.target).rpartition("_")
        if node.op == "placeholder" and name in usual and number.isdigit():
            node.target = name


def _keep_mode(train: fx.Graph, other: fx.Graph, where: str, constants: Sequence[Collection[str]]) -> None:
    """`dropout(x, training=self.training)` was traced as a constant: where the two modes differ, ask the module again."""
    mine, theirs = (
        [(n.op, n.name not in own and n.name) for n in g.nodes] for g, own in zip((train, other), constants, strict=True)
    )
    if mine != theirs:
        raise NotApplicable(f"the forward of {where} is another one in training")
    mode: list[fx.Node] = []
    for node, twin in zip(list(train.nodes), list(other.nodes), strict=True):

        def merge(mine: Any, theirs: Any, node: fx.Node = node) -> Any:
            if mine is True and theirs is False:
                if not mode:
                    first = next(n for n in train.nodes if n.op != "placeholder")
                    with train.inserting_before(first):
                        mode.append(train.create_node("get_attr", "training"))
                return mode[0]
            if not isinstance(mine, fx.Node) and mine != theirs:
                raise NotApplicable(f"{node.name} in {where} has another constant in training")
            return mine

        node.args = tuple(merge(x, y) if not _same(x, y) else x for x, y in zip(node.args, twin.args, strict=True))
        node.kwargs = {k: merge(v, twin.kwargs[k]) if not _same(v, twin.kwargs[k]) else v for k, v in node.kwargs.items()}


def _same(mine: Any, theirs: Any) -> bool:
    return str(mine) == str(theirs)


def with_forward(module: nn.Module, graph: fx.Graph) -> type[nn.Module]:
    """A subclass of the module's class that runs the graph; a second one starts from the user's class too."""
    cls = type(module).__dict__.get("_rewritten", type(module))
    forward = type(fx.GraphModule(module, graph)).forward
    names = {"forward": forward, "__module__": cls.__module__, "__doc__": cls.__doc__, "_rewritten": cls}
    return type(cls.__name__, (cls,), names)
