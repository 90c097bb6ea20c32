"""Tensors that no export takes: sparse and nested ones."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from quadriga.core.batch import Tree, tensors
from quadriga.core.errors import BadInput


def dense(what: str, tree: Tree) -> None:
    """Refuse other than dense tensors.

    Args:
        what: how the message calls it.
        tree: of tensors.

    Raises:
        BadInput: there is one.
    """
    for t in tensors(tree):
        if t.layout != torch.strided:
            kind = str(t.layout).removeprefix("torch.")
            raise BadInput(f"{what} is a tensor of the layout {kind}, which no export takes", "give it dense, as t.to_dense()")


def dense_model(model: nn.Module) -> None:
    """Refuse other than dense tensors as parameters, buffers or attributes of modules.

    Raises:
        BadInput: there is one; with its name.
    """
    for path, module in model.named_modules():
        for name, value in (*vars(module).items(), *module._parameters.items(), *module._buffers.items()):
            if isinstance(value, Tensor):
                dense(f"{path}.{name} of the model" if path else f"{name} of the model", value)
