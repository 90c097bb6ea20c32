"""Trace a model with torch.export into a flat operator graph whose weights keep the user's names and lines."""

from __future__ import annotations

import os
import re
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from quadriga.core.batch import Tree, device_of, evaluating, resize, tensors, to_device
from quadriga.core.errors import NotApplicable
from quadriga.core.quiet import quiet

BATCH = 13  # a prime, so that the batch is not mistaken for a width where shapes are matched
TORCH = os.path.dirname(torch.__file__)
PREFIX = "model."


class _Plain(nn.Module):
    """Returns the output tree's tensors as a flat tuple, whatever the model returns (ModelOutput, caches, dicts)."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        return tuple(tensors(self.model(*args, **kwargs)))


@dataclass(frozen=True)
class Traced:
    """An exported model.

    Args:
        graph: ATen operators, composite ones kept (linear, conv2d, lstm, layer_norm, scaled_dot_product_attention).
        states: placeholder name → the live parameter or buffer of the user's model.
        names: id of a state → all its names; more than one means that it is tied.
        model: the user's model, not a copy.
    """

    graph: fx.Graph
    module: fx.GraphModule
    states: Mapping[str, Tensor]
    names: Mapping[int, tuple[str, ...]]
    model: nn.Module

    def layer(self, node: fx.Node) -> str:
        """The path of the innermost module that ran this node, "" for the model itself."""
        return layer_of(node)

    def where(self, node: fx.Node) -> str:
        """For people: the layer and the last line of code outside torch."""
        line = line_of(node.meta.get("stack_trace") or "")
        layer = self.layer(node) or type(self.model).__name__
        return f"{layer} ({line})" if line else layer


def layer_of(node: fx.Node) -> str:
    """The path of the innermost module of a node, without the wrapper's prefix."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    path = str(stack[-1][0]) if stack else ""
    path = path.split("@")[0]
    return "" if path in ("", PREFIX[:-1]) else path.removeprefix(PREFIX)


def line_of(stack: str) -> str:
    """The innermost `file:line` of a printed stack that is the user's own, or "".

    Example:
        >>> line_of('File "/a/net.py", line 9, in forward')
        'net.py:9'
    """
    found = re.findall(r'File "([^"]+)", line (\d+)', stack)
    mine = [(f, n) for f, n in found if not f.startswith(TORCH) and not f.startswith(os.path.dirname(__file__))]
    return f"{os.path.basename(mine[-1][0])}:{mine[-1][1]}" if mine else ""


def arguments(example: Tree) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments that `core.batch.call` would use."""
    if isinstance(example, Mapping):
        return (), dict(example)
    return (tuple(example), {}) if isinstance(example, tuple | list) else ((example,), {})


def trace(model: nn.Module, example: Tree) -> Traced:
    """Export the model in evaluation mode, at a batch of 13.

    Args:
        model: left as it is; its own tensors are what the result names.
        example: inputs, examples along dimension 0.

    Raises:
        NotApplicable: it cannot be exported; the reason names the layer and the line of the user's code.
    """
    args, kwargs = arguments(to_device(resize(example, BATCH), device_of(model)))
    try:
        with evaluating(model), quiet():
            program = torch.export.export(_Plain(model).eval(), args, kwargs)
    except Exception as error:  # export raises many types; each means that this model cannot be traced
        raise NotApplicable(_why(error, model), "write the forward without branches on tensor values") from error
    named = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    names: dict[int, tuple[str, ...]] = {}
    for name, tensor in named.items():
        names[id(tensor)] = (*names.get(id(tensor), ()), name)
    sign = program.graph_signature
    lifted = {**sign.inputs_to_parameters, **sign.inputs_to_buffers}
    states = {place: named[name.removeprefix(PREFIX)] for place, name in lifted.items()}
    return Traced(program.graph_module.graph, program.graph_module, states, names, model)


def _why(error: Exception, model: nn.Module) -> str:
    frames = [f for f, _ in traceback.walk_tb(error.__traceback__)]
    mine = [f for f in frames if not f.f_code.co_filename.startswith((TORCH, os.path.dirname(__file__)))]
    text = (str(error).strip() or type(error).__name__).splitlines()[0]
    if not mine:
        line = line_of(str(error))
        return f"{type(model).__name__} cannot be traced{f' at {line}' if line else ''}: {text}"
    frame, owner = mine[-1], mine[-1].f_locals.get("self")
    numbers = [n for f, n in traceback.walk_tb(error.__traceback__) if f is frame]
    paths = [name for name, module in model.named_modules() if module is owner]
    layer = (paths[0] if paths else "") or type(owner if isinstance(owner, nn.Module) else model).__name__
    return f"{layer} cannot be traced at {os.path.basename(frame.f_code.co_filename)}:{numbers[-1]}: {text}"
