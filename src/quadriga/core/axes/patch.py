"""Changes to a live model that can be taken back."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor, nn


class Patch:
    """A list of changes, undone in reverse order.

    Example:
        >>> layer, patch = nn.Linear(4, 2), Patch()
        >>> patch.data(layer.weight, torch.ones(2, 3))
        >>> patch.undo()
        >>> layer.weight.shape
        torch.Size([2, 4])
    """

    def __init__(self) -> None:
        self._undo: list[Callable[[], object]] = []

    def data(self, tensor: Tensor, value: Tensor) -> None:
        """Give a parameter or buffer new contents, of any shape. The object stays, so ties stay; its gradient goes."""
        old, grad = tensor.data, tensor.grad

        def back() -> None:
            tensor.grad = None
            _set(tensor, old)
            tensor.grad = grad

        tensor.grad = None
        _set(tensor, value.detach().clone(memory_format=torch.contiguous_format))
        self._undo.append(back)

    def attr(self, owner: object, name: str, value: Any) -> None:
        """Set a plain attribute."""
        old = getattr(owner, name)
        if old != value:
            setattr(owner, name, value)
            self._undo.append(lambda: setattr(owner, name, old))

    def parameter(self, module: nn.Module, name: str, value: nn.Parameter) -> None:
        """Give a module another parameter object under a name that it knows."""
        old = module._parameters[name]
        module._parameters[name] = value

        def back() -> None:
            module._parameters[name] = old

        self._undo.append(back)

    def constant(self, module: nn.Module, name: str, value: Tensor) -> None:
        """Give a module a tensor that moves with it and is not part of its state_dict."""
        module.register_buffer(name, value, persistent=False)
        self._undo.append(lambda: module._buffers.pop(name))

    def kind(self, module: nn.Module, cls: type[nn.Module]) -> None:
        """Give a module another class with the same state."""
        old = type(module)
        module.__class__ = cls
        self._undo.append(lambda: setattr(module, "__class__", old))

    def module(self, model: nn.Module, path: str, new: nn.Module) -> None:
        """Put another module at a path; what takes the place of frozen parameters is frozen."""
        old = model.get_submodule(path)
        keep_frozen(old, new, {id(p) for p in model.parameters()})
        replace_module(model, path, new)
        self._undo.append(lambda: replace_module(model, path, old))

    def then(self, other: Patch) -> None:
        """Take over the changes of another patch, as the last ones."""
        self._undo += other._undo

    def undo(self) -> None:
        """Take everything back."""
        while self._undo:
            self._undo.pop()()


def _set(tensor: Tensor, value: Tensor) -> None:
    """Exchange the contents. While an old loss is alive, autograd remembers the shape; another dtype makes it forget."""
    if tensor.requires_grad and tensor.shape != value.shape:
        tensor.data = value.new_empty(0, dtype=torch.float32 if value.dtype != torch.float32 else torch.float64)
    tensor.data = value


def keep_frozen(old: nn.Module, new: nn.Module, known: Collection[int] = ()) -> None:
    """Freeze the parameters of a new module as those of the old one are: all, or those of one name, such as its biases.

    Args:
        old: whose place is taken.
        new: is changed.
        known: ids of parameters that are the model's own already, which stay as they are.

    Example:
        >>> new = nn.Sequential(nn.Linear(2, 1, bias=False), nn.Linear(1, 2))
        >>> keep_frozen(nn.Linear(2, 2).requires_grad_(False), new)
        >>> any(p.requires_grad for p in new.parameters())
        False
    """
    own = {name: p.requires_grad for name, p in old.named_parameters(recurse=False)}
    frozen = bool(list(old.parameters())) and not any(p.requires_grad for p in old.parameters())
    for name, p in new.named_parameters():
        if id(p) not in known and (frozen or not own.get(name.rpartition(".")[2], True)):
            p.requires_grad_(False)


def replace_module(model: nn.Module, path: str, new: nn.Module) -> None:
    """Put `new` where `path` is, under every name that the old module had."""
    old = model.get_submodule(path)
    assert old is not model, "the model itself cannot be replaced from within"
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child is old:
                parent._modules[name] = new
    new.training = old.training
    for child in new.modules():
        child.training = old.training
